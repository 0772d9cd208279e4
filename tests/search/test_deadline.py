"""When a worker is given up: while it loads, and while it draws."""

from types import SimpleNamespace

import pytest

from search.deadline import Deadline


class Watched:
    """A deadline with one trial, on a clock of ours; which trials it gave up, and when."""

    def __init__(self, monkeypatch, *limits, batch=(0, 1, 2, 3)):
        self.now, self.given_up, self.killed = 0.0, [], []
        self.deadline = Deadline(
            limits[0], lambda name: self.given_up.append((name, self.now)), *limits[1:], self.clock
        )
        monkeypatch.setattr("search.deadline.ray.kill", self.killed.append)
        self.trial = self.trial_of("a", "actor", batch)

    def clock(self):
        return self.now

    @staticmethod
    def trial_of(name, actor, batch):
        state = SimpleNamespace(ray_actor=actor)
        return SimpleNamespace(trial_id=name, temporary_state=state, config={"batch": batch})

    def pass_s(self, seconds):
        for _ in range(seconds):
            self.now += 1.0
            self.deadline.on_step_begin(0, [self.trial])

    def report(self, **result):
        self.deadline.on_trial_result(0, [self.trial], self.trial, result)


def test_loading_has_a_limit_of_its_own(monkeypatch):
    watched = Watched(monkeypatch, 10.0, 100.0)
    watched.pass_s(101)

    assert watched.given_up == []
    watched.pass_s(1)
    assert watched.given_up == [("a", 102.0)]
    assert watched.killed == ["actor"]


def test_a_batchs_limit_begins_when_its_worker_is_loaded(monkeypatch):
    watched = Watched(monkeypatch, 10.0, 100.0)
    watched.pass_s(90)
    watched.report(picture_s=0.1)
    watched.pass_s(10)

    assert watched.given_up == []
    watched.pass_s(1)
    assert watched.given_up == [("a", 101.0)]


def test_a_slow_worker_has_three_times_what_its_pace_says(monkeypatch):
    watched = Watched(monkeypatch, 10.0, 100.0)
    watched.report(picture_s=5.0)  # Four of them.
    watched.pass_s(60)

    assert watched.given_up == []
    watched.pass_s(2)
    assert watched.given_up == [("a", 61.0)]


def test_a_loaded_worker_stays_so_for_its_next_batch(monkeypatch):
    watched = Watched(monkeypatch, 10.0, 100.0)
    watched.report(measured=None)
    watched.trial = watched.trial_of("b", "actor", (0,))
    watched.pass_s(12)

    assert watched.given_up == [("b", 12.0)]


@pytest.mark.parametrize("limits", [(None,), (None, 100.0)])
def test_without_a_limit_a_batch_may_take_for_ever(monkeypatch, limits):
    watched = Watched(monkeypatch, *limits)
    watched.report(picture_s=1.0)
    watched.pass_s(500)

    assert watched.given_up == []
