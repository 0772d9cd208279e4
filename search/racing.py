"""Racing: whether an evaluation, part of its prompts drawn, can still reach what it has to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Of what a bet could lose at most, the fraction that is staked.
_STAKE = 0.75


@dataclass(frozen=True)
class Expectation:
    """What an evaluation's rewards are expected to be before they are drawn.

    rewards:  one for each prompt, in their fixed order.
    variance: how far off they may be, squared; it counts as much as one prompt drawn.
    highest:  reward that no picture is thought to exceed; one that is drawn and does raises it.
    """

    rewards: tuple[float, ...]
    variance: float
    highest: float

    @classmethod
    def of_incumbent(cls, rewards: Sequence[float]) -> Expectation:
        """Those of the incumbent, which rewards may miss by as much as they lie apart."""
        return cls(tuple(rewards), statistics.pvariance(rewards), max(rewards))


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

    Prompts come in one fixed random order, so each reward is one of those not yet drawn, at
    random. The race is a game: on each it bets that the reward falls short of what the ones not
    drawn must have on average for the evaluation to pass. If it does pass, no betting gains on
    average, so what is staked grows 1 / alpha times with a chance of alpha at most (Ville's
    inequality), however skewed the rewards are and however often one looks. The odds depend on
    how high a reward can be. Rewards have no known limit, so it is the highest seen: where
    pictures that are not drawn yet exceed it, alpha is not promised.
    Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting
    (JRSS B 2024), section 5, sampling without replacement; the racing of Maron and Moore,
    Hoeffding Races (NeurIPS 1993).
    """

    alpha: float = 0.05
    stride: int = 8

    def lost(
        self, rewards: Sequence[float], expectation: Expectation, needed: float
    ) -> Lost | None:
        """Return how the race was lost; None: not with what is known.

        rewards: of the first prompts, in their fixed order.
        needed:  mean over all prompts that has to be exceeded.
        The outcome depends on these alone: not on when rewards came, nor on how many came
        together.
        """
        num_prompts = len(expectation.rewards)
        drawn = np.array(rewards[: num_prompts - 1], dtype=float)
        if len(drawn) < self.stride:
            return None
        expected = np.array(expectation.rewards)
        # Bets are on how much better than expected a reward is. Where little is expected much can
        # be gained, which would make all bets small: there, the lower quartile is expected.
        expected = np.maximum(expected, np.sort(expected)[num_prompts // 4])
        gains = drawn - expected[: len(drawn)]
        before = np.concatenate([[0.0], np.cumsum(gains)[:-1]])
        num_left = num_prompts - np.arange(len(drawn))
        # Mean gain of the prompts not drawn yet, if the evaluation just passes.
        level = (num_prompts * needed - expected.sum() - before) / num_left
        highest = np.maximum.accumulate([expectation.highest, *drawn[:-1]])
        lowest = np.minimum.accumulate(expected[::-1])[::-1][: len(drawn)]
        # How far above it one gain can be. Nothing: it can no longer be reached.
        room = np.maximum(highest - lowest - level, 1e-9)
        factors = np.maximum(1 - _STAKE * (gains - level) / room, np.finfo(float).tiny)
        growth = np.cumsum(np.log(factors))
        for num_drawn in range(self.stride, len(drawn) + 1, self.stride):
            if growth[num_drawn - 1] >= -math.log(self.alpha):
                found = self._extend(rewards[:num_drawn], expectation)
                if found.mean < needed:
                    return found
        return None

    def _extend(self, drawn: Sequence[float], expectation: Expectation) -> Lost:
        """Estimate the rewards of all prompts from those drawn: the rest shift as these did.

        This is the difference estimator of survey sampling, with its finite-population error.
        """
        expected = expectation.rewards
        num_drawn, num_prompts = len(drawn), len(expected)
        surprises = [a - b for a, b in zip(drawn, expected, strict=False)]
        shift = statistics.fmean(surprises)
        # One more surprise, as large as was to be expected: few equal ones prove little.
        variance = sum((each - shift) ** 2 for each in surprises) + expectation.variance
        error = math.sqrt(variance / num_drawn / num_drawn * (1 - num_drawn / num_prompts))
        others = (each + shift for each in expected[num_drawn:])
        return Lost(num_drawn, (*drawn, *others), error)
