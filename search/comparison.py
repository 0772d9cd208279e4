"""Compare two evaluations on the same prompts: difference, interval, verdict, and their words."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]
Verdict = Literal["better", "no difference shown", "worse", "no verdict"]

FEWEST = 5
"""Independent prompts that an interval takes at least."""
EQUAL = 1e-9
"""Rewards as close as this are the same."""
_LONGEST_PROMPT = 60


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two evaluations on the same prompts.

    difference:  mean of (pruned - dense) over all pictures.
    low, high:   its 95% confidence interval; None: there is none, and `note` says why.
    num_prompts: pictures of each model: pairs of a prompt and a noise.
    num_texts:   distinct prompts among them. They are the sample, unless there is only one.
    prompt:      that one, or None. Its noises are then the sample.
    is_fresh:    whether these prompts were never searched with, under any noise.
    num_earlier: other ratios that were compared with the dense model on these prompts before.
    """

    difference: float
    low: float | None
    high: float | None
    num_prompts: int
    num_texts: int
    prompt: str | None = None
    is_fresh: bool = True
    num_earlier: int = 0

    @property
    def verdict(self) -> Verdict:
        """What the interval says in words."""
        if self.low is None or self.high is None:
            return "no verdict"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"

    @property
    def figures(self) -> str:
        """The difference, with its interval if there is one."""
        if self.low is None or self.high is None:
            return f"{self.difference:+.4f}"
        return f"{self.difference:+.4f}, 95% interval [{self.low:+.4f}, {self.high:+.4f}]"

    @property
    def sample(self) -> str:
        """What it was measured on, as in: 256 fresh prompts."""
        pictures = f" ({self.num_prompts} pictures)" if self.num_prompts > self.num_texts else ""
        if self.is_fresh:
            return f"{self.num_texts} fresh prompt{'s' * (self.num_texts > 1)}{pictures}"
        if self.prompt is not None:
            return f'fresh noise of the same prompt, "{shortened(self.prompt)}"{pictures}'
        return f"fresh noise of the same {self.num_texts} prompts{pictures}"

    @property
    def note(self) -> str:
        """What limits the verdict, in whole sentences; '' if nothing does."""
        notes = []
        num, unit = self.num_texts, "prompts"
        if self.prompt is not None:
            num, unit = self.num_prompts, "noises"
        if self.low is None:
            notes.append(
                f"A verdict takes {FEWEST} {unit}, and there are {num}."
                if num < FEWEST
                else f"All {unit} have the same difference, so its spread is not known."
            )
        if self.num_earlier:
            notes.append(
                f"Other ratios were validated on the same prompts before ({self.num_earlier}): "
                "the more are, the likelier a verdict by chance."
            )
        return " ".join(notes)

    @property
    def summary(self) -> str:
        """The figures and what they were measured on."""
        return f"{self.figures}, on {self.sample}"

    def as_dict(self) -> dict[str, Any]:
        """Return its fields, and their words for readers that have no Comparison."""
        words = {"verdict": self.verdict, "summary": self.summary, "note": self.note}
        return {**asdict(self), **words}


def shortened(text: str) -> str:
    """Return a prompt in one line of printable characters."""
    line = "".join(sign if sign.isprintable() else "?" for sign in " ".join(text.split()))
    return line if len(line) <= _LONGEST_PROMPT else f"{line[: _LONGEST_PROMPT - 3]}..."


def freshness(texts: Sequence[str], searched: Collection[str]) -> str:
    """Say what prompts are to those that were searched with: fresh, or only their noise is."""
    if set(texts).isdisjoint(searched):
        return "fresh prompts"
    return f"fresh noise of the same prompt{'s' * (len(set(texts)) > 1)}"


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


def compare(
    rewards: Sequence[float],
    baseline: Sequence[float],
    texts: Sequence[str],
    *,
    searched: Collection[str] = (),
    num_earlier: int = 0,
) -> Comparison:
    """Compare two evaluations, picture by picture; at least one.

    texts:       the prompt of each picture, in order.
    searched:    prompts by which anything was chosen.
    num_earlier: as in Comparison.
    """
    differences = [a - b for a, b in zip(rewards, baseline, strict=True)]
    distinct = set(texts)
    low, high = interval(by_prompt(differences, texts))
    return Comparison(
        difference=float(np.mean(differences)),
        low=low,
        high=high,
        num_prompts=len(differences),
        num_texts=len(distinct),
        prompt=texts[0] if len(distinct) == 1 else None,
        is_fresh=distinct.isdisjoint(searched),
        num_earlier=num_earlier,
    )


def by_prompt(values: Sequence[float], texts: Sequence[str]) -> Array:
    """Return one independent value for each distinct prompt, with the same mean as all values.

    values: one for each picture; texts: their prompts. Pictures of one prompt have its difficulty
    in common, so they count as one, whatever their number. Of a single prompt every noise counts.
    Prompts with equally many pictures give the means of their pictures. With unequal numbers, the
    values are linearised such that their mean stays the mean over pictures, and their variance is
    the cluster-robust one (CR1) of that mean.
    Source: Cochran, Sampling Techniques (1977), section 9A; Cameron and Miller (JHR 2015), II.
    """
    found = np.array(values, dtype=float)
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    if len(numbers) == 1:
        return found
    mean = found.mean()
    sums = np.bincount([numbers[text] for text in texts], weights=found - mean)
    return np.asarray(mean + len(numbers) / len(found) * sums)


def num_independent(texts: Sequence[str]) -> int:
    """Count the prompts; of a single prompt, its noises."""
    distinct = len(set(texts))
    return distinct if distinct > 1 else len(texts)


def standard_error(values: Sequence[float], texts: Sequence[str]) -> float:
    """Return the standard error of the mean over pictures; NaN for fewer than two prompts."""
    found = by_prompt(values, texts)
    return float(found.std(ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else math.nan


def interval(values: Array) -> tuple[float | None, float | None]:
    """Return a 95% confidence interval of the mean of independent values; None: there is none.

    Student's t, widened by what their skewness asks for: where large gains are rare, samples
    without them look worse than they are, and too sure of it. Each end is the farther one of t's
    and of Hall's, whose cubic transform of t is free of skewness.
    Source: Hall, On the removal of skewness by transformation (JRSS B 1992), with t for normal
    quantiles.
    """
    count = len(values)
    if count < FEWEST or values.max() - values.min() <= EQUAL:
        return None, None
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    quantile = float(stdtrit(count - 1, 0.975)) / math.sqrt(count)
    skew = float((((values - mean) / values.std()) ** 3).mean())
    skew *= math.sqrt(count * (count - 1)) / (count - 2)
    ends = [quantile, -quantile]
    if abs(skew) > EQUAL:
        ends += [_unskewed(end, skew, count) for end in ends]
    return mean - deviation * max(ends), mean - deviation * min(ends)


def _unskewed(end: float, skew: float, count: int) -> float:
    """Return the (sample mean - mean) / deviation that Hall's transform takes to an end."""
    return 3 / skew * (math.cbrt(1 + skew * (end - skew / (6 * count))) - 1)
