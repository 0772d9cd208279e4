import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.racing import Expectation, Race

REWARDS = st.lists(st.floats(-2, 2), min_size=16, max_size=64)


def pair(seed, gain, num_prompts=64, noise=0.1):
    """An incumbent and an evaluation that gains so much over it on average."""
    chance = random.Random(seed)
    incumbent = [chance.gauss(0, 0.5) for _ in range(num_prompts)]
    raw = [chance.gauss(gain, noise) for _ in range(num_prompts)]
    shift = gain - statistics.fmean(raw)
    return [a + b + shift for a, b in zip(incumbent, raw, strict=True)], incumbent


def lost(race, rewards, incumbent, min_gain=0.0):
    """The race against the incumbent's rewards alone."""
    expectation = Expectation.of_incumbent(incumbent)
    return race.lost(rewards, expectation, statistics.fmean(incumbent) + min_gain)


def test_what_is_far_worse_is_stopped_at_the_first_look():
    rewards, incumbent = pair(0, gain=-1.0)

    assert lost(Race(alpha=0.05, stride=8), rewards, incumbent).num_drawn == 8


def test_what_gains_enough_goes_on_to_the_end():
    rewards, incumbent = pair(0, gain=0.1)

    assert lost(Race(alpha=0.01, stride=8), rewards, incumbent, 0.0) is None


def test_a_lower_bar_is_easier_to_reach():
    rewards, incumbent = pair(0, gain=-0.3)
    race = Race(alpha=0.01, stride=8)

    assert lost(race, rewards, incumbent, 0.0) is not None
    assert lost(race, rewards, incumbent, -0.5) is None


@settings(deadline=None)
@given(rewards=REWARDS, seed=st.integers(0, 99), min_gain=st.floats(-1, 0))
def test_the_verdict_does_not_depend_on_how_many_rewards_come_at_once(rewards, seed, min_gain):
    incumbent = random.Random(seed).choices([-1.0, 0.0, 0.3, 1.0], k=len(rewards))
    race = Race(alpha=0.2, stride=4)
    at_once = lost(race, rewards, incumbent, min_gain)
    looks = (lost(race, rewards[:n], incumbent, min_gain) for n in range(1, len(rewards)))

    assert next((found for found in looks if found is not None), None) == at_once


@settings(deadline=None)
@given(rewards=REWARDS, seed=st.integers(0, 99), min_gain=st.floats(-1, 0))
def test_the_estimate_of_what_was_stopped_is_below_the_bar(rewards, seed, min_gain):
    incumbent = random.Random(seed).choices([-1.0, 0.0, 0.3, 1.0], k=len(rewards))
    found = lost(Race(alpha=0.2, stride=4), rewards, incumbent, min_gain)

    if found is not None:
        assert found.mean - statistics.fmean(incumbent) < min_gain + 1e-12
        assert found.rewards[: found.num_drawn] == tuple(rewards[: found.num_drawn])
        assert len(found.rewards) == len(rewards)
        assert found.error >= 0


def test_a_right_expectation_makes_a_right_estimate():
    rewards, incumbent = pair(1, gain=-0.4, noise=0.5)
    right = Expectation(tuple(value + 0.02 for value in rewards), 1e-4, highest=max(rewards))

    found = Race().lost(rewards, right, statistics.fmean(incumbent))
    assert found.num_drawn < 64
    assert found.mean == pytest.approx(statistics.fmean(rewards))
    assert found.error < 0.01


def test_the_higher_rewards_can_be_the_longer_it_takes():
    rewards, incumbent = pair(2, gain=-0.4)
    needed = statistics.fmean(incumbent)
    num_drawn = []
    for highest in (max(incumbent), 2 * max(incumbent), 4 * max(incumbent)):
        expectation = replace(Expectation.of_incumbent(incumbent), highest=highest)
        found = Race().lost(rewards, expectation, needed)
        num_drawn.append(found.num_drawn if found else 64)

    assert num_drawn == sorted(set(num_drawn))


def test_what_can_no_longer_be_reached_is_lost():
    """Of 16 rewards of at most 1, half are 0: the mean cannot be .9 any more."""
    expectation = Expectation((0.9,) * 16, 0.01, highest=1.0)
    race = Race(alpha=1e-9, stride=4)

    assert race.lost([0.0] * 8 + [1.0] * 8, expectation, needed=0.9).num_drawn == 4


def test_equal_rewards_on_few_prompts_prove_nothing():
    incumbent = [0.0, 1.0] * 16
    rewards = [value - 0.05 for value in incumbent]

    assert lost(Race(alpha=0.01, stride=8), rewards[:8], incumbent, 0.0) is None


def num_wrong(race, expects, gain_of, num_trials=500):
    """How many evaluations that just reach the bar are stopped, each prompt's gain at random."""
    count = 0
    for seed in range(num_trials):
        chance = random.Random(seed)
        incumbent = [chance.gauss(0, 0.5) for _ in range(64)]
        gains = [gain_of(chance) for _ in range(64)]
        mean = statistics.fmean(gains) - 1e-9
        rewards = [a + b - mean for a, b in zip(incumbent, gains, strict=True)]
        expected = incumbent
        if expects == "far too much":
            expected = [reward + chance.gauss(0.5, 0.1) for reward in rewards]
        expectation = Expectation(tuple(expected), 1e-4, highest=max(incumbent))
        count += race.lost(rewards, expectation, statistics.fmean(incumbent)) is not None
    return count


@pytest.mark.parametrize("expects", ["the incumbent's", "far too much"])
@pytest.mark.parametrize(
    "gain_of",
    [
        lambda chance: chance.gauss(0, 0.3),
        lambda chance: 0.3 * chance.lognormvariate(0, 0.5),
        lambda chance: 0.2 * chance.lognormvariate(0, 1),
        lambda chance: (chance.random() < 0.05) + chance.gauss(0, 0.05),
    ],
    ids=["normal", "lognormal", "heavy", "rare"],
)
def test_it_wrongly_stops_no_more_than_alpha_however_skewed_the_gains_are(expects, gain_of):
    # Twice the standard error of 500 trials above alpha.
    assert num_wrong(Race(alpha=0.05), expects, gain_of) / 500 <= 0.07


def test_it_stops_most_of_what_is_clearly_worse_early():
    race, num_drawn = Race(alpha=0.05, stride=8), []
    for seed in range(200):
        rewards, incumbent = pair(seed, gain=-0.3, noise=0.3)
        found = lost(race, rewards, incumbent)
        num_drawn.append(found.num_drawn if found else 64)

    assert statistics.fmean(num_drawn) < 32
    assert max(num_drawn) < 64


def test_the_last_prompts_are_no_look():
    """With all prompts drawn the mean itself decides."""
    rewards, incumbent = pair(0, gain=-0.001, num_prompts=16, noise=0.01)

    assert lost(Race(alpha=0.4, stride=16), rewards, incumbent, 0.0) is None
