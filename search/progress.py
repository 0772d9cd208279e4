"""What a person sees while a search runs: one live line, or plain lines without a terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from search.evaluation_search import EvaluationSearch
from search.evaluations import Evaluation

_PLAIN_INTERVAL_S = 10.0


class Progress:
    """Follows the evaluations of one search."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: RichProgress | None = None
        self._last_line_s = 0.0
        self._num_replayed: int | None = None
        self._first_drawn_s: float | None = None

    def begin(self, search: EvaluationSearch) -> None:
        """Show what the ledger knew, and start the live line if there is a terminal."""
        self._num_replayed = search.progress[0]
        if self.console.is_terminal:
            self._live = RichProgress(
                TextColumn("evaluations"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._live.add_task(
                "", completed=self._num_replayed, total=search.progress[1]
            )
            self._live.start()
        self._show(search, force=True)

    def evaluation(self, search: EvaluationSearch) -> None:
        """Show one more complete evaluation."""
        if self._num_replayed is None:  # Replaying: thousands a second, nobody reads along.
            return
        last = search.evaluations[-1]
        self._show(search, force=last is _best(search) or search.finished)

    def close(self) -> None:
        """Leave the line as it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, search: EvaluationSearch, force: bool) -> None:
        done, total = search.progress
        if self._live is not None:
            text = _standing(search, "best {0.mean:.3f}")  # It must fit 80 columns.
            self._live.update(self._task, completed=done, total=total, description=text)
        elif force or time.monotonic() - self._last_line_s > _PLAIN_INTERVAL_S:
            self._last_line_s = time.monotonic()
            text = _standing(search, "best {0.mean:.3f} at {1}")
            self.console.print(f"{done}/{total} evaluations, {text}{self._left(done, total)}")

    def _left(self, done: int, total: int) -> str:
        # From the first evaluation on: what came before it was mostly loading.
        num_drawn = done - (self._num_replayed or 0) - 1
        if num_drawn < 0:
            return ""
        if self._first_drawn_s is None:
            self._first_drawn_s = time.monotonic()
        if num_drawn == 0:
            return ""
        seconds = (time.monotonic() - self._first_drawn_s) / num_drawn * (total - done)
        return f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left"


def _best(search: EvaluationSearch) -> Evaluation | None:
    return next(iter(search.candidates), None)


def _standing(search: EvaluationSearch, best_as: str) -> str:
    best, dense = _best(search), search.of("dense")
    parts = []
    if best is not None:
        parts.append(best_as.format(best, search.space.describe(best.candidate)))
    if dense is not None and dense.failure is None:
        parts.append(f"dense {dense.mean:.3f}")
    return ", ".join(parts) or "loading the model"
