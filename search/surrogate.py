"""A Gaussian process over the rewards so far, which says which of many points looks best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from threadpoolctl import ThreadpoolController

Array = NDArray[np.float64]
Point = tuple[float, ...]
Bounds = tuple[tuple[float, float], ...]

# Of the linear algebra, whose matrices are too small to gain from them: where the cores are taken,
# waiting for one another makes threads ten times slower.
_THREADS = ThreadpoolController()

LENGTHS = (0.1, 0.15, 0.2, 0.3, 0.5, 0.8)
"""Correlation lengths to choose from, in widths of the box."""
NOISES = (1e-4, 1e-2)
"""Variances of what no smooth surface explains, relative to the surface's own."""
LOWEST = -3.0
"""Lower rewards count as this, in (best - median) below the median: cliffs bend nothing."""


class Observation(NamedTuple):
    """What came of a point.

    reward:  None if it failed; error: the reward's standard error.
    stopped: its race was lost, and the reward is an estimate.
    """

    point: Point
    reward: float | None
    error: float = 0.0
    stopped: bool = False


def most_promising(
    candidates: Array,
    known: tuple[Observation, ...],
    pending: Sequence[Point],
    bounds: Bounds,
    exploration: float,
) -> Array:
    """Return the candidate with the highest upper bound; the first if no reward is known.

    candidates: (n, dimensions), in the unit cube; pending: points without a reward yet.
    """
    scored = {each.point for each in known if each.reward is not None}
    if not scored:
        first: Array = candidates[0]
        return first
    unknown = [p for p in (*(each.point for each in known), *pending) if p not in scored]
    with _THREADS.limit(limits=1):
        hopes = _fit(known, bounds).upper_bounds(candidates, to_unit(unknown, bounds), exploration)
    chosen: Array = candidates[int(np.argmax(hopes))]
    return chosen


def expect_rewards(
    known: Mapping[Observation, Sequence[float]],
    incumbent: Sequence[float],
    point: Point,
    bounds: Bounds,
) -> tuple[tuple[float, ...], float]:
    """Return what each prompt's reward will be at a point, going by others, and its variance.

    known:     what came of other points, and the rewards by prompt behind it.
    incumbent: rewards by prompt that are expected far from all of them.
    """
    with _THREADS.limit(limits=1):
        gains, variance = _fit(tuple(known), bounds).expect(
            to_unit([point], bounds), np.array(list(known.values())) - np.array(incumbent)
        )
    return tuple((gains + np.array(incumbent)).tolist()), variance


def to_unit(points: Sequence[Point], bounds: Bounds) -> Array:
    """Map points of the box into the unit cube: (n, dimensions)."""
    low, high = np.array(bounds).T
    unit: Array = (np.reshape(points, (-1, len(bounds))) - low) / (high - low)
    return unit


# Walking ahead asks for the same few again and again.
@lru_cache(maxsize=8)
def _fit(known: tuple[Observation, ...], bounds: Bounds) -> Surrogate:
    scored = [each for each in known if each.reward is not None]
    points, rewards, errors, _ = zip(*scored, strict=True)
    return Surrogate.fit(to_unit(points, bounds).tolist(), rewards, errors)


@dataclass(frozen=True)
class Surrogate:
    """A Gaussian process with a Matern 5/2 kernel, its mean and scale fitted too.

    Rewards are in units of (best - median) from the median, so multiplying all of them, or adding
    to all of them, changes no ranking. Source: Rasmussen and Williams (2006), sections 2.2, 5.4.
    """

    points: Array  # (n, dimensions), in the unit cube
    factor: Array  # (n, n), Cholesky factor of the correlations
    residual: Array  # (n,), factor^-1 (rewards - mean)
    length: float
    noise: float
    mean: float
    deviation: float

    @classmethod
    def fit(
        cls,
        points: Sequence[Sequence[float]],
        rewards: Sequence[float],
        errors: Sequence[float] | None = None,
    ) -> Surrogate:
        """Choose the length and noise of the greatest likelihood.

        points: (n, dimensions) in the unit cube, n >= 1; rewards: (n,), finite; errors: (n,),
        their standard errors, by default none.
        """
        places, values = np.array(points), np.array(rewards)
        values = values - np.median(values)
        unit, depth = values.max(), np.abs(values).max()
        if unit <= np.finfo(float).eps * depth:  # Rounding is no hill.
            unit = depth or 1.0
        values = np.maximum(values / unit, LOWEST)
        variances = np.zeros(len(values)) if errors is None else (np.array(errors) / unit) ** 2
        distances = _distances(places, places)
        choices = [
            cls._of(places, values, variances, distances, length, noise)
            for noise in NOISES
            for length in LENGTHS
        ]
        return max(choices, key=lambda choice: choice.likelihood)

    @classmethod
    def _of(
        cls,
        points: Array,
        values: Array,
        variances: Array,
        distances: Array,
        length: float,
        noise: float,
    ) -> Surrogate:
        correlations = _matern(distances / length) + np.diag(noise + variances)
        factor: Array = np.linalg.cholesky(correlations).astype(np.float64)
        both = np.stack([np.ones(len(points)), values], axis=1)
        ones, whitened = solve_triangular(factor, both, lower=True, check_finite=False).T
        mean = float(ones @ whitened / (ones @ ones))
        residual = whitened - mean * ones
        deviation = math.sqrt(float(residual @ residual) / len(points)) or 1.0
        return cls(points, factor, residual, length, noise, mean, deviation)

    @property
    def likelihood(self) -> float:
        """The log likelihood of the rewards, up to a constant."""
        return float(
            -len(self.points) * math.log(self.deviation) - np.log(np.diag(self.factor)).sum()
        )

    def upper_bounds(self, candidates: Array, pending: Array, exploration: float) -> Array:
        """Mean plus `exploration` standard deviations at each candidate.

        pending: points whose rewards are not known yet: they narrow the deviation, not the mean.
        Source: GP-BUCB, Desautels et al. (JMLR 2014), algorithm 1.
        """
        shared = self._whiten(candidates)
        means = self.mean + shared.T @ self.residual
        variances = 1.0 - np.einsum("ij,ij->j", shared, shared)
        if len(pending):
            of_pending = self._whiten(pending)
            within = _matern(_distances(pending, pending) / self.length)
            within = within - of_pending.T @ of_pending + self.noise * np.eye(len(pending))
            across = _matern(_distances(pending, candidates) / self.length) - of_pending.T @ shared
            known = np.linalg.solve(np.linalg.cholesky(within), across)
            variances = variances - np.einsum("ij,ij->j", known, known)
        deviations = self.deviation * np.sqrt(np.maximum(variances, 0.0))
        bounds: Array = means + exploration * deviations
        return bounds

    def expect(self, candidate: Array, table: Array) -> tuple[Array, float]:
        """Predict many things at once at a candidate, which are 0 where nothing is known.

        candidate: (1, dimensions); table: (n, m), what each of m things was at each point.
        Returns (m,), and how far off each may be, squared.
        Source: Rasmussen and Williams (2006), equations 2.25 and 2.26.
        """
        shared = self._whiten(candidate)[:, 0]
        whitened = solve_triangular(self.factor, table, lower=True, check_finite=False)
        unknown = max(0.0, 1.0 - float(shared @ shared)) + self.noise
        expected: Array = shared @ whitened
        return expected, unknown * float((whitened * whitened).mean())

    def _whiten(self, places: Array) -> Array:
        correlations = _matern(_distances(self.points, places) / self.length)
        whitened: Array = solve_triangular(
            self.factor, correlations, lower=True, check_finite=False
        )
        return whitened


def _distances(one: Array, other: Array) -> Array:
    squares = (one * one).sum(1)[:, None] + (other * other).sum(1) - 2.0 * one @ other.T
    distances: Array = np.sqrt(np.maximum(squares, 0.0))
    return distances


def _matern(scaled: Array) -> Array:
    root = math.sqrt(5.0) * scaled
    correlations: Array = (1.0 + root + root * root / 3.0) * np.exp(-root)
    return correlations
