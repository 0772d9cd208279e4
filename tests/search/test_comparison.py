"""Comparison: the interval of paired differences, its verdict, and which prompts tell most."""

import statistics

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from search.comparison import Comparison, compare, telling

# At least 16 prompts, each with one noise.
REWARDS = st.lists(
    st.tuples(st.floats(-2, 2, allow_nan=False), st.floats(-2, 2, allow_nan=False)),
    min_size=16,
    max_size=40,
)


@given(REWARDS)
def test_the_interval_is_students(pairs):
    rewards, baseline = zip(*pairs, strict=True)
    differences = [a - b for a, b in pairs]
    assume(statistics.stdev(differences) > 1e-9)
    low, high = stats.t.interval(
        0.95, len(pairs) - 1, statistics.fmean(differences), stats.sem(differences)
    )
    comparison = compare(rewards, baseline)

    assert comparison.num_prompts == len(pairs)
    assert comparison.difference == pytest.approx(statistics.fmean(differences), abs=1e-12)
    assert comparison.low == pytest.approx(low, abs=1e-9)
    assert comparison.high == pytest.approx(high, abs=1e-9)


@given(REWARDS)
def test_comparing_the_other_way_round_mirrors_the_interval(pairs):
    rewards, baseline = zip(*pairs, strict=True)
    there, back = compare(rewards, baseline), compare(baseline, rewards)

    assert (back.low, back.high) == (-there.high, -there.low)
    mirrored = {"better": "worse", "worse": "better"}
    assert back.verdict == mirrored.get(there.verdict, there.verdict)


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [(0.5, "better"), (0.0, "no difference shown"), (-0.5, "worse")],
)
def test_the_verdict_follows_the_interval(shift, verdict):
    dense = [0.1 * i for i in range(20)]
    noise = [0.1, -0.1] * 10
    comparison = compare([d + shift + n for d, n in zip(dense, noise, strict=True)], dense)

    assert comparison.verdict == verdict
    assert comparison.difference == pytest.approx(shift)
    # t(0.975, 19) = 2.0930 times the standard error of twenty alternating +-0.1.
    assert comparison.high - comparison.low == pytest.approx(2 * 2.0930 * 0.1 / 19**0.5, rel=1e-3)


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
    assert Comparison((low + high) / 2, low, high, 20).verdict == verdict


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.5, "better"), (0.0, "no difference shown"), (-0.5, "worse")]
)
def test_equal_differences_make_the_interval_a_point(gain, verdict):
    comparison = compare([1.0 + gain] * 16, [1.0] * 16)

    assert comparison.low == comparison.difference == comparison.high == gain
    assert comparison.verdict == verdict


def test_evaluations_on_different_numbers_of_prompts_are_not_compared():
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        compare([0.5] * 16, [0.5] * 17)


# --- which prompts are shown -----------------------------------------------------------------

GAINS = st.lists(st.floats(-2, 2, allow_nan=False), max_size=30)


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
