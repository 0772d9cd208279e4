"""What the searches of a grid found, side by side: grid_report.html, grid.json and grid.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from markupsafe import Markup
from plotly.graph_objects import Figure, Scatter

from crdiff_core.errors import CRDiffError
from crdiff_core.ratios import GROUPS, BlockRatios
from search.comparison import Comparison
from search.config import AnnealingSettings
from search.export import load_plan, validated
from search.logs import one_line
from search.page import chart, render
from search.plan import Plan
from search.runs import RATIOS_FILE, REPORT_FILE, read_record, runs_in
from search.storage import Storage

GRID_FILE, TABLE_FILE, MARKDOWN_FILE = "grid_report.html", "grid.json", "grid.md"
_LONGEST_REASON = 500

PAPER_NOTE = (
    "The paper's figures are the ones it reports, as means on its own prompts. Ours are means on "
    "our validation prompts, so compare sign and size of the differences, not the rewards."
)
_STARTED_THERE = (
    "Searches of the paper's cells also tried the paper's ratios as a starting point; "
    "searcher.start_from_paper=false leaves them out."
)


@dataclass(frozen=True)
class Paper:
    """What the paper reports of a cell: best ratios and mean ImageReward (tables 1, 2, 6, 7)."""

    ratios: BlockRatios
    dense: float
    pruned: float
    cr_diff: float

    @property
    def difference(self) -> float:
        """CR-Diff - dense."""
        return self.cr_diff - self.dense


@dataclass(frozen=True)
class Found:
    """The result of a finished search.

    dense, cr_diff: mean rewards on the validation prompts; None, as the comparison, if one of the
                    two failed.
    """

    ratios: BlockRatios
    poa_weight: float
    reward: str
    dense: float | None
    cr_diff: float | None
    comparison: Comparison | None


@dataclass(frozen=True)
class Row:
    """One search of a grid, as far as its ledger has it.

    name:    the cell's, MODEL_RES, and the search's too where the cell has several.
    folder:  of its results, below the grid's output.
    command: that runs it alone; '' if nobody knows.
    reason:  why it failed, in one line, or how far it got; '' where it has finished.
    started_there: whether the paper's ratios were among its starting points.
    """

    name: str
    folder: str
    status: Literal["finished", "failed", "unfinished"]
    reason: str = ""
    command: str = ""
    found: Found | None = None
    paper: Paper | None = None
    started_there: bool = False
    num_pictures: int = 0
    has_report: bool = False

    @property
    def model(self) -> str:
        """Its model's name."""
        return self.folder.partition("/")[0].rpartition("_")[0]

    @property
    def res(self) -> str:
        """Its HEIGHTxWIDTH."""
        return self.folder.partition("/")[0].rpartition("_")[2]

    @property
    def search(self) -> str:
        """Its searcher and seed, and what else tells it from others of the cell."""
        return self.folder.rpartition("/")[2]

    @property
    def verdict(self) -> str:
        """What came of it, in few words."""
        if self.found is None:
            return self.status
        return self.found.comparison.verdict if self.found.comparison else "not validated"

    def as_dict(self) -> dict[str, Any]:
        """Return it for grid.json."""
        found, paper = self.found, self.paper
        return {
            "model": self.model,
            "res": self.res,
            "search": self.search,
            "folder": self.folder,
            "command": self.command,
            "status": self.status,
            "reason": self.reason,
            "verdict": self.verdict,
            "ratios": found.ratios.as_dict() if found else None,
            "poa_weight": found.poa_weight if found else None,
            "reward": found.reward if found else None,
            "dense": found.dense if found else None,
            "cr_diff": found.cr_diff if found else None,
            "comparison": found.comparison.as_dict() if found and found.comparison else None,
            "num_pictures": self.num_pictures,
            "paper": {
                "ratios": paper.ratios.as_dict(),
                "image_reward": {
                    "dense": paper.dense,
                    "pruned": paper.pruned,
                    "cr_diff": paper.cr_diff,
                },
            }
            if paper
            else None,
        }


def row(plan: Plan, command: str = "", failure: str = "") -> Row:
    """Read a search's row from its ledger, drawing nothing.

    failure: why its driver ended without a result, in this session; '' if it did not.
    """
    is_finished, search = plan.search.replay(), plan.search
    reason = failure or search.failure or ""
    found = None
    if is_finished and not reason and search.winner is not None:
        winner, dense = search.of("validation"), search.of("dense validation")
        comparison = validated(plan)
        found = Found(
            search.winner.ratios,
            search.winner.candidate.poa_weight,
            plan.reward.name,
            dense=dense.mean if dense and comparison else None,
            cr_diff=winner.mean if winner and comparison else None,
            comparison=comparison,
        )
    done, total = search.progress
    paper = _paper(plan)
    settings = plan.config.searcher
    return Row(
        name=plan.folder.parent.name,
        folder=f"{plan.folder.parent.name}/{plan.folder.name}",
        status="finished" if found else "failed" if reason else "unfinished",
        reason="" if found else one_line(reason or f"{done} of {total} evaluations are done"),
        command=command or str(read_record(plan.folder).get("command", "")),
        found=found,
        paper=paper,
        started_there=bool(
            paper and isinstance(settings, AnnealingSettings) and settings.start_from_paper
        ),
        num_pictures=search.use.pictures,
        has_report=REPORT_FILE in plan.folder.files(),
    )


def _paper(plan: Plan) -> Paper | None:
    settings, res = plan.config.model, str(plan.config.res)
    ratios, rewards = settings.paper_ratios.get(res), settings.paper_image_reward.get(res)
    return Paper(BlockRatios(*ratios), *rewards) if ratios and rewards else None


def rows_in(output: Storage) -> tuple[list[Row], str]:
    """Read the row of every search in an output folder, and the last grid's command or ''.

    What grid.json says of searches that never came to a folder, or why they failed, is kept.
    """
    known, command = _last_grid(output)
    rows = []
    for folder in runs_in(output):
        place = f"{folder.parent.name}/{folder.name}"
        earlier = known.pop(place, None)
        try:
            found = row(load_plan(str(folder)))
        except CRDiffError as error:
            found = Row(folder.parent.name, place, "failed", one_line(str(error)))
        if found.status == "unfinished" and earlier is not None and earlier.status == "failed":
            found = earlier
        rows.append(found)
    return _named([*rows, *known.values()]), command


def _last_grid(output: Storage) -> tuple[dict[str, Row], str]:
    """Return what grid.json says of searches that have not finished, and its command."""
    known: dict[str, Row] = {}
    try:
        raw = json.loads(output.read(TABLE_FILE) or b"{}")
        for each in raw.get("cells", []):
            if each["status"] != "finished" and each["folder"].count("/") == 1:
                name, status = each["folder"].partition("/")[0], each["status"]
                is_failed: Literal["failed", "unfinished"]
                is_failed = "failed" if status == "failed" else "unfinished"
                text = str(each["reason"]), str(each["command"])
                known[each["folder"]] = Row(name, each["folder"], is_failed, *text)
        return known, str(raw.get("command", ""))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return known, ""  # It is not ours, or torn.


def _named(rows: Sequence[Row]) -> list[Row]:
    """Name the searches by their cells, and by themselves where a cell has several."""
    names = name_cells([each.folder for each in rows])
    return [Row(**{**vars(each), "name": name}) for each, name in zip(rows, names, strict=True)]


def name_cells(folders: Sequence[str]) -> list[str]:
    """Name each search by its cell, MODEL_RES, or by its folder where the cell has several."""
    cells = [folder.partition("/")[0] for folder in folders]
    count = Counter(cells)
    return [
        cell if count[cell] == 1 else folder for cell, folder in zip(cells, folders, strict=True)
    ]


# --- the three files -------------------------------------------------------------------------


def write_grid(output: Storage, rows: Sequence[Row], command: str) -> Storage:
    """Write report, JSON and Markdown into the output folder; return the report's place.

    Raises StorageError if they cannot be written.
    """
    rows = _named(rows)
    raw = {
        "command": command,
        "paper": PAPER_NOTE,
        "cells": [each.as_dict() for each in rows],
    }
    output.write(TABLE_FILE, (json.dumps(raw, indent=2) + "\n").encode())
    output.write(MARKDOWN_FILE, _markdown(rows, command).encode())
    output.write(GRID_FILE, _html(rows, command))
    return output / GRID_FILE


class Table(NamedTuple):
    """A table's head and rows, without the columns that say nothing."""

    head: list[str]
    rows: list[list[str]]

    @classmethod
    def of(cls, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
        """Leave out what is empty in every row, as the paper's figures for cells not its own."""
        shown = [number for number in range(len(head)) if any(each[number] for each in rows)]
        return cls([head[n] for n in shown], [[each[n] for n in shown] for each in rows])


_RATIOS_HEAD = ("Model", "Resolution", "r_down", "r_mid", "r_up", "k", "paper: down / mid / up")
_REWARDS_HEAD = (
    *("Model", "Resolution", "Verdict", "Reward", "Dense", "CR-Diff", "Difference"),
    *(
        "95% interval",
        "On",
        "k",
        "paper: dense",
        "paper: pruned",
        "paper: CR-Diff",
        "paper: difference",
    ),
)


def ratios_table(rows: Sequence[Row]) -> Table:
    """Return a table in the shape of the paper's table 6, its own ratios beside."""
    table = [
        [
            *_first_columns(rows, each),
            *([f"{each.found.ratios[group]:.3f}" for group in GROUPS] if each.found else [""] * 3),
            f"{each.found.poa_weight:.3g}" if each.found else "",
            str(each.paper.ratios) if each.paper else "",
        ]
        for each in rows
    ]
    return Table.of(_RATIOS_HEAD, table)


def rewards_table(rows: Sequence[Row]) -> Table:
    """Return a table in the shape of the paper's table 1, its own rewards beside."""
    table = []
    for each in rows:
        found, paper, ours = each.found, each.paper, [""] * 5
        if found and found.comparison:
            versus = found.comparison
            ours = [f"{found.dense:.4f}", f"{found.cr_diff:.4f}", f"{versus.difference:+.4f}"]
            ours += [_interval(versus), versus.sample]
        theirs = [""] * 4
        if paper:
            theirs = [f"{value:.3f}" for value in (paper.dense, paper.pruned, paper.cr_diff)]
            theirs += [f"{paper.difference:+.3f}"]
        weight = f"{found.poa_weight:.3g}" if found else ""
        reward = found.reward if found else ""
        table.append([*_first_columns(rows, each), each.verdict, reward, *ours, weight, *theirs])
    return Table.of(_REWARDS_HEAD, table)


def _interval(comparison: Comparison) -> str:
    if comparison.low is None or comparison.high is None:
        return "none"
    return f"{comparison.low:+.4f} to {comparison.high:+.4f}"


def _first_columns(rows: Sequence[Row], each: Row) -> list[str]:
    several = sum((other.model, other.res) == (each.model, each.res) for other in rows) > 1
    return [each.model, f"{each.res} {each.search}" if several else each.res]


def markdown_table(table: Table) -> str:
    """Return a Markdown table; what the cells say is text, whatever it looks like."""
    head, rows = table
    lines = [head, ["---"] * len(head), *([_plain(cell) for cell in each] for each in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plain(text: str) -> str:
    for sign in "\\`*_{}[]<>#|&":
        text = text.replace(sign, f"\\{sign}")
    return text


def _markdown(rows: Sequence[Row], command: str) -> str:
    parts = [
        "# Grid of searches\n",
        "## Rewards, as in the paper's table 1\n",
        markdown_table(rewards_table(rows)),
        "## Best ratios, as in the paper's table 6\n",
        markdown_table(ratios_table(rows)),
        "".join(f"{note}\n\n" for note in _notes(rows)).strip() + "\n",
    ]
    if open_rows := [each for each in rows if not each.found]:
        parts.append("## Without a result\n")
        parts.append("".join(f"- {_plain(f'{e.name}: {_said(e)}')}\n" for e in open_rows))
    if command:
        parts.append("## Run it again\n")
        parts.append(f"    {one_line(command)}\n")
    return "\n".join(part for part in parts if part.strip())


def _said(each: Row) -> str:
    reason = each.reason[:_LONGEST_REASON]
    return f"{each.status}: {reason}" if reason else each.status


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = [
        "Difference: mean reward of CR-Diff - dense, paired by prompt and noise, on validation "
        "pictures by which nothing was chosen. Resolutions are height x width."
    ]
    versus = {e.name: e.found.comparison for e in rows if e.found and e.found.comparison}
    num_verdicts = sum(each.low is not None for each in versus.values())
    if num_verdicts > 1:
        notes.append(
            f"This table holds {num_verdicts} verdicts, each from a 95% interval of its own: "
            "where no cell differs from dense, one in 20 is a verdict by chance. Do not pick the "
            "best cell by its verdict; validate it again on other prompts (prompts.seed)."
        )
    notes += [f"{name}: {each.note}" for name, each in versus.items() if each.note]
    if any(each.paper for each in rows):
        notes.append(PAPER_NOTE)
    if any(each.started_there and each.found for each in rows):
        notes.append(_STARTED_THERE)
    return notes


# --- the page --------------------------------------------------------------------------------


def _html(rows: Sequence[Row], command: str) -> bytes:
    verdicts = Counter(each.verdict for each in rows)
    return render(
        "grid_report.html",
        rows=rows,
        verdicts=[(name, verdicts[name]) for name in _VERDICTS if verdicts[name]],
        colours=_VERDICTS,
        open_rows=[each for each in rows if not each.found],
        said=_said,
        differences=_differences(rows),
        ratios=_ratios(rows),
        ratios_table=ratios_table(rows),
        rewards_table=rewards_table(rows),
        notes=_notes(rows),
        command=command,
        files={"search": REPORT_FILE, "ratios": RATIOS_FILE, "table": TABLE_FILE},
    )


# Every verdict with its colour's class, best news first.
_VERDICTS: Mapping[str, str] = {
    "better": "better",
    "no difference shown": "neutral",
    "worse": "worse",
    "no verdict": "neutral",
    "not validated": "neutral",
    "failed": "worse",
    "unfinished": "neutral",
}
_OURS, _THEIRS = "#3b7dd8", "#d9822b"


def _differences(rows: Sequence[Row]) -> Markup | str:
    """Return the chart of every cell's difference with its interval; '' if there is none."""
    compared = [each for each in rows if each.found and each.found.comparison]
    if not compared:
        return ""
    versus = [each.found.comparison for each in compared if each.found and each.found.comparison]
    figure = Figure(
        Scatter(
            x=[each.difference for each in versus],
            y=[each.name for each in compared],
            # Where there is no interval, there is the point alone.
            error_x={
                "type": "data",
                "array": [0 if e.high is None else e.high - e.difference for e in versus],
                "arrayminus": [0 if e.low is None else e.difference - e.low for e in versus],
            },
            mode="markers",
            marker={"color": _OURS, "size": 9},
            name="ours, 95% interval",
        )
    )
    theirs = [(each.name, each.paper.difference) for each in compared if each.paper]
    if theirs:
        figure.add_trace(
            Scatter(
                x=[difference for _, difference in theirs],
                y=[name for name, _ in theirs],
                mode="markers",
                marker={"color": _THEIRS, "size": 10, "symbol": "diamond-open"},
                name="the paper's, on its prompts",
            )
        )
    figure.add_vline(x=0, line={"color": "#888888", "dash": "dot"})
    _lay_out(figure, "mean reward, CR-Diff - dense", len(compared))
    said = "; ".join(
        f"{each.name} {one.difference:+.4f}" for each, one in zip(compared, versus, strict=True)
    )
    return chart(figure, f"Difference in reward of each cell: {said}")


def _ratios(rows: Sequence[Row]) -> list[Markup]:
    """Return a chart of each block group's best ratios, ours and the paper's."""
    found = [each for each in rows if each.found]
    charts = []
    for group in GROUPS if found else ():
        figure = Figure(
            Scatter(
                x=[each.found.ratios[group] for each in found if each.found],
                y=[each.name for each in found],
                mode="markers",
                marker={"color": _OURS, "size": 9},
                name="ours",
            )
        )
        if theirs := [each for each in found if each.paper]:
            figure.add_trace(
                Scatter(
                    x=[each.paper.ratios[group] for each in theirs if each.paper],
                    y=[each.name for each in theirs],
                    mode="markers",
                    marker={"color": _THEIRS, "size": 10, "symbol": "diamond-open"},
                    name="the paper's",
                )
            )
        _lay_out(figure, f"r_{group}", len(found))
        figure.update_xaxes(range=[-0.02, 1.02])
        charts.append(chart(figure, f"Best ratio of the {group} blocks in each cell"))
    return charts


def _lay_out(figure: Figure, title: str, num_rows: int) -> None:
    figure.update_layout(
        height=130 + 32 * num_rows,
        margin={"l": 8, "r": 8, "t": 36, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        showlegend=True,
    )
    grid = {"gridcolor": "rgba(128,128,128,0.25)", "automargin": True, "zeroline": False}
    figure.update_xaxes(title=title, **grid)
    # The first cell on top.
    figure.update_yaxes(autorange="reversed", type="category", **grid)
