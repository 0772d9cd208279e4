"""A grid of searches on one Ray cluster: `python -m search.run -m`; and its report, from here."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process
from types import FrameType
from typing import TextIO

from rich.console import Console
from rich.table import Table as RichTable

from crdiff_core.errors import CRDiffError
from search.cluster import LOCAL, connect, num_workers
from search.config import ClusterSettings, Config, ConfigError
from search.grid_report import (
    MARKDOWN_FILE,
    TABLE_FILE,
    Row,
    markdown_table,
    name_cells,
    ratios_table,
    rewards_table,
    row,
    rows_in,
    write_grid,
)
from search.logs import one_line, to_console
from search.plan import Plan
from search.storage import Storage

log = logging.getLogger(__name__)

# Side by side, cells share the workers; with fewer each than these, a cell speeds up by nearly
# all that it is given: tests/benchmarks/scheduling.py.
_WORKERS_OF_A_CELL = 8
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOOK_S = 1.0
# More than a pipe holds would wait for whoever reads it, who waits for the end.
_LONGEST_REASON = 1000


@dataclass(frozen=True)
class Cell:
    """One search of a grid.

    name:         MODEL_RES, and the search's own name too where the grid has several of these.
    folder:       of its results, below the grid's output.
    command:      that runs it alone.
    is_finished:  whether the ledger has all of it.
    num_pictures: it had drawn when the grid began.
    """

    name: str
    folder: str
    config: Config
    command: str
    is_finished: bool
    num_pictures: int


def check(searches: Sequence[tuple[Config, str]]) -> list[Cell]:
    """Check every search of a grid, with the command that runs it alone, before any begins.

    Raises ConfigError, in one line that names the cell, for whatever would make one fail later.
    """
    for name in ("cluster", "output"):
        if len({str(getattr(config, name)) for config, _ in searches}) > 1:
            raise ConfigError(f"{name}: a grid has one for all its cells: give one value of each")
    folders: dict[str, str] = {}
    found = []
    for config, command in searches:
        try:
            plan = Plan.make(config)
            folder = f"{plan.folder.parent.name}/{plan.folder.name}"
            is_finished = plan.search.replay()
        except CRDiffError as error:
            raise ConfigError(f"{config.model.name}_{config.res}: {error}") from error
        if folder in folders:
            raise ConfigError(
                f"{folder}: two cells would keep their results there ({folders[folder]} and "
                f"{command}): leave one out, or give each an output in a grid of its own"
            )
        folders[folder] = command
        found.append(Cell("", folder, config, command, is_finished, plan.search.use.pictures))
    names = name_cells(list(folders))
    return [replace(cell, name=name) for cell, name in zip(found, names, strict=True)]


def run_grid(cells: Sequence[Cell], command: str, console: Console, is_verbose: bool) -> int:
    """Run every cell in a process of its own, write the grid's results, and show them.

    command: that runs the grid.
    Returns the exit code: 0, or 2 if a cell has failed. Raises a CRDiffError, in one line, if the
    cluster or the results' place cannot be reached, and KeyboardInterrupt after Ctrl-C or
    SIGTERM, when all cells have ended as they do alone, and the results are written.
    """
    began_s = time.monotonic()
    with _shared(cells, console) as (cluster, shares):
        session = _Session(cluster, shares, console, is_verbose)
        session.run(cells)
    rows = [_row(cell, session.failures.get(cell.name, "")) for cell in cells]
    output = Storage.at(cells[0].config.output)
    report = write_grid(output, rows, command)
    _show(console, rows)
    num_drawn = sum(
        max(0, each.num_pictures - cell.num_pictures)
        for each, cell in zip(rows, cells, strict=True)
    )
    drawn = f"{num_drawn} drawn in this run" if num_drawn else "none drawn: the ledger had all"
    num_finished = sum(each.found is not None for each in rows)
    for line in (
        f"cells     {num_finished} of {len(rows)} finished, {time.monotonic() - began_s:.0f} s",
        f"pictures  {drawn}",
        f"report    {report}",
        f"tables    {output / TABLE_FILE}, {output / MARKDOWN_FILE}",
    ):
        console.print(line, markup=False)
    for each in rows:
        if each.status == "failed":
            print(f"error: {each.name}: {each.reason}", file=sys.stderr)
    if session.stopped_by is not None:
        raise KeyboardInterrupt
    return 2 if num_finished < len(rows) else 0


def _row(cell: Cell, failure: str) -> Row:
    try:
        # As it went: what failed is not to be evaluated again now.
        trial = cell.config.trial.model_copy(update={"retry_failed": False})
        config = cell.config.model_copy(update={"trial": trial})
        return row(Plan.make(config), cell.command, failure)
    except CRDiffError as error:
        reason = failure or one_line(str(error))
        return Row(cell.name, cell.folder, "failed", reason, cell.command)


@contextmanager
def _shared(
    cells: Sequence[Cell], console: Console
) -> Iterator[tuple[ClusterSettings, list[int | None]]]:
    """Start or join the cells' cluster; yields how to join it, and the workers of each share.

    There are as many shares as cells run side by side; without anything to draw there is no
    cluster, and one share.
    """
    settings = cells[0].config.cluster
    num_open = sum(not cell.is_finished for cell in cells)
    if not num_open:
        yield settings, [None]
        return
    console.print(f"{len(cells)} cells, {num_open} of them to go on with: starting")
    with connect(settings) as resources:
        import ray

        total = settings.num_workers or num_workers(resources)
        shares = shared_out(total, num_open, settings.cells)
        if settings.address == LOCAL:
            address = str(ray.get_runtime_context().gcs_address)
            yield settings.model_copy(update={"address": address}), [*shares]
            return
    # Whoever stays connected to a cluster that somebody stops is stopped with it.
    yield settings, [*shares]


def shared_out(num_workers: int, num_cells: int, cells: int | None = None) -> list[int]:
    """Return the workers of each cell that runs at the same time; their sum is num_workers.

    cells: how many at most; None: as many as have 8 workers each, and at least one.
    """
    most = cells or max(1, num_workers // _WORKERS_OF_A_CELL)
    count = min(most, num_cells, num_workers)
    share, rest = divmod(num_workers, count)
    return [share + (number < rest) for number in range(count)]


# --- the cells' processes --------------------------------------------------------------------


@dataclass(frozen=True)
class _Running:
    cell: Cell
    process: BaseProcess
    # What it says in the end: '' or why it failed.
    said: Connection
    share: int | None
    began_s: float


class _Session:
    """Runs cells, as many at once as there are shares; a cell's end costs only itself.

    failures: the reasons, in one line, by the cells' names.
    """

    def __init__(
        self,
        cluster: ClusterSettings,
        shares: list[int | None],
        console: Console,
        is_verbose: bool,
    ) -> None:
        self.failures: dict[str, str] = {}
        self.stopped_by: int | None = None
        self._cluster = cluster
        self._shares = shares
        self._console = console
        self._is_verbose = is_verbose
        self._running: dict[int, _Running] = {}

    def run(self, cells: Sequence[Cell]) -> None:
        """Run these; after a signal no more are begun, and those that run are told."""
        waiting = deque(enumerate(cells, 1))
        with _handled(self._stop):
            try:
                while self._running or (waiting and self.stopped_by is None):
                    while self._shares and self.stopped_by is None:
                        ready = next((e for e in waiting if self._may_begin(e[1])), None)
                        if ready is None:
                            break
                        waiting.remove(ready)
                        number, cell = ready
                        self._say(f"cell {number} of {len(cells)}: {cell.name}")
                        self._begin(cell)
                    for sentinel in wait(list(self._running), timeout=_LOOK_S):
                        assert isinstance(sentinel, int)
                        self._end(self._running.pop(sentinel))
            finally:
                # None is left, unless something of ours has failed, such as a closed console.
                self._stop_all(signal.SIGTERM)
                for running in self._running.values():
                    running.process.join()

    def _may_begin(self, cell: Cell) -> bool:
        """Whether none runs that shares its ledger: both would draw the dense model."""
        place = cell.folder.partition("/")[0]
        return all(e.cell.folder.partition("/")[0] != place for e in self._running.values())

    def _begin(self, cell: Cell) -> None:
        share = self._shares.pop(0)
        said, says = multiprocessing.Pipe(duplex=False)
        cluster = self._cluster.model_copy(update={"num_workers": share})
        process = multiprocessing.get_context("spawn").Process(
            target=_run_cell, args=(cell, cluster, self._is_verbose, says), name=cell.name
        )
        # It lets them through once it can end in order.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        says.close()
        running = _Running(cell, process, said, share, time.monotonic())
        self._running[process.sentinel] = running
        if self.stopped_by is not None:  # Meanwhile.
            _tell(running, self.stopped_by)

    def _end(self, running: _Running) -> None:
        running.process.join()
        try:
            reason = running.said.recv() if running.said.poll() else None
        except (EOFError, OSError):
            reason = None
        running.said.close()
        self._shares.append(running.share)
        if reason is None:
            reason = _killed(running.process.exitcode)
        took = f"after {time.monotonic() - running.began_s:.0f} s"
        if self.stopped_by is not None and reason == _STOPPED:
            self._say(f"{running.cell.name}: stopped {took}")
        elif reason:
            self.failures[running.cell.name] = reason
            self._say(f"{running.cell.name}: failed {took}: {reason}")
        else:
            self._say(f"{running.cell.name}: done {took}")

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.stopped_by = number
        self._stop_all(number)

    def _stop_all(self, number: int) -> None:
        for running in [*self._running.values()]:
            _tell(running, number)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)


def _tell(running: _Running, number: int) -> None:
    if running.process.pid is not None and running.process.is_alive():
        os.kill(running.process.pid, number)


def _killed(code: int | None) -> str:
    what = f"exit code {code}"
    if code is not None and code < 0:
        what = signal.Signals(-code).name
    return (
        f"its process was ended by {what} (SIGKILL: perhaps memory ran out); what it had "
        "measured is kept: run the same command again"
    )


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    # Ray has set one for SIGTERM that exits at once.
    earlier = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, each in earlier.items():
            signal.signal(number, each)


_STOPPED = "its process was told to stop"


def _run_cell(cell: Cell, cluster: ClusterSettings, is_verbose: bool, says: Connection) -> None:
    """Run one cell in this process, which has been started for it; say how it ended."""
    # Ctrl-C of a terminal reaches the grid alone, which passes it on once.
    os.setpgid(0, 0)
    sys.stdout = _Prefixed(sys.stdout, cell.name)
    sys.stderr = _Prefixed(sys.stderr, cell.name)
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    reason = ""
    try:
        to_console(is_verbose)
        threading.Thread(target=_follow_parent, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        _search(cell, cluster)
    except CRDiffError as error:
        reason = one_line(str(error))
    except KeyboardInterrupt:
        reason = _STOPPED
    except Exception as error:
        log.exception("the cell failed")
        reason = one_line(f"{type(error).__name__}: {error}")
    says.send(reason[:_LONGEST_REASON])


def _search(cell: Cell, cluster: ClusterSettings) -> None:
    from search.driver import run
    from search.progress import Progress

    console = Console(file=sys.stdout, force_terminal=False, highlight=False, soft_wrap=True)
    outcome = run(cell.config, cell.command, Progress(console), cluster)
    comparison = outcome.comparison
    verdict = "not validated"
    if comparison is not None:
        verdict = f"{comparison.verdict}, {comparison.summary}"
    console.print(f"{verdict}, at {outcome.winner.ratios}", markup=False)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _follow_parent() -> None:
    """End this process, in order, when the grid has died."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


class _Prefixed:
    """A text stream that writes whole lines, each with the cell's name before it."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._line = ""

    def write(self, text: str) -> int:
        """Write what is complete."""
        *lines, self._line = f"{self._line}{text}".split("\n")
        said = "".join(f"{self._name}: {line}\n" for line in lines if line.strip())
        if said:
            self._stream.write(said)
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Do nothing: every line is written when it is complete."""

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


# --- what is shown in the end ----------------------------------------------------------------


def _show(console: Console, rows: Sequence[Row]) -> None:
    for table in (rewards_table(rows), ratios_table(rows)):
        console.print()
        if console.is_terminal:
            rich = RichTable(*table.head)
            for line in table.rows:
                rich.add_row(*line)
            console.print(rich, markup=False, soft_wrap=False)
        else:
            console.print(markdown_table(table), markup=False, end="")
    console.print()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the grid report again, of all searches in a folder, from their ledgers."""
    parser = argparse.ArgumentParser(prog="python -m search.grid", description=main.__doc__)
    parser.add_argument("output", nargs="?", default="runs", help="of searches (default: runs)")
    try:
        output = Storage.at(parser.parse_args(arguments).output)
        rows, command = rows_in(output)
        if not rows:
            raise ConfigError(f"{output}: no search is there: give the output of searches")
        print(write_grid(output, rows, command))
    except CRDiffError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
