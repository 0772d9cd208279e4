"""`experiment=paper` takes the steps of the reference implementation's search, one by one."""

import math
import random
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import pytest
from ray.tune.search import Searcher

from search.annealing import Draws
from search.plan import _searcher as searcher_of
from search.space import Space
from tests.conf.test_config import composed

# The order in which the reference draws a ratio to change.
NAMES = ("down", "up", "mid")
# That of our points.
ORDER = ("down", "mid", "up")


class Row(NamedTuple):
    """One evaluation: what it was drawn from, and what came of it."""

    kind: str
    left: tuple[float, ...]
    temperature: float
    num_reheats: int
    num_restarts: int
    point: tuple[float, ...]
    score: float
    is_accepted: bool
    best: float


def reference_search(score, rng):
    """The reference's search, transcribed from our notes on what it does.

    score: (down, mid, up) -> mean reward; rng: a random.Random.
    Returns the rows, and for each but the first its draws: ratio, share of the largest move, and
    the number that decides the acceptance, which is drawn only for what is no gain.
    Points are rounded as ours are.
    """
    rows, draws = [], []
    here = dict.fromkeys(NAMES, 0.3)
    here_score = best_score = score(here)
    best = here
    start = tuple(here[name] for name in ORDER)
    rows.append(Row("seed", start, 0.1, 0, 0, start, here_score, True, best_score))
    temperature, num_without, num_reheats, num_restarts = 0.1, 0, 0, 0
    may_reheat = False

    def moved(point, largest):
        name = NAMES[rng.randrange(3)]
        share = rng.uniform(-1, 1)
        draws.append([name, share, None])
        value = min(max(point[name] + largest * share, 0.1), 0.8)
        return {**point, name: round(value, 6)}

    def note(kind, left, point, new_score, is_accepted):
        left, point = (tuple(each[name] for name in ORDER) for each in (left, point))
        rows.append(
            Row(
                *(kind, left, temperature, num_reheats, num_restarts, point, new_score),
                *(is_accepted, best_score),
            )
        )

    for _ in range(120):
        proposal = moved(here, max(0.005, 0.10 * temperature / 0.1))
        proposal_score = score(proposal)
        gain = proposal_score - here_score
        is_accepted = gain > 0
        if not is_accepted:
            draws[-1][2] = rng.random()
            is_accepted = draws[-1][2] < math.exp(gain / temperature)
        num_without += 1
        if proposal_score > best_score:
            best, best_score, num_without = proposal, proposal_score, 0
            may_reheat = may_reheat or best_score > 0.8
        note("proposal", here, proposal, proposal_score, is_accepted)
        if is_accepted:
            here, here_score = proposal, proposal_score
        temperature *= 0.95
        if num_without < 24:
            continue
        num_without = 0
        if may_reheat and num_reheats < 3:
            num_reheats += 1
            temperature *= 1.5
        elif num_restarts < 2:
            num_restarts += 1
            temperature = 0.1
            here = moved(best, 0.30)
            here_score = score(here)
            left = best
            if here_score > best_score:
                best, best_score = here, here_score
            note("jump", left, here, here_score, True)
        else:
            break
    return rows, draws


def our_search(score, draws, monkeypatch):
    """The rows of `experiment=paper`, with the same random numbers."""

    def given(seed, chain, step, num_dimensions):
        if not 1 <= step <= len(draws):  # Looked ahead at, past the end.
            return Draws(0, 0.0, 0.5)
        name, share, acceptance = draws[step - 1]
        # Where the reference draws none there is a gain, which needs none either.
        return Draws(ORDER.index(name), share, 1 - 1e-12 if acceptance is None else acceptance)

    monkeypatch.setattr("search.annealing.draws", given)
    config = composed("experiment=paper", "model=sdxl", "res=512x512")
    search = searcher_of(config, Space(config.space.bounds, config.poa_weight), None)
    count = 0
    while (suggested := search.suggest(str(count))) != Searcher.FINISHED:
        search.on_trial_complete(str(count), {"reward": score(suggested)})
        count += 1
    rows, before = [], None
    for commit in search.commits:
        after, seen = commit.state, commit.seen
        if before is None:
            row = Row(
                "seed", seen.point, after.temperature, 0, 0, seen.point, seen.reward, True, 0
            )
        else:
            row = Row(
                *("jump" if before.is_jump else "proposal", before.current, before.temperature),
                *(before.num_reheats, before.num_restarts, seen.point, seen.reward),
                *(after.event in ("accept", "jump"), 0),
            )
        rows.append(row._replace(best=after.best_reward))
        before = after
    return rows


def landscape(seed, level, roughness):
    """A hill on which every point is off by noise of its own: the same for the same point."""

    def score(point):
        at = {"down": 0.6, "mid": 0.3, "up": 0.4}
        distance = sum((point[name] - at[name]) ** 2 for name in NAMES)
        noise = random.Random(f"{seed} {[point[name] for name in ORDER]}").gauss(0, roughness)
        return level + math.exp(-distance / 0.1) - math.exp(-0.1 / 0.1) + noise

    return score


LANDSCAPES = {
    # Height of the start, and the noise.
    "smooth": (0.3, 0.0),
    "rough": (0.0, 0.3),
    "at the bar": (0.75, 0.05),
    "plateaus": (0.6, 0.15),
}
SEEDS = range(10)


@pytest.mark.parametrize("name", LANDSCAPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_steps_are_the_references(name, seed, monkeypatch):
    score = landscape(seed, *LANDSCAPES[name])
    expected, draws = reference_search(score, random.Random(seed + 42))

    assert our_search(score, draws, monkeypatch) == expected


def test_the_compared_searches_come_by_every_rule():
    found = Counter()
    for name in LANDSCAPES:
        for seed in SEEDS:
            score = landscape(seed, *LANDSCAPES[name])
            rows, _ = reference_search(score, random.Random(seed + 42))
            kinds = Counter(row.kind for row in rows)
            found["three reheats"] += rows[-1].num_reheats == 3
            found["two restarts"] += kinds["jump"] == 2
            found["all 120 proposals"] += kinds["proposal"] == 120
            found["an early end"] += kinds["proposal"] < 120
            found["a jump to a new best"] += any(
                row.kind == "jump" and row.score == row.best for row in rows
            )
            found["a jump at the end"] += rows[-1].kind == "jump"
            found["a loss accepted"] += any(
                row.kind == "proposal" and row.is_accepted and row.score < before.score
                for before, row in pairwise(rows)
            )

    assert min(found.values()) > 0, found


def test_a_start_above_the_bar_never_reheats_and_ends_after_three_times_24(monkeypatch):
    def score(point):
        return 0.9 if point == dict.fromkeys(NAMES, 0.3) else 0.1

    expected, draws = reference_search(score, random.Random(42))
    rows = our_search(score, draws, monkeypatch)

    assert rows == expected
    assert [row.kind for row in rows].count("proposal") == 72
    assert rows[-1].num_reheats == 0


def test_a_jump_above_the_bar_lets_nothing_reheat(monkeypatch):
    scores = iter([0.5, *[0.1] * 24, 0.9])
    known = {}

    def score(point):
        key = tuple(point[name] for name in ORDER)
        if key not in known:
            known[key] = next(scores, 0.1)
        return known[key]

    expected, draws = reference_search(score, random.Random(42))
    rows = our_search(score, draws, monkeypatch)

    assert rows == expected
    assert (rows[-1].best, rows[-1].num_reheats) == (0.9, 0)
