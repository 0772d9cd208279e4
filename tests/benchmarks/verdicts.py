"""How often a verdict is false where pruning changes nothing, by simulation.

python -m tests.benchmarks.verdicts
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom

from search.comparison import compare
from tests.benchmarks.measuring import (
    RESULTS,
    Goal,
    goals_as_json,
    machine,
    print_goals,
    write_json,
)

Array = NDArray[np.float64]
# (generator, of each picture the number of its prompt) -> differences with a mean of 0.
Draw = Callable[[np.random.Generator, NDArray[np.int64]], Array]

MOST = 6.0
"""Percent of false verdicts that a distribution may cost that is not too skewed; nominal is 5."""
SIZES = (16, 24, 32, 64, 96, 256)
SHARES = np.arange(20, 81) / 100


# --- differences where pruning changes nothing on average ------------------------------------


def normal(rng: np.random.Generator, prompts: NDArray[np.int64]) -> Array:
    """Draw from a normal distribution."""
    return rng.normal(size=len(prompts))


def lognormal(rng: np.random.Generator, prompts: NDArray[np.int64], *, sigma: float) -> Array:
    """Draw from a lognormal distribution, centred."""
    found: Array = rng.lognormal(0.0, sigma, len(prompts)) - np.exp(sigma**2 / 2)
    return found


def clustered(rng: np.random.Generator, prompts: NDArray[np.int64]) -> Array:
    """Draw what a prompt's noises have in common (sd .3), and what they differ by (sd .4)."""
    common = rng.normal(0.0, 0.3, prompts.max() + 1)
    found: Array = common[prompts] + rng.normal(0.0, 0.4, len(prompts))
    return found


def heavy(rng: np.random.Generator, prompts: NDArray[np.int64]) -> Array:
    """Draw from Student's t distribution with 3 degrees of freedom, symmetric with heavy tails."""
    return rng.standard_t(3, len(prompts))


@dataclass(frozen=True)
class Data:
    """A distribution of differences.

    pictures: of each prompt; one_more: every other prompt has one more.
    is_held:  whether it may cost MOST false verdicts, or is only told.
    """

    name: str
    draw: Draw
    pictures: int = 1
    one_more: bool = False
    is_held: bool = True

    def prompts(self, num_texts: int) -> NDArray[np.int64]:
        """Return of each picture the number of its prompt."""
        numbers = np.arange(num_texts)
        return np.repeat(numbers, self.pictures + self.one_more * (numbers % 2))


SIMULATED = (
    Data("normal", normal),
    Data("lognormal, sigma .5", partial(lognormal, sigma=0.5)),
    Data("clustered, 4 noises each", clustered, pictures=4),
    Data("clustered, 1 or 2 noises each", clustered, one_more=True),
    Data("Student's t, 3 degrees of freedom", heavy, is_held=False),
    Data("lognormal, sigma 1", partial(lognormal, sigma=1.0), is_held=False),
)
TWO_VALUED = "two-valued, p .2 to .8, the worst p"
# A large gain for so few prompts, a small loss for the others.
RARE = (0.1, 0.05)


# --- verdicts on them ------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """How many percent of comparisons end in each false verdict.

    is_held: whether their sum has a limit.
    """

    data: str
    num_texts: int
    better: float
    worse: float
    is_held: bool

    @property
    def false(self) -> float:
        """Percent of false verdicts."""
        return self.better + self.worse


def simulate(data: Data, num_texts: int, num_trials: int) -> Rates:
    """Compare so many times on so many prompts."""
    rng = np.random.default_rng([num_texts, *data.name.encode()])
    prompts = data.prompts(num_texts)
    texts = [f"prompt {number}" for number in prompts]
    dense = [0.0] * len(texts)
    count = Counter(
        compare(data.draw(rng, prompts).tolist(), dense, texts).verdict for _ in range(num_trials)
    )
    better, worse = (100 * count[verdict] / num_trials for verdict in ("better", "worse"))
    return Rates(data.name, num_texts, better, worse, data.is_held)


def two_valued(num_texts: int, shares: Sequence[float]) -> list[Rates]:
    """Return the exact rates where a share of the prompts gains 1 and the others nothing.

    The verdict is on the difference from the share itself, which shifts every interval alike.
    """
    texts = [f"prompt {number}" for number in range(num_texts)]
    ends = []
    for num_gains in range(num_texts + 1):
        gains = [1.0] * num_gains + [0.0] * (num_texts - num_gains)
        found = compare(gains, [0.0] * num_texts, texts)
        has_none = found.low is None or found.high is None
        ends.append((-np.inf, np.inf) if has_none else (found.low, found.high))
    low, high = np.array(ends, dtype=float).T
    rates = []
    for share in shares:
        chances = 100 * binom.pmf(np.arange(num_texts + 1), num_texts, share)
        better, worse = (float(chances[side].sum()) for side in (low > share, high < share))
        rates.append(Rates(f"two-valued, p {share:g}", num_texts, better, worse, is_held=False))
    return rates


def worst(rates: Sequence[Rates]) -> Rates:
    """Return the rates with the most false verdicts."""
    return max(rates, key=lambda each: each.false)


def all_rates(sizes: Sequence[int], num_trials: int) -> list[Rates]:
    """Return the rates of every distribution at every number of prompts."""
    found = [simulate(data, size, num_trials) for data in SIMULATED for size in sizes]
    for size in sizes:
        one = worst(two_valued(size, SHARES))
        found.append(Rates(TWO_VALUED, size, one.better, one.worse, is_held=True))
    return found + [each for share in RARE for size in sizes for each in two_valued(size, [share])]


def markdown(rates: Sequence[Rates]) -> str:
    """Return a table: distributions down, numbers of prompts across."""
    sizes = list(dict.fromkeys(each.num_texts for each in rates))
    lines = [f"| prompts | {' | '.join(map(str, sizes))} |", "|---" * (len(sizes) + 1) + "|"]
    for name in dict.fromkeys(each.data for each in rates):
        cells = [f"{each.false:.1f}%" for each in rates if each.data == name]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print a table, write JSON; 1 if a verdict is false too often."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000, help="of each (default 10,000)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of prompts")
    parser.add_argument("--output", type=Path, default=RESULTS / "verdicts.json")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    rates = all_rates(options.sizes, options.trials)
    # At every number of prompts, since the worst come and go with it.
    sizes = range(min(options.sizes), max(options.sizes) + 1)
    exact = worst([each for size in sizes for each in two_valued(size, SHARES)])
    goals = [
        *(
            Goal(
                name, round(max(e.false for e in rates if e.data == name), 2), "at most", MOST, "%"
            )
            for name in dict.fromkeys(each.data for each in rates if each.is_held)
        ),
        Goal(
            f"{TWO_VALUED}, on {min(sizes)} to {max(sizes)} prompts",
            round(exact.false, 2),
            "at most",
            MOST,
            "%",
        ),
    ]
    result = {
        "benchmark": "verdicts",
        "num_trials": options.trials,
        "percent_of_false_verdicts": [asdict(each) | {"false": each.false} for each in rates],
        "worst_two_valued": asdict(exact),
        "goals": goals_as_json(goals),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "machine": machine(torch.device("cpu")),
    }
    write_json(result, options.output)
    print("\nfalse verdicts where pruning changes nothing\n")
    print(markdown(rates) + "\n")
    return print_goals(goals, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
