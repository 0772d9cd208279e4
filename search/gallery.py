"""The pictures of a report: the same prompts and noise, dense, pruned, CR-Diff and resized."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from crdiff_core.prompts import Prompt
from search.comparison import telling
from search.evaluations import NUM_KEPT, Evaluation
from search.export import validated
from search.page import picture_uri
from search.pictures import Pictures
from search.plan import Plan

# Pictures with a shorter longest side are enlarged without blurring them.
_SMALL = 256


@dataclass(frozen=True)
class Cell:
    """One picture of a row.

    uri:     of its bytes; None: there is none, and `missing` says why.
    note:    its reward, and how much more that is than the dense one's.
    """

    title: str
    alt: str
    uri: str | None
    missing: str
    note: str
    is_small: bool


class Group(NamedTuple):
    """Prompts that were chosen for one reason, each with its row of pictures."""

    title: str
    note: str
    rows: list[tuple[Prompt, list[Cell]]]


class _Column(NamedTuple):
    title: str
    evaluation: Evaluation

    @property
    def rewards(self) -> Mapping[Prompt, float]:
        if not self.evaluation.is_complete:  # Which prompts the rewards are of is not said.
            return {}
        return dict(zip(self.evaluation.prompts.prompts, self.evaluation.rewards, strict=True))


def groups(plan: Plan) -> list[Group]:
    """Return the rows of pictures by why they were chosen; none if none are kept."""
    if plan.config.report.pictures == 0:
        return []
    columns, chosen = _of_validation(plan) or _of_search(plan)
    pictures = Pictures(plan.folder.parent / "pictures")
    return [
        Group(title, note, _rows(plan, pictures, columns, prompts))
        for title, note, prompts in chosen
        if prompts and columns
    ]


# Title, note and prompts of each group.
_Chosen = list[tuple[str, str, list[Prompt]]]


def _of_validation(plan: Plan) -> tuple[list[_Column], _Chosen] | None:
    """Choose what a search drew for its report; None if it did not come so far."""
    search = plan.search
    winner, dense = search.of("validation"), search.of("dense validation")
    if validated(plan) is None or winner is None or dense is None:
        return None
    gains = [a - b for a, b in zip(winner.rewards, dense.rewards, strict=True)]
    told = telling(gains, plan.config.report.pictures)
    first, gained, lost = (
        [winner.prompts.prompts[number] for number in numbers] for numbers in told
    )
    alone, resized = search.of("pruned alone"), search.of("resized")
    columns = [_Column("Dense", dense)]
    columns += [_Column("Pruned alone", alone)] if alone else []
    columns.append(_Column(f"CR-Diff, k = {winner.candidate.poa_weight:.4g}", winner))
    if resized:
        columns.append(_Column(f"Dense at {resized.candidate.drawn_at}, resized", resized))
    others = f"of the other {len(gains) - len(first)} validation prompts"
    return columns, [
        ("As they come", f"The first validation prompts. {_means(columns, first)}", first),
        ("Where it gained most", f"The largest gains {others}.", gained),
        ("Where it lost most", f"The largest losses {others}.", lost),
    ]


def _of_search(plan: Plan) -> tuple[list[_Column], _Chosen]:
    """Choose of a search that has validated nothing: the dense model and the best so far."""
    dense, best = plan.search.of("dense"), next(iter(plan.search.candidates), None)
    columns = [_Column("Dense", dense)] if dense else []
    columns += [_Column("CR-Diff, best so far", best)] if best else []
    prompts = list(plan.prompt_sets["search"].prompts[:NUM_KEPT])
    return columns, [("As they come", "The first of the prompts that it searches with.", prompts)]


def _means(columns: Sequence[_Column], prompts: Sequence[Prompt]) -> str:
    means = [
        f"{column.title} {statistics.fmean(column.rewards[prompt] for prompt in prompts):.4f}"
        for column in columns
        if prompts and column.rewards
    ]
    return f"Mean rewards of these {len(prompts)}: {'; '.join(means)}."


def _rows(
    plan: Plan, pictures: Pictures, columns: Sequence[_Column], prompts: Sequence[Prompt]
) -> list[tuple[Prompt, list[Cell]]]:
    is_small = max(plan.recipe.height, plan.recipe.width) < _SMALL
    by_column = []
    for column in columns:
        cells = []
        # The dense one is not compared with itself.
        level = {} if column is columns[0] else columns[0].rewards
        kept = pictures.get(column.evaluation.key, prompts)
        for prompt, picture in zip(prompts, kept, strict=True):
            failure = column.evaluation.failure
            cells.append(
                Cell(
                    title=column.title,
                    alt=f"{column.title}: {prompt.text}",
                    uri=None if picture is None else picture_uri(picture),
                    missing=f"failed: {failure}" if failure else "not kept",
                    note=_note(column.rewards.get(prompt), level.get(prompt)),
                    is_small=is_small,
                )
            )
        by_column.append(cells)
    return [
        (prompt, list(row))
        for prompt, row in zip(prompts, zip(*by_column, strict=True), strict=True)
    ]


def _note(reward: float | None, dense: float | None) -> str:
    if reward is None:
        return ""
    return f"{reward:.4f}" if dense is None else f"{reward:.4f} ({reward - dense:+.4f})"
