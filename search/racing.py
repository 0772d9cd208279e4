"""Racing: whether an evaluation, part of its prompts drawn, can still reach what it has to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit


@dataclass(frozen=True)
class Expectation:
    """What an evaluation's rewards are expected to be before they are drawn.

    rewards:  one for each prompt, in their fixed order.
    variance: how far off they may be, squared; it counts as much as one prompt drawn.
    """

    rewards: tuple[float, ...]
    variance: float

    @classmethod
    def of_incumbent(cls, rewards: Sequence[float]) -> Expectation:
        """Those of the incumbent, which rewards may miss by as much as they lie apart."""
        return cls(tuple(rewards), statistics.pvariance(rewards))


@dataclass(frozen=True)
class Lost:
    """A lost race.

    num_drawn: prompts after which it was lost.
    rewards:   of all prompts: those drawn, and estimates of the others.
    error:     standard error of their mean.
    """

    num_drawn: int
    rewards: tuple[float, ...]
    error: float

    @property
    def mean(self) -> float:
        """Estimate of the mean over all prompts."""
        return statistics.fmean(self.rewards)


@dataclass(frozen=True)
class Race:
    """A paired sequential test that stops hopeless evaluations, and never accepts one early.

    alpha:  chance, over all looks of one evaluation, to stop one that would have passed.
    stride: prompts between two looks.

    Prompts come in one fixed random order, so those drawn are a random sample of all. The mean
    over all is what was expected plus the mean surprise of those drawn (the difference estimator
    of survey sampling), with Student's t and the finite-population correction. alpha is shared
    evenly among the looks (Bonferroni).
    Source: the racing of Maron and Moore, Hoeffding Races (NeurIPS 1993), with paired differences.
    """

    alpha: float = 0.05
    stride: int = 8

    def lost(
        self, rewards: Sequence[float], expectation: Expectation, needed: float
    ) -> Lost | None:
        """Return how the race was lost; None: not with what is known.

        rewards: of the first prompts, in their fixed order.
        needed:  mean over all prompts that has to be exceeded.
        The verdict depends on these alone: not on when rewards came, nor on how many came
        together.
        """
        num_prompts = len(expectation.rewards)
        looks = range(self.stride, num_prompts, self.stride)
        for num_drawn in looks:
            if num_drawn > len(rewards):
                break
            found = self._extend(rewards[:num_drawn], expectation)
            level = 1 - self.alpha / len(looks)
            if found.mean + float(stdtrit(num_drawn, level)) * found.error < needed:
                return found
        return None

    def _extend(self, drawn: Sequence[float], expectation: Expectation) -> Lost:
        """Estimate the rewards of all prompts from those drawn."""
        expected = expectation.rewards
        num_drawn, num_prompts = len(drawn), len(expected)
        surprises = [a - b for a, b in zip(drawn, expected, strict=False)]
        shift = statistics.fmean(surprises)
        # One more surprise, as large as was to be expected: few equal ones prove little.
        variance = sum((each - shift) ** 2 for each in surprises) + expectation.variance
        error = math.sqrt(variance / num_drawn / num_drawn * (1 - num_drawn / num_prompts))
        others = (each + shift for each in expected[num_drawn:])
        return Lost(num_drawn, (*drawn, *others), error)
