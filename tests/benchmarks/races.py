"""How often a race stops what would have passed, and how many pictures it saves, by simulation.

python -m tests.benchmarks.races
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit

from search.racing import Expectation, Race
from tests.benchmarks.landscapes import SIZES, Landscape
from tests.benchmarks.measuring import (
    RESULTS,
    Goal,
    goals_as_json,
    machine,
    print_goals,
    write_json,
)

Array = NDArray[np.float64]

RACE = Race()
NUM_PROMPTS = (64, 32)
# Of the incumbent's rewards in the simulated data.
SPREAD = 0.5


class Contest(NamedTuple):
    """An evaluation against an incumbent: their rewards by prompt, and the mean it needs."""

    rewards: Array
    incumbent: Array
    needed: float


# (generator, prompts) -> one contest. It just passes, or is worse than it needs to be.
Draw = Callable[[np.random.Generator, int], Contest]


# --- what is raced ---------------------------------------------------------------------------


def normal(rng: np.random.Generator, count: int) -> Array:
    """Draw gains from a normal distribution."""
    return rng.normal(0.0, 0.3, count)


def lognormal(rng: np.random.Generator, count: int, *, sigma: float, scale: float) -> Array:
    """Draw gains from a lognormal distribution."""
    return scale * rng.lognormal(0.0, sigma, count)


def rare(rng: np.random.Generator, count: int, *, gain: float) -> Array:
    """Draw a large gain for 5% of the prompts, and next to none for the others."""
    return gain * (rng.random(count) < 0.05) + rng.normal(0.0, 0.05, count)


def simulated(
    rng: np.random.Generator,
    count: int,
    *,
    gains: Callable[[np.random.Generator, int], Array],
    lack: float,
) -> Contest:
    """Draw a contest whose mean gain is exactly -lack."""
    incumbent = rng.normal(0.0, SPREAD, count)
    gained = gains(rng, count)
    rewards = incumbent + gained - gained.mean() - lack
    # It has to be exceeded: what just passes is a little above it.
    return Contest(rewards, incumbent, float(incumbent.mean()) - 1e-9 * (lack == 0))


@cache
def _table(size: str) -> Array:
    """Return a landscape's triples, the best first: (triples, prompts)."""
    landscape = Landscape.read(size)
    table = landscape.table.reshape(-1, landscape.num_prompts).astype(float)
    found: Array = table[np.argsort(-table.mean(1))]
    return found


def rendered(
    rng: np.random.Generator, count: int, *, size: str, best: int, passes: bool
) -> Contest:
    """Draw two triples of a landscape, an incumbent of the best and any other.

    passes: whether the bar is set where the other just passes it. Otherwise the other is worse,
            and the bar is the incumbent's mean.
    """
    table = _table(size)
    while True:
        prompts = rng.permutation(table.shape[1])[:count]
        incumbent, rewards = table[[rng.integers(best), rng.integers(len(table))]][:, prompts]
        if passes and not np.array_equal(incumbent, rewards):
            return Contest(rewards, incumbent, float(rewards.mean()) - 1e-9)
        if rewards.mean() < incumbent.mean():
            return Contest(rewards, incumbent, float(incumbent.mean()))


@dataclass(frozen=True)
class Data:
    """Contests of one kind.

    draw:    one that just passes; lacking: ones that do not, by their name.
    is_held: whether no reward not drawn exceeds all that are known, but for some rare ones.
    """

    name: str
    draw: Draw
    lacking: dict[str, Draw]
    is_held: bool = True

    @classmethod
    def of_gains(
        cls, name: str, gains: Callable[[np.random.Generator, int], Array], is_held: bool = True
    ) -> Data:
        """Gains over an incumbent whose rewards are normal with standard deviation SPREAD."""
        draws = {lack: partial(simulated, gains=gains, lack=lack) for lack in (0.0, 0.1, 0.3)}
        return cls(name, draws[0.0], {f"-{lack:g}": draws[lack] for lack in (0.1, 0.3)}, is_held)

    @classmethod
    def of_landscape(cls, size: str) -> Data:
        """Triples of a rendered landscape; the worse ones race against one of its 20 best."""
        passing = partial(rendered, size=size, best=len(_table(size)), passes=True)
        lacking = {"any worse": partial(rendered, size=size, best=20, passes=False)}
        return cls(f"landscape {size}", passing, lacking)


def all_data() -> list[Data]:
    """Return every kind of contest."""
    return [
        Data.of_gains("normal, sd .3", normal),
        Data.of_gains("lognormal, sigma .5", partial(lognormal, sigma=0.5, scale=0.3)),
        Data.of_gains("lognormal, sigma 1", partial(lognormal, sigma=1.0, scale=0.2)),
        Data.of_gains("1 for 5% of prompts", partial(rare, gain=1.0)),
        Data.of_gains("3 for 5% of prompts", partial(rare, gain=3.0), is_held=False),
        *(Data.of_landscape(size) for size in SIZES),
    ]


# --- who races -------------------------------------------------------------------------------


def betting(contest: Contest) -> int:
    """Return after how many prompts the search's own race is over."""
    expectation = Expectation.of_incumbent(contest.incumbent.tolist())
    lost = RACE.lost(contest.rewards.tolist(), expectation, contest.needed)
    return len(contest.rewards) if lost is None else lost.num_drawn


def student(contest: Contest) -> int:
    """Return it for the paired t bound that the search had before, alpha shared among looks."""
    gains = contest.rewards - contest.incumbent
    prior = contest.incumbent.var()
    looks = range(RACE.stride, len(gains), RACE.stride)
    for num_drawn in looks:
        drawn = gains[:num_drawn]
        variance = ((drawn - drawn.mean()) ** 2).sum() + prior
        error = math.sqrt(variance / num_drawn**2 * (1 - num_drawn / len(gains)))
        quantile = float(stdtrit(num_drawn, 1 - RACE.alpha / len(looks)))
        if contest.incumbent.mean() + drawn.mean() + quantile * error < contest.needed:
            return num_drawn
    return len(gains)


@dataclass(frozen=True)
class Rates:
    """What a race does to contests of one kind.

    false_stops: percent of those stopped that would have just passed.
    drawn:       percent of the pictures that are drawn of those that lack so much.
    """

    race: str
    data: str
    num_prompts: int
    false_stops: float
    drawn: dict[str, float]
    is_held: bool


def rates(data: Data, num_prompts: int, num_trials: int) -> Iterator[Rates]:
    """Race so many contests of each kind, the same ones in each race."""
    drawn: dict[str, dict[str, list[int]]] = {"t": {}, "betting": {}}
    for name, draw in {"passes": data.draw, **data.lacking}.items():
        rng = np.random.default_rng([num_prompts, *data.name.encode(), *name.encode()])
        contests = [draw(rng, num_prompts) for _ in range(num_trials)]
        drawn["t"][name] = [student(contest) for contest in contests]
        drawn["betting"][name] = [betting(contest) for contest in contests]
    for race, counts in drawn.items():
        stopped = np.array(counts.pop("passes")) < num_prompts
        yield Rates(
            race,
            data.name,
            num_prompts,
            false_stops=100 * float(stopped.mean()),
            drawn={k: 100 * float(np.mean(v)) / num_prompts for k, v in counts.items()},
            is_held=data.is_held,
        )


def markdown(found: Sequence[Rates]) -> str:
    """Return a table: kinds of contests down, races across."""
    lines = [
        "| gains over the incumbent | prompts | t: false stops | betting | pictures drawn, t "
        "| betting |",
        "|---" * 6 + "|",
    ]
    for t, bet in zip(found[::2], found[1::2], strict=True):
        drawn = [", ".join(f"{k}: {v:.0f}%" for k, v in each.drawn.items()) for each in (t, bet)]
        lines.append(
            f"| {t.data} | {t.num_prompts} | {t.false_stops:.1f}% | {bet.false_stops:.1f}% "
            f"| {drawn[0]} | {drawn[1]} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print a table, write JSON; 1 if alpha is not held where it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000, help="of each (default 2,000)")
    parser.add_argument("--output", type=Path, default=RESULTS / "races.json")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    found = [
        each
        for data in all_data()
        for num_prompts in NUM_PROMPTS
        for each in rates(data, num_prompts, options.trials)
    ]
    held = [each.false_stops for each in found if each.race == "betting" and each.is_held]
    goals = [Goal("false stops, the worst", round(max(held), 2), "at most", 100 * RACE.alpha, "%")]
    result = {
        "benchmark": "races",
        "race": asdict(RACE),
        "num_trials": options.trials,
        "rates": [asdict(each) for each in found],
        "goals": goals_as_json(goals),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "machine": machine(torch.device("cpu")),
    }
    write_json(result, options.output)
    print("\n" + markdown(found) + "\n")
    return print_goals(goals, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
