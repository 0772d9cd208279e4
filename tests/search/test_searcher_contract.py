"""What Ray Tune and its users may expect of any searcher, asked of every searcher of ours."""

import functools
import itertools
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import ray.cloudpickle
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import ConcurrencyLimiter, Searcher

from search.baselines import BASELINES, baseline
from search.searchers import AnnealingSearch

SPACE = {"down": (0.1, 0.8), "mid": (0.1, 0.8), "up": (0.1, 0.8)}
SEARCHERS = ("annealing", *BASELINES)
# So many evaluations that the Gaussian process, the slow one, has begun to suggest.
SOME = 13
ENOUGH = 27  # The grid has no number of points between 8 and 27.

every = pytest.mark.parametrize("name", SEARCHERS)
trial_ids = (f"trial{number}" for number in itertools.count())


def make(name, space=SPACE, *, seed=0, mode="max", num_evaluations=ENOUGH, **annealing):
    if name == "annealing":
        return AnnealingSearch(space, seed=seed, mode=mode, max_steps=num_evaluations, **annealing)
    return baseline(name, space, seed, mode=mode, num_evaluations=num_evaluations)


def reward(config):
    return -sum((config[name] - at) ** 2 for name, at in zip(SPACE, (0.6, 0.3, 0.4), strict=True))


def report(config):
    return {"result": {"reward": reward(config)}}


def evaluate(search, steps=1000, report=report):
    """Suggest and report one after the other, until it is finished; the suggestions."""
    found = []
    for trial_id in itertools.islice(trial_ids, steps):
        config = search.suggest(trial_id)
        if config == Searcher.FINISHED:
            break
        assert config is not None, "nothing is under way, yet there is no suggestion"
        found.append(config)
        search.on_trial_complete(trial_id, **report(config))
    return found


def inside(config, space=SPACE):
    return config.keys() == space.keys() and all(
        low <= config[name] <= high for name, (low, high) in space.items()
    )


# --- suggestions ----------------------------------------------------------------------------


@every
def test_suggestions_stay_in_the_space_even_if_the_best_is_in_a_corner(name):
    found = evaluate(make(name), SOME, lambda c: {"result": {"reward": sum(c.values())}})

    assert len(found) == SOME
    assert all(inside(config) for config in found)


@every
def test_equal_seeds_give_equal_suggestions(name):
    assert evaluate(make(name), SOME) == evaluate(make(name), SOME)


@pytest.mark.parametrize("name", [name for name in SEARCHERS if name != "grid"])
def test_other_seeds_give_other_suggestions(name):
    # Annealing begins with eight starting points, the same for all seeds.
    assert evaluate(make(name, seed=1), SOME) != evaluate(make(name, seed=2), SOME)


@every
def test_it_is_finished_after_its_evaluations_and_stays_so(name):
    num_evaluations = SOME if name == "gp" else ENOUGH
    search = make(name, num_evaluations=num_evaluations)

    assert len(evaluate(search)) == num_evaluations
    assert search.suggest("one more") == search.suggest("and another") == Searcher.FINISHED


@every
def test_going_down_is_going_up_in_the_mirror(name):
    down = evaluate(
        make(name, mode="min"), SOME, lambda config: {"result": {"reward": -reward(config)}}
    )

    assert down == evaluate(make(name), SOME)


# --- results that are not what they should be -----------------------------------------------

UNUSABLE = {
    "nan": {"result": {"reward": math.nan}},
    "infinity": {"result": {"reward": math.inf}},
    "minus infinity": {"result": {"reward": -math.inf}},
    "None": {"result": {"reward": None}},
    "no metric": {"result": {"loss": 0.5}},
    "an empty result": {"result": {}},
    "no result": {"result": None},
    "an error after a result": {"result": {"reward": 9.0}, "error": True},
}
unusable = pytest.mark.parametrize("unusable", UNUSABLE.values(), ids=UNUSABLE)


@functools.cache
def after_an_error(name):
    return after(name, {"result": None, "error": True})


def after(name, outcome):
    """The suggestions if the third has this outcome and all others have a reward."""
    search = make(name)
    first = evaluate(search, 2)
    third = evaluate(search, 1, lambda _: outcome)
    return first + third + evaluate(search, SOME - 3)


@every
@unusable
def test_an_unusable_result_is_no_more_than_an_error(name, unusable):
    assert after(name, unusable) == after_an_error(name)


@every
@unusable
def test_it_goes_on_if_no_result_is_usable(name, unusable):
    found = evaluate(make(name), ENOUGH, lambda _: unusable)

    # Annealing does not suggest again what it proposes for a second time.
    assert ENOUGH - 2 * (name == "annealing") <= len(found) <= ENOUGH
    assert all(inside(config) for config in found)


@every
def test_results_again_and_after_the_end_change_nothing(name):
    search, expected = make(name), evaluate(make(name), SOME)
    found = []
    for step, best in enumerate(expected):
        trial_id = f"again{step}"
        found.append(search.suggest(trial_id))
        search.on_trial_complete(trial_id, {"reward": reward(best)})
        search.on_trial_complete(trial_id, {"reward": 9.0})
        search.on_trial_complete(trial_id, error=True)
        search.on_trial_result(trial_id, {"reward": 9.0, "training_iteration": 2})

    assert found == expected


@every
def test_intermediate_results_change_nothing(name):
    search, expected = make(name), evaluate(make(name), SOME)
    found = []
    for step, best in enumerate(expected):
        trial_id = f"intermediate{step}"
        found.append(search.suggest(trial_id))
        for value in (0.1, 0.1, math.nan, math.inf, None):
            search.on_trial_result(trial_id, {"reward": value, "training_iteration": 1})
        search.on_trial_result(trial_id, {"training_iteration": 1})
        search.on_trial_complete(trial_id, {"reward": reward(best)})

    assert found == expected


@every
def test_unknown_trials_change_nothing(name):
    search = make(name)
    search.on_trial_complete("nobody's", {"reward": 9.0})
    search.on_trial_result("nobody's", {"reward": 9.0, "training_iteration": 1})
    found = evaluate(search, 3)
    search.on_trial_complete("nobody's", error=True)
    search.on_trial_complete("nobody's", {"reward": 9.0})

    assert found + evaluate(search, SOME - 3) == evaluate(make(name), SOME)


# --- several at a time ----------------------------------------------------------------------


@every
def test_results_may_come_in_another_order(name):
    search, under_way, found = make(name, num_evaluations=SOME), {}, []
    search.set_max_concurrency(3)
    for trial_id in itertools.islice(trial_ids, 300):
        config = search.suggest(trial_id) if len(under_way) < 3 else None
        if isinstance(config, dict):
            under_way[trial_id] = config
            found.append(config)
            continue
        if config == Searcher.FINISHED and not under_way:
            break
        last, config = under_way.popitem()
        search.on_trial_complete(last, **report(config))
    else:
        pytest.fail("it does not come to an end")

    assert len(found) >= 8
    assert all(inside(config) for config in found)


@every
def test_ray_limits_how_many_are_under_way(name):
    search = ConcurrencyLimiter(make(name), max_concurrent=2)
    for batch in "abc":
        asked = {batch + number: search.suggest(batch + number) for number in "1234"}
        under_way = [trial_id for trial_id, config in asked.items() if config is not None]
        for trial_id in under_way:
            search.on_trial_complete(trial_id, **report(asked[trial_id]))

        assert 1 <= len(under_way) <= 2


# --- saved, restored, pickled ---------------------------------------------------------------


@every
@pytest.mark.parametrize(("before", "after"), [(0, 5), (5, 5), (SOME - 1, 2)])
def test_restored_into_a_blank_searcher_it_goes_on_as_in_one_go(name, before, after, tmp_path):
    one = make(name)
    found = evaluate(one, before)
    one.save(str(tmp_path / "state"))
    other = make(name)
    other.restore(str(tmp_path / "state"))
    found += evaluate(other, after)

    assert found == evaluate(make(name), before + after)


def blank(name):
    """A searcher of the kind that is to be restored, with other arguments."""
    space = {parameter: (0.0, 0.9) for parameter in SPACE}
    return make(name, space, seed=99, mode="min", num_evaluations=8)


@every
def test_restored_into_one_of_other_arguments_it_is_the_one_that_was_saved(name, tmp_path):
    one = make(name, seed=4)
    found = evaluate(one, 9)
    one.save(str(tmp_path / "state"))
    other = blank(name)
    other.restore(str(tmp_path / "state"))
    found += evaluate(other, SOME - 9)

    assert found == evaluate(make(name, seed=4), SOME)


@every
def test_a_result_counts_if_its_trial_was_under_way_when_the_searcher_was_saved(name, tmp_path):
    one = make(name)
    evaluate(one, 9)
    config = one.suggest("under way")
    one.save(str(tmp_path / "state"))
    other = blank(name)
    other.restore(str(tmp_path / "state"))
    for search in (one, other):
        search.on_trial_complete("under way", **report(config))
    expected, found = evaluate(one, 5), evaluate(other, 5)

    assert found == expected
    assert config not in found


@every
def test_a_trial_under_way_when_it_was_saved_may_end_after_it_was_restored(name, tmp_path):
    one = make(name, num_evaluations=9 if name != "grid" else 8)
    num_before = len(evaluate(one, 3)) + 1
    config = one.suggest("under way")
    one.save(str(tmp_path / "state"))
    other = make(name, num_evaluations=9 if name != "grid" else 8)
    other.restore(str(tmp_path / "state"))
    other.on_trial_complete("under way", **report(config))
    num_after = len(evaluate(other))

    # It may have been suggested again.
    assert num_before + num_after in ((9, 10) if name != "grid" else (8,))


@every
@pytest.mark.parametrize("pickler", [pickle, ray.cloudpickle], ids=["pickle", "cloudpickle"])
def test_pickled_it_goes_on_the_same(name, pickler):
    search = make(name)
    evaluate(search, 5)
    other = pickler.loads(pickler.dumps(search))

    assert evaluate(other, 5) == evaluate(search, 5)


# --- evaluated before -----------------------------------------------------------------------

AT = {"down": 0.2, "mid": 0.5, "up": 0.33}
EVALUATED = {
    "finite": {"value": 0.5},
    "numbers on the way": {"value": 0.5, "intermediate_values": [0.1, 0.3, 0.5]},
    "nan": {"value": math.nan},
    "infinity": {"value": math.inf},
    "minus infinity": {"value": -math.inf},
    "error": {"value": None, "error": True},
    "error after a value": {"value": 9.0, "error": True},
    "pruned": {"value": 0.4, "pruned": True},
    "pruned without a value": {"value": None, "pruned": True},
}


@every
@pytest.mark.parametrize("evaluated", EVALUATED.values(), ids=EVALUATED)
def test_points_evaluated_before_are_taken(name, evaluated):
    search = make(name)
    search.add_evaluated_point(AT, **evaluated)
    search.add_evaluated_point({**AT, "and": "others"}, **evaluated)
    found = evaluate(search, SOME)

    assert len(found) == SOME
    assert all(inside(config) for config in found)


@every
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_point_evaluated_before_without_a_finite_value_is_no_more_than_an_error(name, value):
    one, other = make(name), make(name)
    one.add_evaluated_point(AT, value)
    other.add_evaluated_point(AT, 0.5, error=True)

    assert evaluate(one, SOME) == evaluate(other, SOME)


@every
def test_a_point_evaluated_before_outside_the_space_changes_nothing(name):
    search = make(name)
    search.add_evaluated_point({**AT, "down": 0.9}, 9.0)

    assert evaluate(search, 5) == evaluate(make(name), 5)


@every
def test_a_point_evaluated_before_that_lacks_a_parameter_is_refused(name):
    with pytest.raises(ValueError, match="up"):
        make(name).add_evaluated_point({"down": 0.2, "mid": 0.5}, 0.5)


@pytest.mark.parametrize("name", ["annealing", "tpe", "gp"])
def test_it_learns_from_points_evaluated_before(name):
    starts = {"seeds": [dict.fromkeys(SPACE, 0.45)]} if name == "annealing" else {}
    search = make(name, **starts)
    for down, mid, up in itertools.product((0.45, 0.6, 0.75), (0.2, 0.3, 0.6), (0.2, 0.4)):
        config = {"down": down, "mid": mid, "up": up}
        search.add_evaluated_point(config, reward(config))
    warm, cold = evaluate(search, 8), evaluate(make(name, **starts), 8)

    assert sum(map(reward, warm)) > sum(map(reward, cold))


@every
def test_points_evaluated_before_are_saved(name, tmp_path):
    one = make(name)
    one.add_evaluated_point(AT, 0.5)
    one.save(str(tmp_path / "state"))
    other = make(name)
    other.restore(str(tmp_path / "state"))

    assert evaluate(other, 5) == evaluate(one, 5)


@every
def test_trials_evaluated_before_are_taken(name):
    trials = []
    for status, result in (
        (Trial.TERMINATED, {"reward": 0.5, "done": True}),
        (Trial.TERMINATED, {"reward": math.nan, "done": True}),
        (Trial.TERMINATED, {"reward": 0.2, "done": False}),  # Pruned.
        (Trial.TERMINATED, {"done": True}),
        (Trial.ERROR, {"reward": 0.7}),
        (Trial.ERROR, {}),
    ):
        trial = Trial("nothing", stub=True, config=dict(AT))
        trial.set_status(status)
        trial.run_metadata.last_result = {"trial_id": trial.trial_id, "config": AT, **result}
        trials.append(trial)
    search = make(name)
    search.add_evaluated_trials(trials, metric="reward")
    search.add_evaluated_trials(trials[0], metric="reward")

    assert all(inside(config) for config in evaluate(search, SOME))


# --- convergence ----------------------------------------------------------------------------

# Steps for a space that is 20 wide and a loss of up to 400.
LARGE_STEPS = {"initial_temperature": 10.0, "step_size": 5.0, "min_step_size": 0.05}
# The largest x at which x^2 is at its least; none of the last three learns.
REACHED = {
    "annealing": 1e-2,
    "tpe": 2e-2,
    "gp": 1e-6,
    "cmaes": 2e-2,
    "qmc": 0.5,
    "random": 0.5,
    "grid": 0.0,
}


@every
@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_least_x_squared(name, seed):
    search = make(
        name,
        {"x": (0.0, 20.0)},
        seed=seed,
        mode="min",
        num_evaluations=25 if name == "gp" else 100,
        **(LARGE_STEPS if name == "annealing" else {}),
    )
    found = evaluate(search, 100, lambda config: {"result": {"reward": config["x"] ** 2}})

    assert min(config["x"] for config in found) <= REACHED[name]


# --- in company -----------------------------------------------------------------------------


def say_nothing():
    """Whatever might make a searcher talk; run by the test below in a process of its own."""
    for name in SEARCHERS:
        search = make(name)
        search.on_trial_complete("nobody's", {"reward": 0.5})
        for outcome in UNUSABLE.values():
            evaluate(search, 1, lambda _, outcome=outcome: outcome)
        evaluate(search, SOME - 2)
        evaluate(search, 2, lambda _: {"result": {"reward": 0.5}})


def test_they_are_silent():
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import say_nothing; say_nothing()"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# One of each class: Optuna's samplers share theirs.
@pytest.mark.parametrize("name", ["annealing", "tpe", "grid"])
@pytest.mark.usefixtures("module_ray")
def test_it_runs_under_ray_tune(name, tmp_path):
    def objective(config):  # Of nothing in this module: a worker would import all of it.
        tune.report({"reward": math.nan if config["down"] > 0.75 else -config["up"]})

    search = make(name, num_evaluations=9)
    results = tune.Tuner(
        objective,
        tune_config=tune.TuneConfig(
            search_alg=search, num_samples=-1, max_concurrent_trials=2, reuse_actors=True
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), name=name, verbose=0),
    ).fit()
    restored = make(name, num_evaluations=9)
    restored.restore_from_dir(results.experiment_path)

    assert len(results) >= 8
    assert all(inside(result.config) for result in results)
    assert math.isfinite(results.get_best_result("reward", "max").metrics["reward"])
    assert restored.suggest("one more") == Searcher.FINISHED


@pytest.fixture(scope="module")
def analysis(module_ray, tmp_path_factory):
    """A run of Ray Tune: a trial with a result, one with NaN, one that fails."""

    def objective(config):
        if config["fate"] == "error":
            raise RuntimeError("as it should")
        tune.report({"reward": math.nan if config["fate"] == "nan" else 0.5})

    fates = tune.grid_search(["result", "nan", "error"])
    results = tune.Tuner(
        objective,
        param_space={**AT, "fate": fates},
        run_config=tune.RunConfig(storage_path=str(tmp_path_factory.mktemp("ray")), verbose=0),
    ).fit()
    assert len(results) == 3
    assert len(results.errors) == 1
    return tune.ExperimentAnalysis(results.experiment_path)


@every
def test_a_run_of_ray_tune_is_taken_as_evaluated_before(name, analysis):
    search = make(name)
    search.add_evaluated_trials(analysis, metric="reward")

    assert all(inside(config) for config in evaluate(search, 5))
