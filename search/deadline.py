"""Deadline: ends the workers of trials that take too long, whatever they hang in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune

_LOOK_INTERVAL_S = 1.0


class Deadline(tune.Callback):  # type: ignore[misc]
    """Kills the actor of a trial that has had it for too long; Ray then starts another one.

    By the driver's clock, and by Ray from outside of the actor: a process that is stopped, or
    holds Python's lock, could not end itself.

    timeout_s:  after which a trial is given up.
    on_overdue: is told its id before.
    """

    def __init__(
        self,
        timeout_s: float,
        on_overdue: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout_s = timeout_s
        self._on_overdue = on_overdue
        self._clock = clock
        self._looked_s = clock()
        # Since when each trial has its actor.
        self._since: dict[str, float] = {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look at the trials that have an actor, now and then."""
        now = self._clock()
        if now - self._looked_s < _LOOK_INTERVAL_S:
            return
        self._looked_s = now
        # Ray Tune says nothing of a trial whose actor does not even take it.
        at_work = {t.trial_id: t.temporary_state.ray_actor for t in trials}
        at_work = {name: actor for name, actor in at_work.items() if actor is not None}
        self._since = {name: self._since.get(name, now) for name in at_work}
        for name, since in self._since.items():
            if now - since > self._timeout_s:
                self._since[name] = now  # It takes a moment.
                self._on_overdue(name)
                ray.kill(at_work[name])
