"""What is the baselines' own; what every searcher has in common is in the contract suite."""

from itertools import product

import pytest
from ray.tune.search import Searcher

from search.baselines import BASELINES, baseline

SPACE = {"down": (0.1, 0.8), "mid": (0.1, 0.8), "up": (0.1, 0.8)}


def points_of(search):
    found = []
    while (config := search.suggest(f"trial{len(found)}")) != Searcher.FINISHED:
        found.append(tuple(config.values()))
        search.on_trial_complete(f"trial{len(found) - 1}", {"reward": 0.5})
    return found


@pytest.mark.parametrize(
    ("num_evaluations", "num_values"), [(8, 2), (26, 2), (27, 3), (64, 4), (120, 4), (125, 5)]
)
def test_the_grid_has_as_many_points_as_fit(num_evaluations, num_values):
    found = points_of(baseline("grid", SPACE, num_evaluations=num_evaluations))

    assert len(set(found)) == len(found) == num_values**3
    assert all({0.1, 0.8} <= set(values) for values in zip(*found, strict=True))


def test_the_grid_goes_from_coarse_to_fine():
    found = points_of(baseline("grid", {"x": (0.0, 4.0), "y": (0.0, 8.0)}, num_evaluations=25))

    assert found[:4] == [(0, 0), (0, 8), (4, 0), (4, 8)]
    assert set(found[:9]) == set(product((0, 2, 4), (0, 4, 8)))
    assert set(found) == set(product((0, 1, 2, 3, 4), (0, 2, 4, 6, 8)))


def test_the_grid_leaves_out_what_is_known():
    search = baseline("grid", SPACE, num_evaluations=27)
    search.add_evaluated_point({"down": 0.1, "mid": 0.45, "up": 0.8000000001}, 0.5)
    search.add_evaluated_point({"down": 0.1, "mid": 0.46, "up": 0.8}, 0.5)
    found = points_of(search)

    assert len(found) == 26
    assert (0.1, 0.45, 0.8) not in found


def test_quasi_random_points_differ_between_seeds_beyond_the_first():
    one, other = (points_of(baseline("qmc", SPACE, seed, num_evaluations=8)) for seed in (1, 2))

    assert not set(one) & set(other)


@pytest.mark.parametrize("name", BASELINES)
def test_a_suggestion_that_was_never_completed_does_not_keep_it_from_ending(name):
    search = baseline(name, {"x": (0.0, 1.0)}, num_evaluations=3)
    asked = [search.suggest(trial_id) for trial_id in "abcd"]

    assert asked[3] == Searcher.FINISHED
    assert Searcher.FINISHED not in asked[:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "hill"}, "no baseline 'hill': choose one of tpe, gp, cmaes, qmc, random, grid"),
        ({"space": {}}, "space is empty"),
        ({"space": {"x": (1, 1)}}, "give low < high"),
        ({"mode": "best"}, "choose max or min"),
        ({"num_evaluations": 0}, "give at least 1"),
        ({"name": "grid", "num_evaluations": 7}, "less than the 8 corners of the grid"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        baseline(**{"name": "tpe", "space": SPACE, **arguments})
