"""Budget: which limit is exceeded, and how the message names it."""

from dataclasses import fields, replace

import pytest

from search.budget import Budget, Use
from search.config import BudgetSettings

USE = Use(evaluations=10, pictures=100, gpu_hours=1.5, wall_hours=0.25)
LIMITS = tuple(field.name for field in fields(Use))


def budget(**limits):
    return Budget(steps=1, **limits)


def test_without_a_limit_no_use_is_too_much():
    assert budget().exceeded(Use(10**9, 10**9, 1e9, 1e9)) is None


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_may_be_reached_but_not_exceeded(name):
    limit = getattr(USE, name)

    assert budget(**{name: limit}).exceeded(USE) is None
    assert budget(**{name: limit}).exceeded(replace(USE, **{name: limit + 1})) is not None


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_counts_its_own_kind_of_use_only(name):
    plenty = {other: 1e6 for other in LIMITS if other != name}

    assert budget(**{name: getattr(USE, name)}).exceeded(replace(USE, **plenty)) is None


@pytest.mark.parametrize("name", LIMITS)
def test_zero_is_a_limit(name):
    assert budget(**{name: 0}).exceeded(USE).startswith(f"budget.{name}=0 ")


def test_the_first_of_several_exceeded_limits_is_named():
    for number, name in enumerate(LIMITS):
        exceeded = budget(**dict.fromkeys(LIMITS[number:], 0)).exceeded(USE)

        assert exceeded.startswith(f"budget.{name}=")


@pytest.mark.parametrize(
    ("name", "limit", "message"),
    [
        ("evaluations", 9, "budget.evaluations=9 (going on would come to 10)"),
        (
            "pictures",
            99,
            "budget.pictures=99 (going on would come to 100, re-ranking and validation included)",
        ),
        (
            "gpu_hours",
            1.0,
            "budget.gpu_hours=1 (going on would come to 1.5, re-ranking and validation included)",
        ),
        (
            "wall_hours",
            0.125,
            "budget.wall_hours=0.125 (going on would come to 0.25, re-ranking and validation "
            "included)",
        ),
    ],
    ids=LIMITS,
)
def test_the_message_says_the_setting_and_what_going_on_would_take(name, limit, message):
    assert budget(**{name: limit}).exceeded(USE) == message


def test_large_counts_are_written_in_full():
    exceeded = budget(pictures=1_234_567).exceeded(replace(USE, pictures=2_345_678))

    assert exceeded.startswith("budget.pictures=1234567 (going on would come to 2345678,")


def test_every_limit_that_can_be_set_is_looked_at():
    settings = set(BudgetSettings.model_fields)

    assert settings == {field.name for field in fields(Budget)} == {"steps", *LIMITS}
