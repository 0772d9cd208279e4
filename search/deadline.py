"""Deadline: ends the workers of trials that take too long, whatever they hang in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune

_LOOK_INTERVAL_S = 1.0
# Times as long as its worker's pace says that a batch may take.
_SLACK = 3.0


class Deadline(tune.Callback):  # type: ignore[misc]
    """Kills the actor of a trial that has had it for too long; Ray then starts another one.

    By the driver's clock, and by Ray from outside of the actor: a process that is stopped, or
    holds Python's lock, could not end itself. An actor loads until its first result, which may
    say at what pace it draws (`picture_s`), so that a slow one has as much more time.

    timeout_s:  after which a trial is given up, or three times what its actor's pace makes of its
                batch, whichever is more; None: never.
    on_overdue: is told its id before.
    load_s:     after which an actor that loads is given up; None: as for a trial.
    """

    def __init__(
        self,
        timeout_s: float | None,
        on_overdue: Callable[[str], None],
        load_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout_s = math.inf if timeout_s is None else timeout_s
        self._on_overdue = on_overdue
        self._load_s = self._timeout_s if load_s is None else load_s
        self._clock = clock
        self._looked_s = clock()
        # Since when each trial has its actor, or has it loaded.
        self._since: dict[str, float] = {}
        # Seconds for a picture, of the actors that are loaded.
        self._pace: dict[Any, float] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Note that an actor is loaded, and that it is alive."""
        actor = trial.temporary_state.ray_actor
        self._since[trial.trial_id] = self._clock()
        self._pace[actor] = result.get("picture_s", self._pace.get(actor, 0.0))

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look at the trials that have an actor, now and then."""
        now = self._clock()
        if now - self._looked_s < _LOOK_INTERVAL_S:
            return
        self._looked_s = now
        # Ray Tune says nothing of a trial whose actor does not even take it.
        at_work = [each for each in trials if each.temporary_state.ray_actor is not None]
        self._since = {each.trial_id: self._since.get(each.trial_id, now) for each in at_work}
        for trial in at_work:
            if now - self._since[trial.trial_id] > self._limit_s(trial):
                self._since[trial.trial_id] = now  # It takes a moment.
                self._on_overdue(trial.trial_id)
                ray.kill(trial.temporary_state.ray_actor)

    def _limit_s(self, trial: Any) -> float:
        pace = self._pace.get(trial.temporary_state.ray_actor)
        if pace is None:
            return self._load_s
        return max(self._timeout_s, _SLACK * pace * len(trial.config["batch"]))
