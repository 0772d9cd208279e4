"""Baselines that any searcher must beat: Optuna's samplers and a grid, as ray.tune searchers."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from search.annealing import DECIMALS

Point = tuple[float, ...]

_SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed),
    # Prompts and noise are fixed, so an objective says the same again.
    "gp": lambda seed: GPSampler(seed=seed, deterministic_objective=True),
    "cmaes": lambda seed: CmaEsSampler(seed=seed),
    # Without scrambling the seed has no say, and the second point is the corner of low bounds.
    "qmc": lambda seed: QMCSampler(seed=seed, scramble=True),
    "random": lambda seed: RandomSampler(seed=seed),
}
BASELINES = (*_SAMPLERS, "grid")


def baseline(
    name: str,
    space: Mapping[str, tuple[float, float]],
    seed: int = 0,
    metric: str = "reward",
    mode: str = "max",
    num_evaluations: int = 120,
) -> Searcher:
    """Return the baseline of that name, one of BASELINES.

    space:           (low, high) of each parameter; it stays within them.
    seed:            equal seeds and results give equal suggestions; the grid has no use for it.
    metric, mode:    what trials report, and whether "max" or "min" is better.
    num_evaluations: suggestions in all, without points that were evaluated before.
    Raises ValueError if any of these makes no sense.

    The samplers keep Optuna's defaults, which leave enough of 60 to 120 evaluations in three
    dimensions: tpe and gp draw at random until 10 evaluations have succeeded, qmc and cmaes
    until one has; a generation of cmaes has 7 points, and it learns from a generation at a time,
    of its own points alone.
    """
    if name not in BASELINES:
        raise ValueError(f"there is no baseline {name!r}: choose one of {', '.join(BASELINES)}")
    if mode not in ("max", "min"):
        raise ValueError(f"mode is {mode!r}: choose max or min")
    if not space:
        raise ValueError("space is empty: name at least one parameter and its (low, high)")
    for parameter, (low, high) in space.items():
        if not low < high:
            raise ValueError(f"space of {parameter} is ({low}, {high}): give low < high")
    if num_evaluations < 1:
        raise ValueError(f"num_evaluations is {num_evaluations}: give at least 1")
    if name == "grid":
        return GridSearch(space, metric, mode, num_evaluations)
    # They say on standard error whatever they do, and how they fare inside.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = _SAMPLERS[name](seed)
    return SamplerSearch(space, sampler, metric, mode, num_evaluations)


class SamplerSearch(OptunaSearch):  # type: ignore[misc]
    """An Optuna sampler that ends, and that takes whatever a trial may report.

    A trial that failed, or whose result is missing or not finite, is a failed trial to Optuna,
    which samplers pass over. Only final results count. Results for unknown or finished trials
    are ignored.
    """

    def __init__(
        self,
        space: Mapping[str, tuple[float, float]],
        sampler: BaseSampler,
        metric: str,
        mode: str,
        num_evaluations: int,
    ) -> None:
        distributions = {
            name: optuna.distributions.FloatDistribution(low, high)
            for name, (low, high) in space.items()
        }
        super().__init__(distributions, metric=metric, mode=mode, sampler=sampler)
        self._bounds = dict(space)
        self._num_left = num_evaluations
        self._pending: set[str] = set()

    def suggest(self, trial_id: str) -> dict[str, float] | str:
        """Return the sampler's next suggestion; FINISHED after the last."""
        if self._num_left == 0:
            return str(Searcher.FINISHED)
        self._num_left -= 1
        self._pending.add(trial_id)
        suggested: dict[str, float] = super().suggest(trial_id)
        return suggested

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: only final results count."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the sampler how a pending trial ended."""
        if trial_id not in self._pending:
            return
        self._pending.remove(trial_id)
        value = None if error or not result else result.get(self.metric)
        if value is None or not math.isfinite(value):
            super().on_trial_complete(trial_id, error=True)
        else:
            super().on_trial_complete(trial_id, {self.metric: float(value)})

    def add_evaluated_point(
        self,
        parameters: Mapping[str, float],
        value: float | None,
        error: bool = False,
        pruned: bool = False,
        intermediate_values: list[float] | None = None,
    ) -> None:
        """Tell the sampler of an evaluation made elsewhere; outside the space it is ignored.

        parameters: may have more than the space names.
        Raises ValueError if one that the space names is missing.
        """
        point = _point(parameters, self._bounds)
        pairs = zip(point, self._bounds.values(), strict=True)
        if not all(low <= x <= high for x, (low, high) in pairs):
            return
        if value is None or not math.isfinite(value):
            value = None
            error = error or not pruned
        named = dict(zip(self._bounds, point, strict=True))
        super().add_evaluated_point(named, value, error, pruned, intermediate_values)


class GridSearch(Searcher):  # type: ignore[misc]
    """A full grid over the space, coarse to fine, of as many points as num_evaluations allow.

    Each parameter takes k values at equal distances, both bounds among them, where k is the
    largest with k ** dimensions <= num_evaluations. The first m ** dimensions points are the full
    grid of m values each, so the corners come first. Points evaluated before are left out.
    """

    def __init__(
        self,
        space: Mapping[str, tuple[float, float]],
        metric: str,
        mode: str,
        num_evaluations: int,
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        count = 1
        while (count + 1) ** len(space) <= num_evaluations:
            count += 1
        if count < 2:
            raise ValueError(
                f"num_evaluations {num_evaluations} is less than the {2 ** len(space)} corners "
                f"of the grid: raise it"
            )
        self._bounds = dict(space)
        order = _coarse_to_fine(count)
        values = [np.linspace(low, high, count)[order].tolist() for low, high in space.values()]
        ranks = sorted(
            product(range(count), repeat=len(space)), key=lambda rank: (max(rank), rank)
        )
        self._todo: list[Point] = [
            tuple(values[i][j] for i, j in enumerate(rank)) for rank in ranks
        ]

    def suggest(self, trial_id: str) -> dict[str, float] | str:
        """Return the grid's next point; FINISHED after the last."""
        if not self._todo:
            return str(Searcher.FINISHED)
        return dict(zip(self._bounds, self._todo.pop(0), strict=True))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: a grid does not depend on results."""

    def add_evaluated_point(
        self,
        parameters: Mapping[str, float],
        value: float | None,
        error: bool = False,
        pruned: bool = False,
        intermediate_values: list[float] | None = None,
    ) -> None:
        """Leave out a point that was evaluated elsewhere, however that ended.

        parameters: compared to DECIMALS decimals; may have more than the space names.
        Raises ValueError if one that the space names is missing.
        """
        known = _rounded(_point(parameters, self._bounds))
        self._todo = [point for point in self._todo if _rounded(point) != known]

    def save(self, checkpoint_path: str) -> None:
        """Write the points left as JSON."""
        Path(checkpoint_path).write_text(json.dumps(self._todo), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Read what `save` wrote."""
        raw = json.loads(Path(checkpoint_path).read_text(encoding="utf-8"))
        self._todo = [tuple(point) for point in raw]


def _coarse_to_fine(count: int) -> list[int]:
    """Order range(count) so that each is as far as can be from those before: 0, the last, ..."""
    order = [0, count - 1]
    while len(order) < count:
        order.append(max(range(count), key=lambda i: min(abs(i - j) for j in order)))
    return order


def _point(parameters: Mapping[str, float], space: Mapping[str, Any]) -> Point:
    missing = [name for name in space if name not in parameters]
    if missing:
        raise ValueError(
            f"the evaluated point {dict(parameters)} has no {', '.join(missing)}: "
            f"name every parameter of the space"
        )
    return tuple(float(parameters[name]) for name in space)


def _rounded(point: Point) -> Point:
    return tuple(round(x, DECIMALS) for x in point)
