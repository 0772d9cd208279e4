import math

import pytest
from ray import tune
from ray.tune.search import Searcher

from search.annealing import Annealing, Chain
from search.searchers import AnnealingSearch, random_search

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


def test_suggestions_are_those_of_the_chain():
    found = run(AnnealingSearch(SPACE, seed=4, max_evaluations=60))
    chain = Chain(Annealing(tuple(SPACE.values()), ((0.45,) * 3,), num_steps=59), 4)
    state, expected = chain.start(), []
    while not state.finished:
        point = chain.propose(state)
        expected.append(dict(zip(SPACE, point, strict=True)))
        state = chain.advance(state, point, reward(expected[-1]))

    assert found == expected
    assert len(found) == 60


def test_it_improves_on_where_it_started():
    search = AnnealingSearch(SPACE, seed=0, max_evaluations=60)
    found = run(search)

    assert search.state.best_reward == max(map(reward, found)) > reward(found[0]) + 0.01


def test_one_suggestion_at_a_time():
    search = AnnealingSearch(SPACE)

    assert search.suggest("a") is not None
    assert search.suggest("b") is None


def test_mode_min_goes_down():
    search = AnnealingSearch({"x": (-1.0, 1.0)}, metric="loss", mode="min", max_evaluations=80)
    for step in range(80):
        config = search.suggest(str(step))
        search.on_trial_complete(str(step), {"loss": (config["x"] - 0.3) ** 2})

    assert search.state.best[0] == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("result", [None, {}, {"reward": math.nan}, {"reward": -math.inf}])
def test_a_trial_without_a_finite_result_is_a_rejection(result):
    search = AnnealingSearch(SPACE)
    search.suggest("a")
    search.on_trial_complete("a", {"reward": 0.5})
    search.suggest("b")
    search.on_trial_complete("b", result)

    assert search.state.event == "fail"
    assert search.state.best_reward == 0.5


def test_unknown_and_late_results_are_ignored():
    search = AnnealingSearch(SPACE)
    search.suggest("a")
    search.on_trial_complete("nobody's", {"reward": 9.0})
    search.on_trial_complete("a", {"reward": 0.5})
    search.on_trial_complete("a", {"reward": 9.0})

    assert (search.state.step, search.state.best_reward) == (1, 0.5)


def test_restored_into_a_blank_searcher_it_goes_on_the_same(tmp_path):
    one = AnnealingSearch(SPACE, seed=1, max_evaluations=40)
    run(one, max_steps=15)
    one.suggest("pending")
    one.save(str(tmp_path / "state"))
    other = AnnealingSearch(SPACE, seed=1, max_evaluations=40)
    other.restore(str(tmp_path / "state"))
    one.on_trial_complete("pending", error=True)
    other.suggest("pending again")
    other.on_trial_complete("pending again", error=True)

    assert run(other) == run(one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"x": (1, 1)}}, "give low < high"),
        ({"space": SPACE, "max_evaluations": 0}, "less than the 1 seeds"),
    ],
)
def test_a_space_or_budget_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnnealingSearch(**arguments)


def test_random_search_is_seeded_and_stays_in_the_space():
    one, other = random_search(SPACE, 5), random_search(SPACE, 5)
    found = [one.suggest(str(i)) for i in range(20)]

    assert found == [other.suggest(str(i)) for i in range(20)]
    assert all(0.1 <= value <= 0.8 for config in found for value in config.values())
    assert found != [random_search(SPACE, 6).suggest(str(i)) for i in range(20)]


@pytest.mark.usefixtures("local_ray")
def test_annealing_runs_under_ray_tune_by_itself(tmp_path):
    def objective(config):
        tune.report({"reward": reward(config)})

    search = AnnealingSearch(SPACE, metric="reward", mode="max", seed=2, max_evaluations=12)
    results = tune.Tuner(
        objective,
        tune_config=tune.TuneConfig(search_alg=search, num_samples=-1),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()

    assert len(results) == 12
    best = results.get_best_result("reward", "max")
    assert best.metrics["reward"] == search.state.best_reward
