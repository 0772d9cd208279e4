"""W workers take exactly the steps of one, whatever finishes when and whatever fails."""

import heapq
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.search import Searcher

from search.annealing import REFERENCE, Annealing, Chain
from search.racing import Race
from search.searchers import AnnealingSearch
from search.speculation import Speculation
from search.surrogate import Observation

SPACE = {"x": (0.0, 1.0), "y": (0.0, 1.0)}
NUM_PROMPTS = 24
MIDDLE = [{"x": 0.5, "y": 0.5}]


def table(seed, failing=0.0):
    """Rewards by prompt that a point's place decides, rough enough to have many optima."""

    def rewards(config):
        chance = random.Random(f"{seed} {sorted(config.items())}")
        if chance.random() < failing:
            return None
        hill = math.sin(7 * config["x"] + seed) * math.cos(5 * config["y"])
        return [hill + chance.gauss(0, 0.2) for _ in range(NUM_PROMPTS)]

    return rewards


def run(rewards, num_workers=1, order=0, num_reported=NUM_PROMPTS, **arguments):
    """Let workers finish in random order; the searcher, and how many trials there were.

    num_reported: prompts after which each trial reports on its way.
    """
    search = AnnealingSearch(SPACE, **{"max_steps": 40, "seed": 5, **arguments})
    chance = random.Random(order)
    running, count, now = [], 0, 0.0
    while not search.finished:
        while len(running) < num_workers:
            config = search.suggest(str(count))
            if config is None or config == Searcher.FINISHED:
                break
            heapq.heappush(running, (now + chance.expovariate(1), count, config))
            count += 1
        assert running, "nothing is under way and nothing is suggested"
        now, number, config = heapq.heappop(running)
        found = rewards(config)
        for reported in range(num_reported, NUM_PROMPTS, num_reported):
            if found is not None:
                search.on_trial_result(str(number), {"rewards": found[:reported]})
        if found is None:
            search.on_trial_complete(str(number), error=True)
        else:
            mean = math.fsum(found) / NUM_PROMPTS
            search.on_trial_complete(str(number), {"reward": mean, "rewards": found})
    return search, count


def steps(search):
    """The steps in their order, without when they were taken."""
    taken = sorted(search.commits, key=lambda commit: (commit.state.step, commit.chain))
    return [(commit.chain, commit.seen, commit.state) for commit in taken]


@given(
    surface=st.integers(0, 1000),
    order=st.integers(0, 1000),
    num_workers=st.integers(2, 40),
    failing=st.sampled_from([0.0, 0.2, 0.9]),
    chains=st.sampled_from([1, 1, 3]),
    speculation=st.sampled_from(["auto", "off", 1, 3, 1000]),
    patience=st.sampled_from([None, 4]),
    jump=st.sampled_from([0.0, 0.3]),
    candidates=st.sampled_from([1, 100]),
)
def test_any_number_of_workers_takes_the_same_steps(
    surface, order, num_workers, failing, chains, speculation, patience, jump, candidates
):
    arguments = {"chains": chains, "patience": patience, "reheat_above": 0.3}
    arguments |= {"restart_jump": jump, "candidates": candidates}
    rewards = table(surface, failing)
    one, _ = run(rewards, speculation="off", **arguments)
    many, _ = run(rewards, num_workers, order, speculation=speculation, **arguments)

    assert steps(many) == steps(one)
    assert many.best == one.best


@given(
    surface=st.integers(0, 1000),
    num_workers=st.integers(1, 20),
    num_reported=st.sampled_from([1, 4, 8, 24]),
    failing=st.sampled_from([0.0, 0.2]),
)
def test_races_take_the_same_steps_however_the_rewards_arrive(
    surface, num_workers, num_reported, failing
):
    race = Race(alpha=0.2, stride=4)
    rewards = table(surface, failing)
    one, _ = run(rewards, num_reported=4, race=race)
    many, _ = run(rewards, num_workers, surface, num_reported, race=race)

    # A failed evaluation may have lost its race before it failed: a rejection either way.
    assert [taken[:2] for taken in steps(many)] == [taken[:2] for taken in steps(one)]
    assert many.best == one.best


def test_the_steps_are_those_of_the_chain_alone():
    rewards = table(3)
    search, _ = run(rewards, num_workers=7, seeds=MIDDLE)
    chain = Chain(Annealing(tuple(SPACE.values()), ((0.5, 0.5),), num_steps=39), 5)
    state = chain.start()
    for commit in search.commits:
        state = chain.advance(state, Observation(chain.propose(state), commit.seen.reward))
        assert (commit.seen, commit.state) == (state.history[-1], state)
    assert state.finished


def test_one_worker_evaluates_nothing_in_vain():
    search, count = run(table(1))

    assert count == len({commit.seen.point for commit in search.commits})


def test_off_leaves_no_more_than_one_evaluation_a_chain_under_way():
    search = AnnealingSearch(SPACE, speculation="off", chains=3, max_steps=30)

    assert [search.suggest(str(i)) is not None for i in range(5)] == [True] * 3 + [False] * 2


def test_a_number_limits_what_is_under_way():
    search = AnnealingSearch(SPACE, speculation=4)

    assert [search.suggest(str(i)) is not None for i in range(6)] == [True] * 4 + [False] * 2


def test_auto_suggests_nothing_that_is_hardly_ever_needed():
    search = AnnealingSearch(SPACE, seeds=MIDDLE, **REFERENCE)
    found = [search.suggest(str(i)) for i in range(2000)]
    ids = [str(i) for i, config in enumerate(found) if config is not None]

    assert 20 < len(ids) < 1000
    assert min(map(search.likelihood, ids)) >= 0.01


def test_the_chains_next_step_is_certain_and_what_follows_is_less_so():
    search = AnnealingSearch(SPACE, seeds=MIDDLE, **REFERENCE)
    likelihoods = []
    for number in range(30):
        likelihoods.append(search.next_likelihood)
        search.suggest(str(number))
        assert search.likelihood(str(number)) == likelihoods[-1]

    assert likelihoods[0] == 1
    assert likelihoods == sorted(likelihoods, reverse=True)
    assert likelihoods[1] < 1


def test_an_evaluation_that_the_chain_has_passed_by_is_dead():
    search = AnnealingSearch(SPACE, seeds=MIDDLE, max_steps=10, **REFERENCE)
    points = {str(i): search.suggest(str(i)) for i in range(8)}
    search.on_trial_complete("0", {"reward": 0.0})
    # The first proposal of the chain gains: what assumed that it would not is dead.
    search.on_trial_complete("1", {"reward": 1.0})
    dead = [name for name in points if name not in "01" and search.likelihood(name) == 0]
    alive = [name for name in points if name not in "01" and search.likelihood(name) > 0]

    assert dead
    for name in dead:
        search.on_trial_complete(name, {"reward": 99.0})
    assert search.best.seen.reward == 1.0
    assert sorted([*dead, *alive]) == sorted(name for name in points if name not in "01")


def test_seeds_are_evaluated_together():
    seeds = [{"x": x, "y": 0.5} for x in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)]
    search = AnnealingSearch(SPACE, seeds=seeds, lag=2)

    assert [search.suggest(str(i)) for i in range(7)] == seeds
    assert [search.likelihood(str(i)) for i in range(7)] == [1.0] * 7


@pytest.mark.parametrize("lag", [0, 2, 5])
def test_with_a_surrogate_it_looks_as_far_ahead_as_the_lag(lag):
    search = AnnealingSearch(SPACE, seeds=MIDDLE, lag=lag, speculation=1000)
    search.suggest("seed")
    search.on_trial_complete("seed", {"reward": 0.0})
    found = [search.suggest(str(i)) for i in range(100)]

    assert lag < sum(config is not None for config in found) <= 2 ** (lag + 1) - 1


def test_chains_share_the_steps_and_the_seeds():
    seeds = [{"x": x, "y": 0.5} for x in (0.1, 0.3, 0.5)]
    search, _ = run(table(2), num_workers=5, seeds=seeds, chains=2, max_steps=21)
    by_chain = [[c for c in search.commits if c.chain == number] for number in (0, 1)]

    assert [len(commits) for commits in by_chain] == [11, 10]
    assert [c.seen.point[0] for c in by_chain[0][:2]] == [0.1, 0.5]
    assert by_chain[1][0].seen.point[0] == 0.3


def test_more_workers_need_fewer_rounds():
    """Rounds, not seconds: every evaluation takes one."""
    rounds = {}
    for num_workers in (1, 8):
        search = AnnealingSearch(SPACE, max_steps=60, seed=1)
        rewards, number, count = table(4), 0, 0
        while not search.finished:
            running = []
            for _ in range(num_workers):
                config = search.suggest(str(number))
                if not isinstance(config, dict):
                    break
                running.append((str(number), config))
                number += 1
            for trial_id, config in running:
                found = math.fsum(rewards(config)) / NUM_PROMPTS
                search.on_trial_complete(trial_id, {"reward": found})
            count += 1
        rounds[num_workers] = count

    assert rounds[1] == 60
    assert rounds[8] <= 0.5 * rounds[1]


def test_a_tree_stops_where_its_chain_ends():
    chain = Chain(Annealing(((0.0, 1.0),), ((0.5,),), num_steps=3))
    known = {}
    tree = Speculation(chain, lambda chain, state, point: known.get(point))
    found = list(tree.walk())

    assert len(found) == 1 + 1 * 2 + 4 + 8
    assert sum(likelihood for likelihood, _ in found) == pytest.approx(4)
    known[(0.5,)] = Observation((0.5,), 0.0)
    assert [commit.seen.point for commit in tree.commit()] == [(0.5,)]
    assert len(list(tree.walk())) == 1 + 2 + 4
