"""Racing: whether an evaluation, part of its prompts drawn, can still reach what it has to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Race:
    """A paired sequential test that stops hopeless evaluations, and never accepts one early.

    alpha:  chance, over all looks of one evaluation, to stop one that would have passed.
    stride: prompts between two looks.

    Prompts come in one fixed random order, so those drawn are a random sample of all, and the mean
    over all is estimated from them with Student's t and the finite-population correction. alpha is
    shared evenly among the looks (Bonferroni).
    Source: the racing of Maron and Moore, Hoeffding Races (NeurIPS 1993), with paired differences.
    """

    alpha: float = 0.05
    stride: int = 8

    def lost_at(
        self, rewards: Sequence[float], incumbent: Sequence[float], min_gain: float
    ) -> int | None:
        """Return after how many prompts the race was lost; None: not with what is known.

        rewards:   of the first prompts, in their fixed order.
        incumbent: of all prompts, in the same order.
        min_gain:  gain in the mean over all prompts that has to be exceeded.
        The verdict depends on the rewards alone: not on when they came, nor on how many came
        together.
        """
        num_prompts = len(incumbent)
        looks = range(self.stride, num_prompts, self.stride)
        for num_drawn in looks:
            if num_drawn > len(rewards):
                break
            if self._bound(rewards[:num_drawn], incumbent, len(looks)) < min_gain:
                return num_drawn
        return None

    def _bound(
        self, rewards: Sequence[float], incumbent: Sequence[float], num_looks: int
    ) -> float:
        """Return the upper confidence bound of the gain over all prompts."""
        num_drawn, num_prompts = len(rewards), len(incumbent)
        gains = [a - b for a, b in zip(rewards, incumbent, strict=False)]
        mean = statistics.fmean(gains)
        # One more observation, as far off as rewards lie apart: few equal gains prove little.
        variance = sum((gain - mean) ** 2 for gain in gains) + statistics.pvariance(incumbent)
        error = math.sqrt(variance / num_drawn / num_drawn * (1 - num_drawn / num_prompts))
        return mean + _quantile(1 - self.alpha / num_looks, num_drawn) * error


@lru_cache
def _quantile(level: float, degrees: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(level, degrees))


def estimate(rewards: Sequence[float], incumbent: Sequence[float]) -> float:
    """Estimate the mean over all prompts of an evaluation from its first ones.

    The incumbent's mean plus the mean gain over it, which prompts that are hard for both do not
    distort.
    """
    gains = [a - b for a, b in zip(rewards, incumbent, strict=False)]
    return statistics.fmean(incumbent) + statistics.fmean(gains)
