"""Comparison: the interval of paired differences, its verdict, and which prompts tell most."""

import statistics

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from search.comparison import Comparison, compare, telling

# At least 16 prompts, each with one noise.
MAGNITUDES = st.lists(st.floats(0.01, 1), min_size=8, max_size=20)
DIFFERENCES = st.lists(st.floats(-2, 2), min_size=16, max_size=40)


def compared(differences, level=0.0):
    """Compare rewards that differ so much from those of a dense model, which are all equal."""
    texts = [f"prompt {number}" for number in range(len(differences))]
    return compare([level + each for each in differences], [level] * len(differences), texts)


def between(low, high):
    return Comparison((low + high) / 2, low, high, num_prompts=20, num_texts=20)


def students(differences):
    """The 95% interval of the mean, by scipy."""
    mean, error = statistics.fmean(differences), stats.sem(differences)
    return stats.t.interval(0.95, len(differences) - 1, mean, error)


@given(MAGNITUDES, st.floats(-1, 1))
def test_the_interval_of_symmetric_differences_is_students(magnitudes, shift):
    differences = [shift + sign * each for each in magnitudes for sign in (1, -1)]
    comparison = compared(differences)

    assert comparison.num_prompts == len(differences)
    assert comparison.difference == pytest.approx(shift, abs=1e-12)
    assert (comparison.low, comparison.high) == pytest.approx(students(differences), abs=1e-9)


@given(DIFFERENCES)
def test_no_interval_is_narrower_than_students(differences):
    assume(statistics.stdev(differences) > 1e-6)
    comparison = compared(differences)
    low, high = students(differences)

    assert comparison.difference == pytest.approx(statistics.fmean(differences), abs=1e-12)
    assert comparison.low <= low + 1e-9
    assert comparison.high >= high - 1e-9


@given(DIFFERENCES)
def test_comparing_the_other_way_round_mirrors_the_interval(differences):
    assume(statistics.stdev(differences) > 1e-6)
    there, back = compared(differences), compared([-each for each in differences])

    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=1e-9)


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [(0.5, "better"), (0.0, "no difference shown"), (-0.5, "worse")],
)
def test_the_verdict_follows_the_interval(shift, verdict):
    comparison = compared([shift + 0.1, shift - 0.1] * 10, level=0.3)

    assert comparison.verdict == verdict
    assert comparison.difference == pytest.approx(shift)
    # t(0.975, 19) = 2.0930 times the standard error of twenty alternating +-0.1.
    width = 2 * 2.0930 * 0.1 / 19**0.5
    assert comparison.high - comparison.low == pytest.approx(width, rel=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (5e-324, 1.0, "better"),
        (0.0, 1.0, "no difference shown"),
        (-1.0, 0.0, "no difference shown"),
        (-1.0, -5e-324, "worse"),
    ],
)
def test_an_interval_that_touches_zero_shows_no_difference(low, high, verdict):
    assert between(low, high).verdict == verdict


def test_equal_rewards_are_neither_better_nor_worse():
    assert compared([0.0] * 16, level=0.5).verdict not in {"better", "worse"}


def test_evaluations_on_different_numbers_of_prompts_are_not_compared():
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        compare([0.5] * 16, [0.5] * 17, ["a cat"] * 16)


# --- which prompts are shown -----------------------------------------------------------------

GAINS = st.lists(st.floats(-2, 2), max_size=30)


@given(GAINS, st.integers(0, 40))
def test_half_come_as_they_are_and_the_others_tell_most(gains, count):
    found = telling(gains, count)
    chosen = [*found.first, *found.gains, *found.losses]

    assert len(chosen) == len(set(chosen)) <= count
    assert found.first == list(range(min((count + 1) // 2, len(gains))))
    assert all(gains[number] > 0 for number in found.gains)
    assert all(gains[number] < 0 for number in found.losses)
    others = [gain for number, gain in enumerate(gains) if number not in chosen]
    if found.gains:
        assert min(gains[number] for number in found.gains) >= max(others, default=-9)
    if found.losses:
        assert max(gains[number] for number in found.losses) <= min(others, default=9)


@given(GAINS, st.integers(0, 40))
def test_gains_and_losses_share_the_other_half_the_most_telling_first(gains, count):
    found = telling(gains, count)
    left = gains[len(found.first) :]
    num_losses = (count - len(found.first)) // 2
    num_gains = count - len(found.first) - num_losses

    values = [gains[number] for number in found.gains]
    assert values == sorted((gain for gain in left if gain > 0), reverse=True)[:num_gains]
    values = [gains[number] for number in found.losses]
    assert values == sorted(gain for gain in left if gain < 0)[:num_losses]


def test_of_an_odd_number_of_prompts_the_first_and_the_gains_have_one_more():
    gains = [0.0] * 4 + [0.1, 0.3, 0.2, -0.1, -0.3, -0.2]

    assert telling(gains, 7) == ([0, 1, 2, 3], [5, 6], [8])
    assert telling(gains, 6) == ([0, 1, 2], [5, 6], [8])
    assert telling(gains, 1) == ([0], [], [])


def test_a_prompt_without_a_difference_is_neither_a_gain_nor_a_loss():
    gains = [0.0] * 5 + [0.1, 0.0, 0.0, -0.1]

    assert telling(gains, 9) == ([0, 1, 2, 3, 4], [5], [8])
