"""A discrete-event simulation of a search: the real searchers, workers that only take time."""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from ray.tune.search import Searcher

from crdiff_core.evaluation import Measurement
from crdiff_core.prompts import PromptSet, split_prompts
from crdiff_core.ratios import GROUPS
from search.annealing import DECIMALS
from search.budget import Budget
from search.evaluation_search import METRIC, EvaluationSearch
from search.ledger import SCHEMA, Ledger, Recipe
from search.searchers import AnnealingSearch
from search.space import Space

Array = NDArray[np.float64]

# Of a trial's time, as a share of it, roughly.
SPREAD = 0.25
RECIPE = Recipe(
    model="simulated",
    revision="1",
    height=24,
    width=40,
    dtype="float32",
    scheduler="none",
    num_steps=1,
    guidance_scale=1.0,
    poa_weight=1.5,
    reward="simulated",
    reward_version="1",
)


class Rewards(Protocol):
    """What is searched: a landscape or a surface."""

    bounds: tuple[tuple[float, float], ...]
    num_prompts: int
    best: float
    scale: float

    def rewards(self, points: Array) -> Array:
        """(n, 3) ratios -> (n, num_prompts)."""


@dataclass
class Course:
    """How a search went, in steps: a row for each time that its best became better.

    time:     in rounds, the mean time of one evaluation on one worker.
    pictures: rendered until then.
    regret:   of the best evaluation, in units of the landscape's scale.
    makespan: when the last evaluation that counts was done, in rounds.
    num_pictures, num_steps: all that were rendered; evaluations that counted.
    """

    time: list[float] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    regret: list[float] = field(default_factory=list)
    makespan: float = 0.0
    num_pictures: int = 0
    num_steps: int = 0


class MemoryLedger(Ledger):
    """A ledger that neither reads nor writes a file."""

    def __init__(self) -> None:
        super().__init__(Path())

    def table(self) -> pa.Table:
        return SCHEMA.empty_table()

    def _write(self, table: pa.Table) -> None:
        pass


# --- what a worker is asked to do ----------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What a worker draws: these ratios, on the prompts of these numbers."""

    name: str
    ratios: dict[str, float]
    batch: Sequence[int]

    def rewards(self, rewards: Rewards) -> list[float]:
        """One reward for each prompt of the batch."""
        point = np.array([[self.ratios[group] for group in GROUPS]])
        found: list[float] = rewards.rewards(point)[0, list(self.batch)].tolist()
        return found


class WholeEvaluations:
    """A searcher driven directly: a trial is an evaluation on all the prompts.

    What has been rendered is known, and answered at once, as by the ledger.
    """

    def __init__(self, searcher: Searcher, rewards: Rewards) -> None:
        self.searcher = searcher
        self._rewards = rewards
        self._numbers = itertools.count()
        self._means: dict[tuple[float, ...], float] = {}
        self._num_steps = 0

    def suggest(self) -> Trial | str | None:
        """Return what to draw next, None if there is nothing now, or FINISHED."""
        while True:
            name = f"trial{next(self._numbers)}"
            suggested = self.searcher.suggest(name)
            if suggested is None or suggested == Searcher.FINISHED:
                return suggested
            ratios = {group: round(suggested[group], DECIMALS) for group in GROUPS}
            trial = Trial(name, ratios, range(self._rewards.num_prompts))
            if tuple(ratios.values()) not in self._means:
                return trial
            self._report(trial)

    def complete(self, trial: Trial) -> None:
        """Report what a trial gave."""
        mean = statistics.fmean(trial.rewards(self._rewards))
        self._means[tuple(trial.ratios.values())] = mean
        self._report(trial)

    def _report(self, trial: Trial) -> None:
        result = {METRIC: self._means[tuple(trial.ratios.values())]}
        self.searcher.on_trial_complete(trial.name, result)
        self._num_steps += 1

    def progress(self) -> tuple[int, float]:
        """How many evaluations count, and the best mean reward among them."""
        return _committed(self.searcher) or (
            self._num_steps,
            max(self._means.values(), default=-np.inf),
        )


class PromptBatches:
    """An EvaluationSearch: a trial is one batch of an evaluation's prompts.

    It begins and ends with the search itself: there are no pictures of the baseline, which is
    answered at once, of the re-ranking and of the validation.
    """

    def __init__(self, searcher: Searcher, rewards: Rewards, batch_size: int) -> None:
        self.searcher = searcher
        self._rewards = rewards
        self._numbers = itertools.count()
        space = Space(dict(zip(GROUPS, rewards.bounds, strict=True)), RECIPE.poa_weight)
        self.search = EvaluationSearch(
            searcher,
            space=space,
            prompt_sets=_prompt_sets(rewards.num_prompts),
            recipe=RECIPE,
            ledger=MemoryLedger(),
            budget=Budget(steps=1_000_000),
            batch_size=batch_size,
            race=getattr(searcher, "race", None),
        )

    def suggest(self) -> Trial | str | None:
        """Return what to draw next, None if there is nothing now, or FINISHED."""
        while True:
            name = f"trial{next(self._numbers)}"
            suggested = self.search.suggest(name)
            if suggested is None:
                return None
            if suggested == Searcher.FINISHED or suggested["prompts"] != "search":
                return str(Searcher.FINISHED)
            trial = Trial(name, suggested["ratios"], suggested["batch"])
            if any(trial.ratios.values()):
                return trial
            self._report(trial, [0.0] * len(trial.batch))

    def complete(self, trial: Trial) -> None:
        """Report what a trial gave."""
        self._report(trial, trial.rewards(self._rewards))

    def _report(self, trial: Trial, found: list[float]) -> None:
        seconds = {"render": float(len(found))}
        measured = Measurement(tuple(found), trial.ratios, seconds, len(found))
        self.search.on_trial_complete(trial.name, {"measured": measured})

    def progress(self) -> tuple[int, float]:
        """How many steps were taken, and the best mean reward of one that lost no race."""
        steps = self.search.steps
        found = [step.reward for step in steps if step.reward is not None and not step.lost_race]
        return len(steps), max(found, default=-np.inf)


def _committed(searcher: Searcher) -> tuple[int, float] | None:
    """Return a chain's steps and its best reward; None: it is no chain."""
    if not isinstance(searcher, AnnealingSearch):
        return None
    rewards = [each.seen.reward for each in searcher.commits]
    found = [reward for reward in rewards if reward is not None]
    return len(searcher.commits), max(found, default=-np.inf)


def _prompt_sets(num_prompts: int) -> dict[str, PromptSet]:
    sizes = {"search": num_prompts, "rerank": 1, "validation": 2}
    texts = [f"prompt {i}" for i in range(sum(sizes.values()))]
    return split_prompts(texts, sizes, 0, "here")


# --- the simulation ------------------------------------------------------------------------------


def simulate(
    work: WholeEvaluations | PromptBatches,
    rewards: Rewards,
    num_workers: int,
    seed: int,
    max_pictures: float = math.inf,
) -> Course:
    """Run a search to its end on workers that each take a random time for a trial.

    A worker that is free asks for a trial; if there is none, again when another is done. A
    trial's time is lognormal with a mean of its share of an evaluation's pictures, and a function
    of the seed and its number alone.
    """
    course = Course()
    numbers = itertools.count()
    running: list[tuple[float, int, Trial]] = []
    now, finished, best = 0.0, False, -np.inf
    while True:
        finished = finished or course.num_pictures >= max_pictures
        while not finished and len(running) < num_workers:
            trial = work.suggest()
            if trial is None:
                break
            if not isinstance(trial, Trial):
                finished = True
                break
            number = next(numbers)
            share = len(trial.batch) / rewards.num_prompts
            heapq.heappush(running, (now + share * _rounds(seed, number), number, trial))
        if not running:
            course.num_steps = work.progress()[0]
            return course
        now, _, trial = heapq.heappop(running)
        work.complete(trial)
        course.num_pictures += len(trial.batch)
        num_steps, best_now = work.progress()
        if num_steps > course.num_steps:
            course.num_steps, course.makespan = num_steps, now
        if best_now > best:
            best = best_now
            course.time.append(now)
            course.pictures.append(course.num_pictures)
            course.regret.append((rewards.best - best) / rewards.scale)


def _rounds(seed: int, number: int) -> float:
    rng = np.random.default_rng([seed, number])
    return float(rng.lognormal(-(SPREAD**2) / 2, SPREAD))
