"""Deadline: which trial's actor is killed, and when. The faults tier kills real ones."""

import pytest
from ray.tune.experiment import Trial

from search.deadline import Deadline

TIMEOUT_S = 10.0


class Driver:
    """Ray Tune's loop on a clock of its own, and what came of it.

    events: what the deadline did, in order: ("told", trial's id) and ("killed", actor).
    """

    def __init__(self):
        self.now = 100.0
        self.events = []
        self.limit(TIMEOUT_S)

    def limit(self, timeout_s, load_s=None):
        """Begin anew with these limits."""
        tell = lambda name: self.events.append(("told", name))  # noqa: E731
        self.deadline = Deadline(timeout_s, tell, load_s, clock=lambda: self.now)

    def pass_s(self, seconds, *trials):
        """Let so much time pass, and look at the trials afterwards."""
        self.now += seconds
        self.deadline.on_step_begin(0, list(trials))
        return self.events

    def report(self, trial, **result):
        self.deadline.on_trial_result(0, [trial], trial, result)


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr("ray.kill", lambda actor: made.events.append(("killed", actor)))
    return made


def trial(name, actor, batch=(0,)):
    made = Trial("stub", config={"batch": batch}, stub=True, trial_id=name)
    made.temporary_state.ray_actor = actor
    return made


def test_the_actor_of_an_overdue_trial_is_killed_after_the_search_is_told(driver):
    slow = trial("slow", "actor 1")

    driver.pass_s(1, slow)
    assert driver.pass_s(TIMEOUT_S, slow) == []
    assert driver.pass_s(1, slow) == [("told", "slow"), ("killed", "actor 1")]


def test_other_trials_go_on(driver):
    slow, quick = trial("slow", "actor 1"), trial("quick", "actor 2")

    driver.pass_s(1, slow)
    driver.pass_s(5, slow, quick)
    assert driver.pass_s(6, slow, quick) == [("told", "slow"), ("killed", "actor 1")]


def test_time_counts_from_when_the_trial_has_its_actor(driver):
    waiting = trial("waiting", None)

    driver.pass_s(1, waiting)
    driver.pass_s(1000, waiting)
    waiting.temporary_state.ray_actor = "actor 1"
    driver.pass_s(1, waiting)
    assert driver.pass_s(TIMEOUT_S, waiting) == []
    assert driver.pass_s(1, waiting) == [("told", "waiting"), ("killed", "actor 1")]


def test_a_trial_that_loses_its_actor_has_the_whole_time_with_the_next_one(driver):
    lost = trial("lost", "actor 1")

    driver.pass_s(1, lost)
    driver.pass_s(9, lost)
    lost.temporary_state.ray_actor = None
    driver.pass_s(1, lost)
    lost.temporary_state.ray_actor = "actor 2"
    driver.pass_s(1, lost)
    assert driver.pass_s(TIMEOUT_S, lost) == []


def test_the_next_trial_of_an_actor_has_the_whole_time(driver):
    driver.pass_s(1, trial("first", "actor 1"))
    driver.pass_s(9, trial("first", "actor 1"))
    driver.pass_s(1, trial("second", "actor 1"))

    assert driver.pass_s(9, trial("second", "actor 1")) == []


def test_an_actor_that_dies_slowly_is_not_killed_at_every_look(driver):
    slow = trial("slow", "actor 1")

    driver.pass_s(1, slow)
    killed = [("told", "slow"), ("killed", "actor 1")]
    assert driver.pass_s(TIMEOUT_S + 1, slow) == killed
    assert driver.pass_s(TIMEOUT_S, slow) == killed
    assert driver.pass_s(1, slow) == 2 * killed


def test_trials_are_looked_at_once_a_second(driver):
    slow = trial("slow", "actor 1")

    driver.pass_s(0.75, slow)  # Too early: the trial is first seen at the next look.
    driver.pass_s(0.25, slow)
    assert driver.pass_s(TIMEOUT_S, slow) == []
    assert driver.pass_s(0.75, slow) == []
    assert driver.pass_s(0.25, slow) == [("told", "slow"), ("killed", "actor 1")]


# --- loading, and slow workers ---------------------------------------------------------------

KILLED = [("told", "slow"), ("killed", "actor 1")]


def test_loading_has_a_limit_of_its_own(driver):
    driver.limit(TIMEOUT_S, load_s=100)
    slow = trial("slow", "actor 1")

    driver.pass_s(1, slow)
    assert driver.pass_s(100, slow) == []
    assert driver.pass_s(1, slow) == KILLED


def test_a_batchs_limit_begins_when_its_worker_is_loaded(driver):
    driver.limit(TIMEOUT_S, load_s=100)
    slow = trial("slow", "actor 1")

    driver.pass_s(1, slow)
    driver.pass_s(90, slow)
    driver.report(slow, picture_s=0.1)
    assert driver.pass_s(TIMEOUT_S, slow) == []
    assert driver.pass_s(1, slow) == KILLED


def test_a_slow_worker_has_three_times_what_its_pace_says(driver):
    slow = trial("slow", "actor 1", batch=(0, 1, 2, 3))

    driver.pass_s(1, slow)
    driver.report(slow, picture_s=5.0)
    assert driver.pass_s(60, slow) == []
    assert driver.pass_s(1, slow) == KILLED


def test_a_loaded_worker_stays_so_for_its_next_batch(driver):
    driver.limit(TIMEOUT_S, load_s=100)
    first, slow = trial("first", "actor 1"), trial("slow", "actor 1")

    driver.pass_s(1, first)
    driver.report(first, measured=None)
    driver.pass_s(1, slow)
    assert driver.pass_s(TIMEOUT_S, slow) == []
    assert driver.pass_s(1, slow) == KILLED


@pytest.mark.parametrize("load_s", [None, 100])
def test_without_a_limit_a_batch_may_take_for_ever(driver, load_s):
    driver.limit(None, load_s)
    slow = trial("slow", "actor 1")

    driver.pass_s(1, slow)
    driver.report(slow, picture_s=1.0)
    assert driver.pass_s(1e6, slow) == []
