"""A family of synthetic landscapes: several optima, a cliff, and prompts that do not agree.

A member is known by its number. Those below 1000 are the benchmark's; tune on 1000 and above, so
that no setting was chosen on what it is measured with.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]

NUM_PROMPTS = 64
NUM_DIMENSIONS = 3
LOW, HIGH = 0.1, 0.8
FIRST_FOR_TUNING = 1000
# Waves that make up the prompts' own preferences, and over which distance they change: some
# slowly, and some so fast that points side by side differ, as pictures do when a mask changes.
NUM_WAVES = 48
LENGTHS = (0.3, 0.03)
SHARES = (0.9, 0.3)


class Surface:
    """Each prompt's reward as a smooth function of three ratios.

    The mean over the prompts is a sum of 2 to 5 anisotropic bumps that falls off a cliff where
    too much is pruned, times a factor of 0.02 to 2, plus an offset: no searcher can know the
    reward's unit beforehand. Each prompt has a level and a random field of its own, which vanish
    on average, so that a difference between near points is far less noisy than a reward.

    bounds: (low, high) of each ratio.
    best:   the largest mean reward within the bounds.
    scale:  best minus the median of random points: regrets are comparable in units of it.
    """

    num_prompts = NUM_PROMPTS
    bounds = ((LOW, HIGH),) * NUM_DIMENSIONS

    def __init__(self, number: int) -> None:
        rng = np.random.default_rng([20_605, number])
        num_bumps = int(rng.integers(2, 6))
        self.unit = float(10 ** rng.uniform(np.log10(0.02), np.log10(2)))
        self.offset = float(rng.uniform(-1, 1))
        self._centres = rng.uniform(LOW, HIGH, (num_bumps, NUM_DIMENSIONS))
        self._widths = rng.uniform(0.08, 0.35, (num_bumps, NUM_DIMENSIONS))
        # One is the highest, the others near enough to mislead.
        self._heights = np.append(1.0, rng.uniform(0.4, 0.9, num_bumps - 1))
        self._weights = rng.dirichlet([3.0] * NUM_DIMENSIONS)
        self._edge = float(rng.uniform(0.5, 0.7))
        self._noise = self.unit * float(rng.uniform(0.2, 0.8))

        waves = (len(LENGTHS), NUM_WAVES)
        self._frequencies = rng.normal(size=(*waves, NUM_DIMENSIONS))
        self._frequencies /= np.reshape(LENGTHS, (-1, 1, 1))
        self._phases = rng.uniform(0, 2 * np.pi, waves)
        self._amplitudes = rng.normal(size=(*waves, NUM_PROMPTS)) * np.sqrt(2 / NUM_WAVES)
        self._amplitudes *= np.reshape(SHARES, (-1, 1, 1))
        self._amplitudes -= self._amplitudes.mean(-1, keepdims=True)
        levels = rng.normal(size=NUM_PROMPTS)
        self._levels = levels - levels.mean()

        self.best_point, self.best = self._locate(rng)
        points = rng.uniform(LOW, HIGH, (1024, NUM_DIMENSIONS))
        self.scale = self.best - float(np.median(self.means(points)))

    def means(self, points: Array) -> Array:
        """Return the mean reward of (n, 3) ratios: (n,)."""
        away = (points[:, None] - self._centres) / self._widths
        bumps = np.exp(-0.5 * (away**2).sum(-1)) @ self._heights
        cliff = 1 / (1 + np.exp(-(points @ self._weights - self._edge) / 0.03))
        shape: Array = self.offset + self.unit * (bumps - cliff)
        return shape

    def rewards(self, points: Array) -> Array:
        """Return the rewards of (n, 3) ratios: (n, num_prompts)."""
        # (lengths, n, waves) @ (lengths, waves, num_prompts)
        waves = np.cos(points @ self._frequencies.swapaxes(1, 2) + self._phases[:, None])
        fields = (waves @ self._amplitudes).sum(0)
        found: Array = self.means(points)[:, None] + self._noise * (self._levels + fields)
        return found

    def _locate(self, rng: np.random.Generator) -> tuple[tuple[float, ...], float]:
        """Climb from each bump and from the best of many random points."""
        points = rng.uniform(LOW, HIGH, (2000, NUM_DIMENSIONS))
        starts = points[np.argsort(-self.means(points))[:10]]
        tops = [
            minimize(
                lambda point: -float(self.means(point[None])[0] - self.offset) / self.unit,
                start,
                method="L-BFGS-B",
                bounds=self.bounds,
            ).x
            for start in (*starts, *self._centres)
        ]
        means = self.means(np.array(tops))
        return tuple(tops[int(means.argmax())].tolist()), float(means.max())


@cache
def surface(number: int) -> Surface:
    """Return a member of the family, made once."""
    return Surface(number)
