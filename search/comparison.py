"""Compare two evaluations on the same prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from scipy.special import stdtrit


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two evaluations on the same prompts.

    difference: mean over prompts of (pruned - dense).
    low, high:  its 95% confidence interval, by the t distribution.
    """

    difference: float
    low: float
    high: float
    num_prompts: int

    @property
    def verdict(self) -> Literal["better", "no difference shown", "worse"]:
        """What the interval says in words."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"


class Telling(NamedTuple):
    """Prompts to look at, by number, none twice; the most telling gain and loss come first."""

    first: list[int]
    gains: list[int]
    losses: list[int]


def telling(gains: Sequence[float], count: int) -> Telling:
    """Choose so many prompts: half as they come, of the others the largest gains and losses.

    gains: of each prompt, pruned - dense.
    """
    first = list(range(min(math.ceil(count / 2), len(gains))))
    others = sorted(range(len(first), len(gains)), key=lambda number: gains[number])
    num_losses = (count - len(first)) // 2
    num_gains = count - len(first) - num_losses
    return Telling(
        first,
        gains=[number for number in reversed(others) if gains[number] > 0][:num_gains],
        losses=[number for number in others if gains[number] < 0][:num_losses],
    )


def compare(rewards: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """Compare two evaluations, prompt by prompt; at least two prompts."""
    differences = [a - b for a, b in zip(rewards, baseline, strict=True)]
    mean = statistics.fmean(differences)
    if len(set(differences)) == 1:  # No spread: the interval is a point.
        return Comparison(mean, mean, mean, len(differences))
    count = len(differences)
    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(count)
    return Comparison(mean, mean - half, mean + half, count)
