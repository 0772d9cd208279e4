"""What a person sees while a search runs: a live view, or plain lines without a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from search.comparison import Comparison, compare
from search.evaluation_search import EvaluationSearch

_PLAIN_INTERVAL_S = 10.0
_REFRESHES_PER_S = 2.0
_BAR_WIDTH = 24
# Of the texts: a terminal can be made so narrow without breaking lines that are there already.
_WIDTH = 48
# Steps by which annealing's acceptance is judged.
_RECENT = 20


@dataclass(frozen=True)
class Standing:
    """Where a search is, for a thread that must not look at it while it changes.

    num_done, num_total: evaluations.
    best, dense:  mean rewards on the search prompts; None: not known yet. at: the best's ratios.
    comparison:   of the two, which flatters the best of many.
    annealing:    its temperature and last steps, in words; None: it is not annealing.
    num_failed:   evaluations; failure: the last one's reason.
    num_coming:   pictures still to be drawn.
    gpu_hours:    so far, in all sessions; gpu_hours_left: for what is to be drawn.
    """

    num_done: int
    num_total: int
    best: float | None
    at: str
    dense: float | None
    comparison: Comparison | None
    annealing: str | None
    num_failed: int
    failure: str | None
    num_coming: int
    gpu_hours: float
    gpu_hours_left: float

    @classmethod
    def of(cls, search: EvaluationSearch) -> Standing:
        """Look at a search, which takes time in proportion to its evaluations."""
        num_done, num_total = search.progress
        best, dense = next(iter(search.candidates), None), search.of("dense")
        if dense is not None and dense.failure is not None:
            dense = None
        comparison = None
        if best is not None and dense is not None:
            comparison = compare(best.rewards, dense.rewards, best.prompts.texts)
        failures = [each.failure for each in search.evaluations if each.failure is not None]
        use, num_coming = search.use, search.num_coming
        return cls(
            num_done,
            num_total,
            best=best.mean if best else None,
            at=search.space.describe(best.candidate) if best else "",
            dense=dense.mean if dense else None,
            comparison=comparison,
            annealing=_annealing(search),
            num_failed=len(failures),
            failure=failures[-1] if failures else None,
            num_coming=num_coming,
            gpu_hours=use.gpu_hours,
            gpu_hours_left=use.gpu_hours / use.pictures * num_coming if use.pictures else 0.0,
        )


class Progress:
    """Follows the evaluations of one search.

    gpu_hour_price: to say what it has cost, in any currency; None: nothing is said of it.
    """

    def __init__(self, console: Console, *, gpu_hour_price: float | None = None) -> None:
        self.console = console
        self._price = gpu_hour_price
        self._live: Live | None = None
        self._search: EvaluationSearch | None = None
        self._standing: Standing | None = None
        self._last_line_s = 0.0
        self._began_s = 0.0
        # When the first and the latest pictures were there, and how many.
        self._first: tuple[float, int] | None = None
        self._latest: tuple[float, int] = (0.0, 0)

    def begin(self, search: EvaluationSearch) -> None:
        """Show what the ledger knew, and start the live view if there is a terminal."""
        self._search = search
        self._began_s = time.monotonic()
        self._standing = Standing.of(search)
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(
                console=self.console,
                get_renderable=self._view,
                refresh_per_second=_REFRESHES_PER_S,
                # Written to a file it stays there.
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start(refresh=True)
        else:
            self._print(self._standing)

    def evaluation(self, search: EvaluationSearch) -> None:
        """Show one more complete evaluation."""
        if self._standing is None:  # Replaying: thousands a second, nobody reads along.
            return
        before, self._standing = self._standing, Standing.of(search)
        self._count(search.num_drawn)
        if self._live is None:
            now = self._standing
            is_news = now.best != before.best or now.num_done == now.num_total
            if is_news or time.monotonic() - self._last_line_s > _PLAIN_INTERVAL_S:
                self._print(now)

    def close(self) -> None:
        """Leave the view as it is."""
        if self._live is not None:
            assert self._search is not None
            self._standing = Standing.of(self._search)
            self._live.stop()
            self._live = None

    def _print(self, now: Standing) -> None:
        self._last_line_s = time.monotonic()
        left = self._left_s(now)
        self.console.print(
            f"{now.num_done}/{now.num_total} evaluations, {_standing(now)}"
            + ("" if left is None else f", {_time(left)} left")
        )

    # --- pace ----------------------------------------------------------------------------------

    def _count(self, num_drawn: int) -> None:
        """Note how many pictures this session has drawn."""
        if num_drawn != self._latest[1]:
            self._latest = time.monotonic(), num_drawn
            # From the first on: what came before was mostly loading.
            self._first = self._first or self._latest

    @property
    def _pace(self) -> float | None:
        """Pictures per second; None: not known yet."""
        if self._first is None or self._latest[1] == self._first[1]:
            return None
        (first_s, first), (latest_s, latest) = self._first, self._latest
        return (latest - first) / (latest_s - first_s)

    def _left_s(self, now: Standing) -> float | None:
        """Return the seconds to the end; None: nobody knows."""
        if now.num_done == now.num_total:
            return 0.0
        pace = self._pace
        if pace is None:
            return None
        return max(0.0, now.num_coming / pace - (time.monotonic() - self._latest[0]))

    # --- the live view -------------------------------------------------------------------------

    def _view(self) -> Table:
        """Render what is known; in a thread of rich's, so from numbers alone."""
        now, search = self._standing, self._search
        assert now is not None
        assert search is not None
        self._count(search.num_drawn)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(now.num_total, now.num_done, width=_BAR_WIDTH),
            f"{now.num_done}/{now.num_total}",
        )
        view = Table.grid(padding=(0, 1))
        view.add_column(no_wrap=True)
        view.add_column(max_width=_WIDTH)
        view.add_row("evaluations", bar)
        for name, text in self._rows(now, search):
            view.add_row(name, text)
        return view

    def _rows(self, now: Standing, search: EvaluationSearch) -> Iterator[tuple[str, Text]]:
        name = "so far" if now.best is None else "best"
        yield name, Text(_standing(now).removeprefix("best "))
        if now.comparison is not None:
            figures = now.comparison.figures
            yield "difference", Text(f"{figures}, on the search prompts, which flatter the best")
        pace = self._pace
        yield (
            "workers",
            Text(
                "starting"
                if math.isinf(search.max_trials)
                else f"{search.num_running} of {search.max_trials:.0f} at work, "
                f"{search.num_drawn} pictures" + ("" if pace is None else f", {pace:.3g}/s")
            ),
        )
        if now.annealing is not None:
            yield "annealing", Text(now.annealing)
        if now.failure is not None:
            # It may quote anything.
            reason = "".join(sign if sign.isprintable() else "?" for sign in now.failure)
            text = f"{now.num_failed}, the last: {reason}"
            yield "failed", Text(text, no_wrap=True, overflow="ellipsis")
        left_s = self._left_s(now)
        taken = f"{_time(time.monotonic() - self._began_s)} so far"
        yield "time", Text(f"{taken}, about {_time(left_s)} left" if left_s else taken)
        if self._price is not None:
            taken = f"{now.gpu_hours * self._price:.2f} so far"
            left = now.gpu_hours_left * self._price
            yield "money", Text(f"{taken}, about {left:.2f} left" if left else taken)


def _annealing(search: EvaluationSearch) -> str | None:
    steps = search.steps
    if not steps or steps[-1].event is None:
        return None
    recent = Counter(step.event for step in steps[-_RECENT:])
    proposed = recent["accept"] + recent["reject"] + recent["fail"]
    accepted = f", {recent['accept']}/{proposed} accepted" if proposed else ""
    last = steps[-1]
    return f"temperature {last.temperature:.3g}, last {last.event}{accepted}"


def _standing(now: Standing) -> str:
    parts = []
    if now.best is not None:
        parts.append(f"best {now.best:.3f} at {now.at}")
    if now.dense is not None:
        parts.append(f"dense {now.dense:.3f}")
    return ", ".join(parts) or "loading the model"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
