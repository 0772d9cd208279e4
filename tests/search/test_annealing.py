import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.annealing import REFERENCE, Annealing, Chain, draws, space_filling
from search.surrogate import Observation

BOUNDS = ((0.1, 0.8),) * 3
SEEDS = ((0.3, 0.3, 0.3), (0.6, 0.2, 0.4))


def surface(point):
    """A smooth reward with two optima, the better one at (.62, .25, .45)."""
    near = sum((x - y) ** 2 for x, y in zip(point, (0.62, 0.25, 0.45), strict=True))
    far = sum((x - y) ** 2 for x, y in zip(point, (0.2, 0.7, 0.2), strict=True))
    return math.exp(-near / 0.02) + 0.6 * math.exp(-far / 0.05)


def reference(*args, **parameters):
    """The reference implementation's annealing, but for these parameters."""
    return Annealing(*args, **{**REFERENCE, **parameters})


def walk(chain, reward=surface):
    """Run a chain to its end: every (proposal, state after it)."""
    state, steps = chain.start(), []
    while not state.finished:
        point = chain.propose(state)
        state = chain.advance(state, Observation(point, reward(point)))
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
    annealing = reference(BOUNDS, SEEDS, min_temperature=t_small, patience=None)
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


def in_turn(*rewards):
    """Rewards in the order of the proposals, whatever they are; after these 0."""
    remaining = iter(rewards)
    return lambda point: next(remaining, 0.0)


def test_without_progress_a_good_best_reheats_then_restarts_then_ends():
    annealing = reference(BOUNDS, SEEDS[:1], num_steps=1000, patience=5, reheat_above=0.8)
    steps = walk(Chain(annealing), in_turn(0.5, 0.9))
    escapes = [
        (state.num_reheats, state.num_restarts)
        for (_, before), (_, state) in itertools.pairwise(steps)
        if (before.num_reheats, before.num_restarts) != (state.num_reheats, state.num_restarts)
    ]

    assert escapes == [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3)]
    num_seeds, num_jumps = 1, 2
    assert len(steps) == num_seeds + 1 + 6 * 5 + num_jumps


def test_a_starting_point_above_the_bar_is_no_reason_to_reheat():
    annealing = reference(BOUNDS, SEEDS[:1], patience=5, reheat_above=0.8)
    steps = walk(Chain(annealing), in_turn(0.9))

    assert steps[-1][1].num_reheats == 0


def test_reheating_multiplies_the_temperature():
    annealing = reference(BOUNDS, SEEDS[:1], patience=5, reheat_above=0.8, cooling=0.9)
    steps = walk(Chain(annealing), in_turn(0.5, 0.9))

    assert steps[6][1].temperature == pytest.approx(0.1 * 0.9**6 * 1.5)


def test_a_restart_jumps_once_from_the_best_and_goes_on_with_normal_steps():
    annealing = reference(BOUNDS, SEEDS[:1], num_steps=1000, patience=20, max_restarts=1)
    jumps, largest = [], []
    for seed in range(50):
        steps = walk(Chain(annealing, seed), in_turn(0.9, *[0.89] * 20, -5.0, -4.0))
        points = [point for point, _ in steps]
        restarted, jumped = steps[20][1], steps[21][1]
        assert restarted.current == restarted.best == SEEDS[0]
        assert (jumped.current, jumped.event, jumped.temperature) == (points[21], "jump", 0.1)
        jumps.append(math.dist(points[21], SEEDS[0]))
        largest += [math.dist(points[22], points[21])]
        assert [state.event for _, state in steps].count("jump") == 1
        assert sum(x != y for x, y in zip(points[21], SEEDS[0], strict=True)) == 1

    assert 0.2 < max(jumps) <= 0.3
    assert 0.05 < max(largest) <= 0.1


def test_jumps_are_made_beside_the_steps():
    annealing = reference(BOUNDS, SEEDS[:1], num_steps=12, patience=5)
    steps = walk(Chain(annealing), in_turn(0.9))

    assert [state.step for _, state in steps if state.event == "jump"] == [7, 13]
    assert len(steps) == 1 + 12 + 2


def test_a_restart_at_the_last_step_still_jumps():
    annealing = reference(BOUNDS, SEEDS[:1], num_steps=5, patience=5)
    steps = walk(Chain(annealing), in_turn(*[0.0] * 6, 0.7))

    assert (steps[-1][1].event, steps[-1][1].best_reward) == ("jump", 0.7)


def test_a_jump_that_fails_leaves_the_chain_at_the_best():
    chain = Chain(reference(BOUNDS, SEEDS[:1], patience=1))
    state = chain.advance(chain.start(), Observation(SEEDS[0], 0.5))
    state = chain.advance(state, Observation(chain.propose(state), 0.499))
    assert state.is_jump

    after = chain.advance(state, Observation(chain.propose(state), None))
    assert (after.current, after.event, after.is_jump) == (SEEDS[0], "fail", False)


def test_too_cold_and_out_of_patience_in_one_step_is_one_restart():
    annealing = reference(
        BOUNDS, SEEDS[:1], patience=5, cooling=0.5, min_temperature=0.005, restart_jump=0.0
    )
    steps = walk(Chain(annealing), in_turn(0.9))

    # At 0.1 * 0.5^5 = 0.003, after 5 steps without a new best.
    assert [state.num_restarts for _, state in steps[4:7]] == [0, 1, 1]
    assert steps[5][1].temperature == 0.1


def test_a_failed_evaluation_is_rejected():
    chain = Chain(Annealing(BOUNDS, SEEDS[:1]))
    before = chain.advance(chain.start(), Observation(SEEDS[0], 0.5))

    after = chain.advance(before, Observation(chain.propose(before), None))
    assert (after.current, after.best, after.event) == (SEEDS[0], SEEDS[0], "fail")


def test_a_chain_whose_seeds_all_failed_goes_on_from_the_middle():
    chain = Chain(reference(BOUNDS, SEEDS[:1]))
    state = chain.advance(chain.start(), Observation(SEEDS[0], None))
    point = chain.propose(state)

    assert sum(x != 0.45 for x in point) == 1
    assert chain.advance(state, Observation(point, 0.1)).best == point


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
        max_restarts=st.none() | st.integers(0, 3),
        restart_jump=st.sampled_from([0.0, 0.3]),
        initial_temperature=st.none() | st.floats(0.01, 1),
        reheat_above=st.none() | st.floats(-1, 1),
        candidates=st.sampled_from([1, 7]),
        lag=st.integers(0, 9),
    ),
    st.integers(0, 2**63 - 1),
)
NUM_OUTCOMES = 43
rewards = st.lists(st.none() | st.floats(-3, 3), min_size=NUM_OUTCOMES, max_size=NUM_OUTCOMES)


@given(chains, rewards)
def test_proposals_stay_in_bounds_and_the_best_is_never_lost(chain, outcomes):
    state, seen = chain.start(), []
    while not state.finished:
        point = chain.propose(state)
        for value, (low, high) in zip(point, chain.annealing.bounds, strict=True):
            assert low - 1e-6 <= value <= high + 1e-6
        reward = outcomes[state.step % NUM_OUTCOMES]
        seen += [] if reward is None else [reward]
        state = chain.advance(state, Observation(point, reward))
        assert state.best_reward == max(seen, default=-math.inf)
        assert state.temperature > 0


@given(chains, rewards)
def test_equal_outcomes_give_equal_walks(chain, outcomes):
    again = Chain(chain.annealing, chain._seed)

    def steps(one):
        state, found = one.start(), []
        while not state.finished:
            found.append(one.propose(state))
            state = one.advance(state, Observation(found[-1], outcomes[state.step % NUM_OUTCOMES]))
        return found

    assert steps(chain) == steps(again)


# --- what the defaults have over the reference -------------------------------------------------


@given(chain=chains, outcomes=rewards, decisions=st.lists(st.booleans(), min_size=9, max_size=9))
def test_what_a_supposed_state_proposes_is_what_the_real_one_will(chain, outcomes, decisions):
    """Whatever the rewards are, as long as the same proposals are accepted."""
    state = chain.start()
    while not state.finished and state.step < 20:
        if not chain.is_seed(state) and state.current is not None:
            break
        state = chain.advance(
            state, Observation(chain.propose(state), outcomes[state.step % NUM_OUTCOMES])
        )
    supposed = real = state
    for accepted in decisions:
        if supposed.finished or real.finished or chain.annealing.candidates == 1:
            break
        if not chain.can_propose(supposed):
            assert supposed.step - state.step > chain.annealing.lag
            break
        point = chain.propose(supposed)
        assert point == chain.propose(real)
        # A reward by which the real chain decides the same.
        reward = real.current_reward + (1.0 if accepted else -1e9)
        if real.current is None or real.is_jump:
            reward = 0.0 if accepted else None
        supposed = chain.suppose(supposed, point, accepted)
        real = chain.advance(real, Observation(point, reward))


@given(
    chain=chains,
    outcomes=st.lists(
        st.none() | st.integers(-64, 64), min_size=NUM_OUTCOMES, max_size=NUM_OUTCOMES
    ),
    factor=st.sampled_from([0.25, 1.0, 64.0]),
    offset=st.sampled_from([-4.0, 0.0, 8.0]),
)
def test_neither_the_scale_nor_the_offset_of_the_reward_changes_the_walk(
    chain, outcomes, factor, offset
):
    scale_free = replace(
        chain.annealing, initial_temperature=None, reheat_above=None, candidates=7, lag=2
    )

    def steps(change):
        one, found = Chain(scale_free, chain._seed), []
        state = one.start()
        while not state.finished:
            found.append(one.propose(state))
            value = outcomes[state.step % NUM_OUTCOMES]
            reward = None if value is None else change(value)
            state = one.advance(state, Observation(found[-1], reward))
        return found

    assert steps(lambda value: factor * value + offset) == steps(float)


def test_the_temperature_is_a_share_of_what_the_starting_points_span():
    seeds = ((0.2, 0.2, 0.2), (0.3, 0.3, 0.3), (0.4, 0.4, 0.4))
    chain = Chain(Annealing(BOUNDS, seeds))
    state = chain.start()
    for reward in (1.0, 5.0, 2.0):
        state = chain.advance(state, Observation(chain.propose(state), reward))

    drawn = draws(0, 0, 3, 3).acceptance
    assert chain.min_gain(state) == pytest.approx(0.02 * (5.0 - 2.0) * math.log(drawn))


def test_it_reheats_only_once_it_is_above_its_starting_points():
    def reheats(gains):
        annealing = Annealing(BOUNDS, SEEDS, num_steps=60, patience=5)
        values = itertools.count()
        steps = walk(Chain(annealing), lambda point: next(values) if gains else -next(values))
        return steps[-1][1]

    # What gets better at each step never needs to.
    assert (reheats(True).num_reheats, reheats(True).num_restarts) == (0, 0)
    assert (reheats(False).num_reheats, reheats(False).num_restarts > 0) == (0, True)


def test_it_finds_the_better_of_two_optima_with_few_evaluations():
    seeds = space_filling(BOUNDS, 8)
    best = [walk(Chain(Annealing(BOUNDS, seeds, num_steps=52), seed))[-1][1] for seed in range(5)]

    assert min(state.best_reward for state in best) > 0.98


def test_space_filling_points_lie_in_the_box_and_apart():
    points = space_filling(((0.0, 1.0), (5.0, 6.0)), 32)

    assert all(0 <= x <= 1 and 5 <= y <= 6 for x, y in points)
    assert min(math.dist(a, b) for a, b in itertools.combinations(points, 2)) > 0.08
    assert space_filling(((0.0, 1.0), (5.0, 6.0)), 5) == points[:5]


def test_results_of_other_searches_inform_the_surrogate():
    known = tuple(Observation(point, surface(point)) for point in space_filling(BOUNDS, 40))
    cold = Annealing(BOUNDS, SEEDS, num_steps=3, lag=0)
    warm = replace(cold, known=known)
    found = [
        max(surface(point) for point, _ in walk(Chain(annealing, seed))[2:])
        for annealing in (cold, warm)
        for seed in range(5)
    ]

    assert sum(found[5:]) > sum(found[:5])
