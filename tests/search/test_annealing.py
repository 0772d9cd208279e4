import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.annealing import Annealing, Chain, draws

BOUNDS = ((0.1, 0.8),) * 3
SEEDS = ((0.3, 0.3, 0.3), (0.6, 0.2, 0.4))


def surface(point):
    """A smooth reward with two optima, the better one at (.62, .25, .45)."""
    near = sum((x - y) ** 2 for x, y in zip(point, (0.62, 0.25, 0.45), strict=True))
    far = sum((x - y) ** 2 for x, y in zip(point, (0.2, 0.7, 0.2), strict=True))
    return math.exp(-near / 0.02) + 0.6 * math.exp(-far / 0.05)


def walk(chain, reward=surface):
    """Run a chain to its end: every (proposal, state after it)."""
    state, steps = chain.start(), []
    while not state.finished:
        point = chain.propose(state)
        state = chain.advance(state, point, reward(point))
        steps.append((point, state))
    return steps


def algorithm_1(evaluate, seeds, t_init, alpha, n_iter, r_max, t_small, step, min_step, seed):
    """Algorithm 1 of the supplement, line by line, on the same random numbers; E = -reward.

    Written apart from search.annealing, after the paper; `too small` is t < t_small, and the
    neighbour is the reference implementation's.
    """
    energies = [-evaluate(s) for s in seeds]
    s_curr = seeds[int(np.argmin(energies))]
    e_curr = min(energies)
    s_best, e_best = s_curr, e_curr
    t, c_restart, trace = t_init, 0, []
    for i in range(1, n_iter + 1):
        numbers = draws(seed, 0, len(seeds) + i - 1, 3)
        s_neighbor = list(s_curr)
        move = max(min_step, step * t / t_init) * numbers.move
        moved = s_neighbor[numbers.coordinate] + move
        s_neighbor[numbers.coordinate] = round(min(max(moved, 0.1), 0.8), 6)
        s_neighbor = tuple(s_neighbor)
        e_neighbor = -evaluate(s_neighbor)
        if e_neighbor < e_curr or math.exp(-(e_neighbor - e_curr) / t) > numbers.acceptance:
            s_curr, e_curr = s_neighbor, e_neighbor
        if e_curr < e_best:
            s_best, e_best = s_curr, e_curr
        t = alpha * t
        if t < t_small:
            t, c_restart = t_init, c_restart + 1
        trace.append((s_neighbor, s_curr, s_best, t, c_restart))
        if c_restart > r_max:
            break
    return trace


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("t_small", [1e-4, 0.02])
def test_chain_is_algorithm_1_step_by_step(seed, t_small):
    annealing = Annealing(
        BOUNDS, SEEDS, num_steps=120, min_temperature=t_small, patience=None, max_restarts=2
    )
    expected = algorithm_1(surface, SEEDS, 0.1, 0.95, 120, 2, t_small, 0.10, 0.005, seed)

    found = [
        (point, state.current, state.best, state.temperature, state.num_restarts)
        for point, state in walk(Chain(annealing, seed))[len(SEEDS) :]
    ]

    assert found == expected


def test_seeds_are_evaluated_first_and_the_chain_starts_from_the_best():
    steps = walk(Chain(Annealing(BOUNDS, SEEDS, num_steps=1)))

    assert [point for point, _ in steps[:2]] == list(SEEDS)
    assert steps[1][1].current == max(SEEDS, key=surface)


def test_without_progress_a_good_best_reheats_then_restarts_then_ends():
    annealing = Annealing(BOUNDS, SEEDS[:1], num_steps=1000, patience=5, reheat_above=0.8)
    steps = walk(Chain(annealing), reward=lambda point: 0.9 if point == SEEDS[0] else 0.0)
    escapes = [
        (state.num_reheats, state.num_restarts)
        for (_, before), (_, state) in itertools.pairwise(steps)
        if (before.num_reheats, before.num_restarts) != (state.num_reheats, state.num_restarts)
    ]

    assert escapes == [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3)]
    assert len(steps) == 1 + 6 * 5


def test_reheating_multiplies_the_temperature():
    annealing = Annealing(BOUNDS, SEEDS[:1], patience=5, reheat_above=0.8, cooling=0.9)
    steps = walk(Chain(annealing), reward=lambda point: 0.9 if point == SEEDS[0] else 0.0)

    assert steps[5][1].temperature == pytest.approx(0.1 * 0.9**5 * 1.5)


def test_restarting_goes_back_to_the_best_with_larger_steps():
    annealing = Annealing(BOUNDS, SEEDS[:1], patience=5, reheat_above=2.0)
    steps = walk(Chain(annealing), reward=lambda point: 0.9 if point == SEEDS[0] else 0.89)
    restarted = steps[5][1]

    assert restarted.current == restarted.best == SEEDS[0]
    assert (restarted.temperature, restarted.step_factor) == (0.1, 3.0)


def test_a_failed_evaluation_is_rejected():
    chain = Chain(Annealing(BOUNDS, SEEDS[:1]))
    before = chain.advance(chain.start(), SEEDS[0], 0.5)

    for failure in (None, math.nan, math.inf):
        after = chain.advance(before, chain.propose(before), failure)
        assert (after.current, after.best, after.event) == (SEEDS[0], SEEDS[0], "fail")


def test_a_chain_whose_seeds_all_failed_goes_on_from_the_middle():
    chain = Chain(Annealing(BOUNDS, SEEDS[:1]))
    state = chain.advance(chain.start(), SEEDS[0], None)
    point = chain.propose(state)

    assert sum(x != 0.45 for x in point) == 1
    assert chain.advance(state, point, 0.1).best == point


def test_random_numbers_depend_on_seed_chain_and_step_alone():
    assert draws(1, 2, 3, 3) == draws(1, 2, 3, 3)
    assert len({draws(s, c, i, 3).move for s in (0, 1) for c in (0, 1) for i in range(50)}) == 200


chains = st.builds(
    lambda low, width, annealing, seed: Chain(
        replace(annealing, bounds=((low, low + width),) * 3), seed
    ),
    st.floats(0, 0.5),
    st.floats(0.01, 0.45),
    st.builds(
        Annealing,
        bounds=st.just(BOUNDS),
        seeds=st.lists(st.tuples(*[st.floats(0, 0.99)] * 3), min_size=1, max_size=3).map(tuple),
        num_steps=st.integers(0, 40),
        cooling=st.floats(0.5, 1),
        step_size=st.floats(0.001, 1),
        patience=st.none() | st.integers(1, 10),
        max_restarts=st.integers(0, 3),
    ),
    st.integers(0, 2**63 - 1),
)
rewards = st.lists(st.none() | st.floats(-3, 3), min_size=43, max_size=43)


@settings(max_examples=150, deadline=None)
@given(chains, rewards)
def test_proposals_stay_in_bounds_and_the_best_is_never_lost(chain, outcomes):
    state, seen = chain.start(), []
    while not state.finished:
        point = chain.propose(state)
        for value, (low, high) in zip(point, chain.annealing.bounds, strict=True):
            assert low - 1e-6 <= value <= high + 1e-6
        reward = outcomes[state.step]
        seen += [] if reward is None else [reward]
        state = chain.advance(state, point, reward)
        assert state.best_reward == max(seen, default=-math.inf)
        assert state.temperature > 0


@settings(max_examples=50, deadline=None)
@given(chains, rewards)
def test_equal_outcomes_give_equal_walks(chain, outcomes):
    again = Chain(chain.annealing, chain._seed)

    def steps(one):
        state, found = one.start(), []
        while not state.finished:
            found.append(one.propose(state))
            state = one.advance(state, found[-1], outcomes[state.step])
        return found

    assert steps(chain) == steps(again)
