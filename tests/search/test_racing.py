import random
import statistics

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

    assert lost(Race(alpha=0.01, stride=8), rewards, incumbent).num_drawn == 8


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


def test_where_the_expectation_is_right_little_needs_to_be_drawn():
    rewards, incumbent = pair(1, gain=-0.05, noise=0.5)
    race = Race(alpha=0.01, stride=8)
    right = Expectation(tuple(value + 0.02 for value in rewards), variance=1e-4)
    needed = statistics.fmean(incumbent)

    assert lost(race, rewards[:32], incumbent) is None
    found = race.lost(rewards, right, needed)
    assert found.num_drawn == 8
    assert found.mean == pytest.approx(statistics.fmean(rewards))


def test_equal_rewards_on_few_prompts_prove_nothing():
    incumbent = [0.0, 1.0] * 16
    rewards = [value - 0.05 for value in incumbent]

    assert lost(Race(alpha=0.01, stride=8), rewards[:8], incumbent, 0.0) is None


@pytest.mark.parametrize("alpha", [0.01, 0.1])
@pytest.mark.parametrize("expects", ["the incumbent's", "a surrogate's, far too high"])
def test_it_wrongly_stops_no_more_than_alpha(alpha, expects):
    """Evaluations that just reach the bar, in 2,000 random orders of their prompts."""
    race, num_wrong, num_trials = Race(alpha, stride=8), 0, 2000
    for seed in range(num_trials):
        rewards, incumbent = pair(seed, gain=1e-9, noise=0.3)
        expectation = Expectation.of_incumbent(incumbent)
        if expects != "the incumbent's":
            chance = random.Random(-1 - seed)
            expectation = Expectation(tuple(x + chance.gauss(0.5, 0.1) for x in rewards), 1e-4)
        needed = statistics.fmean(incumbent)
        num_wrong += race.lost(rewards, expectation, needed) is not None

    assert num_wrong / num_trials <= alpha


def test_it_stops_most_of_what_is_clearly_worse_early():
    race, num_drawn = Race(alpha=0.01, stride=8), []
    for seed in range(200):
        rewards, incumbent = pair(seed, gain=-0.3, noise=0.3)
        found = lost(race, rewards, incumbent)
        num_drawn.append(found.num_drawn if found else 64)

    assert statistics.fmean(num_drawn) < 32


def test_the_last_prompts_are_no_look():
    """With all prompts drawn the mean itself decides."""
    rewards, incumbent = pair(0, gain=-0.001, num_prompts=16, noise=0.01)

    assert lost(Race(alpha=0.4, stride=16), rewards, incumbent, 0.0) is None
