import math

import pytest
from ray.tune.search import Searcher

from search.racing import Race
from search.searchers import AnnealingSearch

SPACE = {"down": (0.1, 0.8), "mid": (0.1, 0.8), "up": (0.1, 0.8)}


def reward(config):
    return -sum((config[name] - at) ** 2 for name, at in zip(SPACE, (0.6, 0.3, 0.4), strict=True))


def run(search, max_steps=1000):
    """Suggest and report until it is finished; every suggestion."""
    found = []
    while len(found) < max_steps:
        config = search.suggest(f"trial{len(found)}")
        if config == Searcher.FINISHED:
            break
        found.append(config)
        search.on_trial_complete(f"trial{len(found) - 1}", {"reward": reward(config)})
    return found


def test_it_improves_on_where_it_started():
    search = AnnealingSearch(SPACE, seed=0, max_steps=60)
    found = run(search)

    assert search.best.seen.reward == max(map(reward, found)) > reward(found[0]) + 0.01


def test_mode_min_goes_down():
    search = AnnealingSearch({"x": (-1.0, 1.0)}, metric="loss", mode="min", max_steps=80)
    for step in range(80):
        config = search.suggest(str(step))
        search.on_trial_complete(str(step), {"loss": (config["x"] - 0.3) ** 2})

    assert search.best.seen.point[0] == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("result", [None, {}, {"reward": math.nan}, {"reward": -math.inf}])
def test_a_trial_without_a_finite_result_is_a_rejection(result):
    search = AnnealingSearch(SPACE)
    search.suggest("a")
    search.on_trial_complete("a", {"reward": 0.5})
    search.suggest("b")
    search.on_trial_complete("b", result)

    assert search.commits[-1].state.event == "fail"
    assert search.best.seen.reward == 0.5


def test_unknown_and_late_results_are_ignored():
    search = AnnealingSearch(SPACE)
    search.suggest("a")
    search.on_trial_complete("nobody's", {"reward": 9.0})
    search.on_trial_complete("a", {"reward": 0.5})
    search.on_trial_complete("a", {"reward": 9.0})

    assert [commit.seen.reward for commit in search.commits] == [0.5]


def test_restored_into_a_blank_searcher_it_goes_on_the_same(tmp_path):
    one = AnnealingSearch(SPACE, seed=1, max_steps=40)
    run(one, max_steps=15)
    one.suggest("pending")
    one.save(str(tmp_path / "state"))
    other = AnnealingSearch(SPACE, seed=1, max_steps=40)
    other.restore(str(tmp_path / "state"))
    one.on_trial_complete("pending", error=True)
    other.suggest("pending again")
    other.on_trial_complete("pending again", error=True)

    assert run(other) == run(one)


def state_of(search):
    return [(commit.chain, commit.seen, commit.state) for commit in search.commits]


def test_a_blank_searcher_takes_the_arguments_and_what_is_pending_from_the_one_saved(tmp_path):
    def result(config):
        return {"loss": -reward(config), "rewards": [-reward(config)] * 16}

    one = AnnealingSearch(
        SPACE,
        metric="loss",
        mode="min",
        seed=7,
        max_steps=30,
        seeds=[dict.fromkeys(SPACE, 0.3), dict.fromkeys(SPACE, 0.6)],
        chains=2,
        race=Race(0.1, stride=4),
        cooling=0.9,
    )
    for number in range(12):
        config = one.suggest(str(number))
        one.on_trial_complete(str(number), result(config))
    pending = {name: one.suggest(name) for name in ("a", "b")}
    one.save(str(tmp_path / "state"))
    other = AnnealingSearch({"x": (0, 1)})
    other.set_max_concurrency(2)
    other.restore(str(tmp_path / "state"))

    assert state_of(other) == state_of(one)
    for search in (one, other):
        search.on_trial_result("a", {"rewards": [-1.0] * 8})
        for name, config in pending.items():
            search.on_trial_complete(name, result(config))
    assert state_of(other) == state_of(one)
    assert other.race == one.race
    assert [other.suggest(name) is None for name in "cde"] == [False, False, True]


def test_a_point_that_was_pending_may_be_evaluated_again_and_its_first_result_counts(tmp_path):
    one = AnnealingSearch(SPACE, seed=1)
    config = one.suggest("before")
    one.save(str(tmp_path / "state"))
    other = AnnealingSearch(SPACE)
    other.restore(str(tmp_path / "state"))

    assert other.suggest("again") == config
    other.on_trial_complete("before", {"reward": 0.5})
    other.on_trial_complete("again", {"reward": 9.0})
    assert [commit.seen.reward for commit in other.commits] == [0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"x": (1, 1)}}, "give low < high"),
        ({"space": SPACE, "max_steps": 0}, "less than the 1 seeds"),
        ({"space": SPACE, "speculation": 0}, "give auto, off or a count from 1 up"),
        ({"space": SPACE, "speculation": "on"}, "give auto, off or a count from 1 up"),
        ({"space": SPACE, "chains": 0}, "give 1 to max_steps, 120"),
        ({"space": SPACE, "chains": 121}, "give 1 to max_steps, 120"),
    ],
)
def test_a_space_or_budget_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnnealingSearch(**arguments)


def test_the_best_of_what_is_known_becomes_a_starting_point():
    search = AnnealingSearch(SPACE, seeds=[dict.fromkeys(SPACE, 0.3)], max_steps=10)
    for value in (0.2, 0.7, 0.5):
        search.add_evaluated_point(dict.fromkeys(SPACE, value), value)
    search.suggest("a")
    search.on_trial_complete("a", {"reward": 0.1})

    assert [commit.seen.point for commit in search.commits] == [(0.3,) * 3, (0.7,) * 3]
    assert search.commits[-1].state.current == (0.7,) * 3


def test_what_is_known_is_not_suggested_again():
    whole = AnnealingSearch(SPACE, seed=2, max_steps=12)
    found = run(whole)
    other = AnnealingSearch(SPACE, seed=2, max_steps=12)
    other.suggest("a")
    for config in found[3:6]:
        other.add_evaluated_point(config, reward(config))
    other.on_trial_complete("a", {"reward": reward(found[0])})

    assert [*found[1:3], *found[6:]] == run(other)
    assert [commit.seen.point for commit in other.commits] == [
        commit.seen.point for commit in whole.commits
    ]


@pytest.mark.parametrize("by_prompt", [True, False])
def test_what_it_begins_with_is_raced_against_if_its_rewards_by_prompt_are_known(by_prompt):
    rewards = [0.9, 1.1] * 8
    search = AnnealingSearch(SPACE, seeds=[dict.fromkeys(SPACE, 0.3)], race=Race(0.05, stride=4))
    best = dict.fromkeys(SPACE, 0.7)
    search.add_evaluated_point(best, 1.0, intermediate_values=rewards if by_prompt else None)
    search.suggest("seed")
    search.on_trial_complete("seed", {"reward": 0.0, "rewards": [-0.1, 0.1] * 8})
    search.suggest("next")
    search.on_trial_result("next", {"rewards": [-0.1, 0.1, -0.2, 0.2]})

    assert len(search.commits) == (3 if by_prompt else 2)
    assert search.commits[-1].seen.stopped == by_prompt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "maximum"}, "mode is 'maximum': choose max or min"),
        ({"coolin": 0.9}, "no parameter coolin: choose of candidates, cooling, "),
        ({"bounds": ()}, "no parameter bounds"),
    ],
)
def test_what_it_does_not_know_is_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnnealingSearch(SPACE, **arguments)
