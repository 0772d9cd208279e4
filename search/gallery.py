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
    """One picture beside others of its prompt.

    missing: why there is none; note: its reward.
    """

    title: str
    alt: str
    uri: str | None
    missing: str
    note: str
    is_small: bool


class Column(NamedTuple):
    """An evaluation whose pictures are shown, with its rewards by prompt."""

    title: str
    evaluation: Evaluation
    rewards: Mapping[Prompt, float]

    @classmethod
    def of(cls, title: str, evaluation: Evaluation) -> Column:
        """Take the rewards of an evaluation, if it has all of them."""
        known = evaluation.is_complete and evaluation.failure is None
        prompts = evaluation.prompts.prompts if known else ()
        rewards = evaluation.rewards if known else ()
        return cls(title, evaluation, dict(zip(prompts, rewards, strict=True)))


class Group(NamedTuple):
    """Prompts under one heading: of each its text, its seed and its cells."""

    title: str
    means: str
    rows: list[tuple[Prompt, list[Cell]]]


def groups(plan: Plan) -> list[Group]:
    """Return the rows of pictures, by why they were chosen; none if none were kept."""
    if plan.config.report.pictures == 0:
        return []
    chosen, columns = _validation_columns(plan) or _search_columns(plan)
    pictures = Pictures(plan.folder.parent / "pictures")
    prompts = [prompt for some in chosen.values() for prompt in some]
    kept = {
        column.title: dict(zip(prompts, pictures.get(column.evaluation.key, prompts), strict=True))
        for column in columns
    }
    is_small = max(plan.recipe.height, plan.recipe.width) < _SMALL
    return [
        Group(
            title,
            _means(columns, some),
            [
                (
                    prompt,
                    [
                        _cell(column, columns[0], prompt, kept[column.title][prompt], is_small)
                        for column in columns
                    ],
                )
                for prompt in some
            ],
        )
        for title, some in chosen.items()
        if some
    ]


def _validation_columns(
    plan: Plan,
) -> tuple[dict[str, list[Prompt]], list[Column]] | None:
    """Return what a finished search drew of the telling prompts; None if there is none."""
    search = plan.search
    winner, dense = search.of("validation"), search.of("dense validation")
    if validated(plan) is None or winner is None or dense is None:
        return None
    gains = [a - b for a, b in zip(winner.rewards, dense.rewards, strict=True)]
    told = telling(gains, plan.config.report.pictures)
    prompts = winner.prompts.prompts
    titles = ("As they come", told.first), ("Gained most", told.gains), ("Lost most", told.losses)
    alone, resized = search.of("pruned alone"), search.of("resized")
    columns = [
        Column.of("Dense", dense),
        *([Column.of("Pruned alone (k = 1)", alone)] if alone else []),
        Column.of(f"CR-Diff (k = {winner.candidate.poa_weight:g})", winner),
    ]
    if resized:
        columns.append(Column.of(f"Dense at {resized.candidate.drawn_at}, resized", resized))
    return {title: [prompts[n] for n in numbers] for title, numbers in titles}, columns


def _search_columns(plan: Plan) -> tuple[dict[str, list[Prompt]], list[Column]]:
    """Return what there is of a search that has validated nothing."""
    dense, best = plan.search.of("dense"), next(iter(plan.search.candidates), None)
    columns = [Column.of("Dense", dense)] if dense else []
    columns += [Column.of("CR-Diff, best so far", best)] if best else []
    prompts = plan.prompt_sets["search"].prompts[:NUM_KEPT]
    return ({"The first search prompts": list(prompts)} if columns else {}), columns


def _means(columns: Sequence[Column], prompts: Sequence[Prompt]) -> str:
    parts = [
        f"{column.title} {statistics.fmean(column.rewards[p] for p in prompts):.4f}"
        for column in columns
        if all(prompt in column.rewards for prompt in prompts)
    ]
    return f"Mean reward of these {len(prompts)}: {', '.join(parts)}."


def _cell(
    column: Column, dense: Column, prompt: Prompt, picture: bytes | None, is_small: bool
) -> Cell:
    reward, level = column.rewards.get(prompt), dense.rewards.get(prompt)
    note = "" if reward is None else f"{reward:.4f}"
    if reward is not None and level is not None and column is not dense:
        note += f" ({reward - level:+.4f})"
    failure = column.evaluation.failure
    return Cell(
        title=column.title,
        alt=f"{column.title}: {prompt.text}",
        uri=None if picture is None else picture_uri(picture),
        missing=f"failed: {failure}" if failure else "not kept",
        note=note,
        is_small=is_small,
    )
