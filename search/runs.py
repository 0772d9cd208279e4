"""What searches there are, and their state: `python -m search.runs [OUTPUT]`."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crdiff_core.errors import CRDiffError
from search.comparison import Comparison
from search.config import ConfigError
from search.lease import Lease
from search.storage import Storage

RUN_FILE = "run.json"
RATIOS_FILE = "best_ratios.json"
REPORT_FILE = "report.html"
State = Literal["finished", "running", "stopped", "failed"]
# Folders looked at together: an object store takes its time for each.
_NUM_READERS = 16


class RunError(CRDiffError):
    """A folder holds a search that cannot be read."""


def runs_in(output: Storage) -> list[Storage]:
    """Return the folders of the searches under an output folder, or itself if it is one."""
    if RUN_FILE in output.files():
        return [output]
    return [run for cell in output.folders() for run in cell.folders() if RUN_FILE in run.files()]


def read_record(folder: Storage) -> dict[str, Any]:
    """Return what the sessions of the search in this folder recorded, as far as it is readable."""
    try:
        return dict(json.loads(folder.read(RUN_FILE) or b"{}"))
    except (ValueError, TypeError, RecursionError):  # It was torn, or is not ours.
        return {}


@dataclass(frozen=True)
class Run:
    """One search, as its files show it.

    state:      stopped: it goes on when it is run again.
    num_steps:  taken, of max_steps; None: an earlier version did not record it; num_pictures, too.
    ratios:     (down, mid, up), the best so far, or of a finished search the winner's.
    comparison: of the winner with the dense model on the validation prompts; None: not finished,
                or that evaluation failed.
    failure:    why it failed, in one line.
    touched_at: when its files were last written, in seconds since 1970.
    """

    folder: str
    model: str
    resolution: str
    searcher: str
    name: str
    state: State
    num_steps: int | None
    max_steps: int
    ratios: tuple[float, float, float] | None
    poa_weight: float | None
    comparison: Comparison | None
    num_pictures: int | None
    failure: str | None
    touched_at: float

    @classmethod
    def read(cls, folder: Storage) -> Run:
        """Raise RunError, in one line, if it cannot be read, and StorageError."""
        files = folder.files()
        record = _Record.read(folder, RUN_FILE)
        standing = record.standing
        best = _Best.read(folder, RATIOS_FILE) if RATIOS_FILE in files else None
        is_finished = best is not None and (standing is None or standing.is_finished)
        state: State = "finished" if is_finished else "stopped"
        if standing is not None and standing.failure is not None:
            state = "failed"
        if not Lease(folder).is_free:
            state = "running"
        provenance = best.provenance if best is not None else None
        if standing is None and provenance is not None:  # Recorded by an earlier version.
            standing = _Standing(
                num_steps=provenance.num_steps, num_pictures=int(provenance.use["pictures"])
            )
        if standing is None:
            standing = _Standing()
        if is_finished and best is not None:
            ratios = best.best_global_params_ratio
            standing.ratios = ratios.down_ratio, ratios.mid_ratio, ratios.up_ratio
            standing.poa_weight = best.poa_weight
        config = record.config
        return cls(
            folder=str(folder),
            model=config.model.name,
            resolution=config.res,
            searcher=config.searcher.name,
            name=folder.name,
            state=state,
            num_steps=standing.num_steps,
            max_steps=config.budget.steps,
            ratios=standing.ratios,
            poa_weight=standing.poa_weight,
            comparison=provenance.validation if provenance and is_finished else None,
            num_pictures=standing.num_pictures,
            failure=standing.failure if state == "failed" else None,
            touched_at=max(files.values()),
        )

    @property
    def order(self) -> tuple[object, ...]:
        """By model, size and name."""
        size = tuple(int(number) for number in re.findall(r"\d+", self.resolution))
        return self.model, size, self.name, self.folder

    def as_dict(self) -> dict[str, Any]:
        """Return what --json prints."""
        raw = asdict(self)
        raw["comparison"] = self.comparison.as_dict() if self.comparison else None
        raw["touched_at"] = datetime.fromtimestamp(self.touched_at, UTC).isoformat(
            timespec="seconds"
        )
        return raw


# --- what its files hold, of which more may be there ------------------------------------------


class _Named(BaseModel):
    name: str


class _Budget(BaseModel):
    steps: int


class _Settings(BaseModel):
    model: _Named
    searcher: _Named
    budget: _Budget
    res: str


class _Standing(BaseModel):
    is_finished: bool = False
    failure: str | None = None
    num_steps: int | None = None
    num_pictures: int | None = None
    ratios: tuple[float, float, float] | None = None
    poa_weight: float | None = None


class _File(BaseModel):
    @classmethod
    def read(cls, folder: Storage, name: str) -> Self:
        try:
            return cls.model_validate_json(folder.read(name) or b"")
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"])
            reason = f"{path}: {first['msg']}" if path else first["msg"]
            remedy = "run its command again, or move the folder away"
            if name == RATIOS_FILE:
                remedy = f"python -m search.export {folder} writes it again"
            raise RunError(f"{folder}/{name}: {reason}: {remedy}") from error


class _Record(_File):
    config: _Settings
    standing: _Standing | None = None


class _Ratios(BaseModel):
    down_ratio: float
    mid_ratio: float
    up_ratio: float


class _Provenance(BaseModel):
    num_steps: int
    use: dict[str, float]
    validation: Comparison | None


class _Best(_File):
    best_global_params_ratio: _Ratios
    poa_weight: float
    provenance: _Provenance


# --- what is printed --------------------------------------------------------------------------


def _table(runs: Sequence[Run]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 1, 0))
    table.add_column("search", overflow="fold")
    table.add_column("state\ntouched", no_wrap=True)
    table.add_column("steps\npictures", no_wrap=True)
    table.add_column("down / mid / up, best\nagainst dense", overflow="fold", width=26)
    for run in runs:
        table.add_row(
            Text(_printable(f"{run.model} {run.resolution}\n{run.name}", "\n")),
            f"{run.state}\n{_ago(run.touched_at)}",
            f"{_steps(run)}\n{_pictures(run)}",
            Text("\n".join(_printable(each) for each in _result(run))),
        )
    return table


def _lines(runs: Sequence[Run]) -> Iterator[str]:
    rows = [
        [
            run.state,
            f"{_steps(run)} steps",
            f"{_pictures(run)} pictures",
            *(_result(run) + 3 * [""])[:3],
            datetime.fromtimestamp(run.touched_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            run.folder,
        ]
        for run in runs
    ]
    rows = [[_printable(cell) or "-" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _result(run: Run) -> list[str]:
    """Say what was found: ratios, verdict, difference; or why nothing was."""
    if run.failure is not None:
        return [run.failure]
    if run.ratios is None:
        return []
    ratios = " / ".join(f"{ratio:.3f}" for ratio in run.ratios)
    if run.comparison is None:
        is_over = run.state == "finished"
        return [ratios, "not validated" if is_over else "so far, not validated"]
    found = run.comparison
    interval = "" if found.low is None else f" [{found.low:+.4f}, {found.high:+.4f}]"
    return [ratios, found.verdict, f"{found.difference:+.4f}{interval}"]


def _steps(run: Run) -> str:
    return f"{'?' if run.num_steps is None else run.num_steps}/{run.max_steps}"


def _pictures(run: Run) -> str:
    return "?" if run.num_pictures is None else str(run.num_pictures)


def _ago(at: float) -> str:
    seconds = max(0.0, time.time() - at)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"


def _printable(text: str, kept: str = "") -> str:
    # What lies in a folder may be anybody's.
    return "".join(sign if sign.isprintable() or sign in kept else "?" for sign in text)


def _read(folder: Storage) -> Run | str:
    """Return a run, or what is wrong with it."""
    try:
        return Run.read(folder)
    except CRDiffError as error:
        return _printable(" ".join(str(error).split()))


def main(arguments: Sequence[str] | None = None) -> int:
    """List the searches in a folder: their state, and what they found."""
    parser = argparse.ArgumentParser(prog="python -m search.runs", description=main.__doc__)
    parser.add_argument(
        "output", nargs="?", default="runs", help="of searches, or of one (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="for programs: all of it, as JSON")
    options = parser.parse_args(arguments)
    try:
        output = Storage.at(options.output)
        folders = runs_in(output)
        if not folders:
            raise ConfigError(
                f"{output}: no search is there: start one with python -m search.run, or give the "
                "output of another"
            )
    except CRDiffError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        read = list(readers.map(_read, folders))
    runs = sorted((each for each in read if isinstance(each, Run)), key=lambda run: run.order)
    console = Console(highlight=False)
    if options.json:
        print(json.dumps([run.as_dict() for run in runs], indent=2))
    elif console.is_terminal and runs:
        console.print(_table(runs))
    else:
        for line in _lines(runs):
            print(line)
    broken = [each for each in read if isinstance(each, str)]
    for reason in broken:
        print(f"error: {reason}", file=sys.stderr)
    return 2 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
