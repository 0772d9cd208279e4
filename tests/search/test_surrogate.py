import math

import numpy as np
import pytest

from search.surrogate import Surrogate

RNG = np.random.default_rng(0)
POINTS = RNG.uniform(size=(40, 3))
NOWHERE = np.empty((0, 3))


def hill(points):
    return np.exp(-((points - 0.4) ** 2).sum(-1) / 0.2)


def fitted(num_points=40, factor=1.0, offset=0.0):
    points = POINTS[:num_points]
    return Surrogate.fit(points.tolist(), (offset + factor * hill(points)).tolist())


def test_it_predicts_a_smooth_surface():
    places = RNG.uniform(0.1, 0.9, size=(200, 3))
    means = fitted().upper_bounds(places, NOWHERE, exploration=0.0)

    assert np.corrcoef(means, hill(places))[0, 1] > 0.97


def test_there_is_little_to_hope_for_where_it_has_been():
    surrogate = fitted()
    spread = surrogate.upper_bounds(POINTS, NOWHERE, 1.0) - surrogate.upper_bounds(
        POINTS, NOWHERE, 0.0
    )
    corner = np.array([[1.0, 1.0, 0.0]])
    away = surrogate.upper_bounds(corner, NOWHERE, 1.0) - surrogate.upper_bounds(
        corner, NOWHERE, 0.0
    )

    assert spread.max() < away[0]


def test_a_pending_point_lowers_the_hopes_around_it_but_not_the_mean():
    surrogate, there = fitted(), np.array([[0.95, 0.05, 0.95]])
    without, pending = (surrogate.upper_bounds(there, each, 2.0) for each in (NOWHERE, there))
    means = [surrogate.upper_bounds(there, each, 0.0) for each in (NOWHERE, there)]

    assert pending[0] < without[0]
    assert means[0] == pytest.approx(means[1])


@pytest.mark.parametrize(("factor", "offset"), [(0.02, 5.0), (300.0, -1.0)])
def test_neither_scale_nor_offset_changes_what_looks_best(factor, offset):
    places = RNG.uniform(size=(100, 3))
    one, other = (
        each.upper_bounds(places, NOWHERE, 2.0) for each in (fitted(), fitted(40, factor, offset))
    )

    assert np.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("num_points", [1, 2, 5])
def test_a_few_points_suffice(num_points):
    bounds = fitted(num_points).upper_bounds(POINTS, NOWHERE, 2.0)

    assert np.isfinite(bounds).all()


def test_equal_rewards_and_equal_points_are_no_trouble():
    points = [[0.5, 0.5]] * 3 + [[0.1, 0.2]]
    bounds = Surrogate.fit(points, [1.0] * 4).upper_bounds(np.array(points), NOWHERE[:, :2], 2.0)

    assert np.isfinite(bounds).all()


def test_a_hill_as_small_as_rounding_is_none():
    points = [[0.1], [0.5], [0.9]]
    flat = Surrogate.fit(points, [0.0, 0.0, -1.0])
    hill = Surrogate.fit(points, [0.0, 5e-324, -1.0])
    nothing_pending = np.empty((0, 1))

    at = np.array([[0.3], [0.7]])
    assert np.array_equal(
        hill.upper_bounds(at, nothing_pending, 1.0), flat.upper_bounds(at, nothing_pending, 1.0)
    )


def test_a_cliff_does_not_hide_the_hill():
    points = np.vstack([POINTS, RNG.uniform(0.9, 1.0, size=(10, 3))])
    rewards = [*hill(POINTS), *([-1e6] * 10)]
    places = RNG.uniform(0.1, 0.8, size=(200, 3))
    means = Surrogate.fit(points.tolist(), rewards).upper_bounds(places, NOWHERE, 0.0)

    assert math.isfinite(means.max())
    assert hill(places[means.argmax()][None])[0] > 0.8


def test_a_reward_that_is_only_estimated_counts_less():
    points = [[0.2, 0.2], [0.5, 0.5], [0.8, 0.8], [0.5, 0.2]]
    rewards = [0.0, -2.0, 0.4, 1.0]
    there = np.array([[0.5, 0.5]])
    sure, unsure = (
        Surrogate.fit(points, rewards, errors).upper_bounds(there, NOWHERE[:, :2], 0.0)[0]
        for errors in ([0.0] * 4, [0.0, 2.0, 0.0, 0.0])
    )

    assert sure < unsure


def test_it_expects_of_each_prompt_what_its_neighbours_gave():
    each = np.array([0.5, 1.0, -2.0])
    table = hill(POINTS)[:, None] * each
    expected, variance = fitted().expect(np.array([[0.4, 0.45, 0.4]]), table)
    elsewhere, far = fitted().expect(np.array([[9.0, 9.0, 9.0]]), table)

    assert np.allclose(expected, each * hill(np.array([0.4, 0.45, 0.4])), rtol=0.1)
    assert np.allclose(elsewhere, 0.0, atol=1e-6)
    assert 0 < variance < far
