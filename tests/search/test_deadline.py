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
        self.deadline = Deadline(
            TIMEOUT_S, lambda name: self.events.append(("told", name)), clock=lambda: self.now
        )

    def pass_s(self, seconds, *trials):
        """Let so much time pass, and look at the trials afterwards."""
        self.now += seconds
        self.deadline.on_step_begin(0, list(trials))
        return self.events


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr("ray.kill", lambda actor: made.events.append(("killed", actor)))
    return made


def trial(name, actor):
    made = Trial("stub", stub=True, trial_id=name)
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
