"""The annealing chain: (state, outcome) -> state. No Ray, no clock, no global random state."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

Point = tuple[float, ...]
Event = Literal["seed", "accept", "reject", "fail"]

DECIMALS = 6
"""Proposals are rounded so that a point survives JSON and Parquet as the same key."""


@dataclass(frozen=True)
class Annealing:
    """Parameters of the chain; defaults are the reference implementation's (conf has the same).

    bounds:              (low, high) of each dimension.
    seeds:               starting points; the chain starts from the best of them.
    num_steps:           proposals after the seeds, N_iter.
    initial_temperature: T_init, in units of the reward.
    cooling:             alpha, the temperature's factor at each step, in (0, 1].
    min_temperature:     below it the temperature is T_init again, which counts as a restart.
    step_size:           largest move of one coordinate at T_init; shrinks with T / T_init.
    min_step_size:       the move never shrinks below this.
    patience:            steps without a new best before reheating or restarting; None: never.
    reheat_above:        reheat only if the best reward exceeds this.
    reheat_factor:       T grows by it at a reheat.
    max_reheats:         after these a lack of progress restarts.
    restart_step_factor: the step size grows by it at a restart from the best point.
    max_restarts:        R_max; the chain ends when it would restart once more.
    """

    bounds: tuple[tuple[float, float], ...]
    seeds: tuple[Point, ...]
    num_steps: int = 120
    initial_temperature: float = 0.1
    cooling: float = 0.95
    min_temperature: float = 1e-4
    step_size: float = 0.10
    min_step_size: float = 0.005
    patience: int | None = 24
    reheat_above: float = 0.8
    reheat_factor: float = 1.5
    max_reheats: int = 3
    restart_step_factor: float = 3.0
    max_restarts: int = 2


@dataclass(frozen=True)
class ChainState:
    """Where the chain is after `step` outcomes, seeds included.

    current and best hold no point until an evaluation has succeeded; rewards are -inf then.
    """

    temperature: float
    step: int = 0
    current: Point | None = None
    current_reward: float = -math.inf
    best: Point | None = None
    best_reward: float = -math.inf
    step_factor: float = 1.0
    steps_since_best: int = 0
    num_reheats: int = 0
    num_restarts: int = 0
    event: Event | None = None
    finished: bool = False


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step: which coordinate, how far in [-1, 1), u in [0, 1)."""

    coordinate: int
    move: float
    acceptance: float


@lru_cache(maxsize=4096)
def draws(seed: int, chain: int, step: int, num_dimensions: int) -> Draws:
    """Draw the numbers of one step from a counter-based generator.

    They depend on (seed, chain, step) alone, so not on when anything was evaluated.
    """
    bits = np.random.Philox(key=[seed, chain], counter=[0, 0, 0, step])
    generator = np.random.Generator(bits)
    coordinate = int(generator.integers(num_dimensions))
    return Draws(coordinate, float(generator.uniform(-1, 1)), float(generator.random()))


class Chain:
    """Simulated annealing with reheating and restarts, maximising a reward.

    Source: CR-Diff (arXiv:2604.05524), supplement, Algorithm 1, whose energy E is minus the
    reward; neighbour, patience, reheat and restart step as in its reference implementation.
    """

    def __init__(self, annealing: Annealing, seed: int = 0, chain: int = 0) -> None:
        self.annealing = annealing
        self._seed = seed
        self._chain = chain

    def start(self) -> ChainState:
        """Return the state before any outcome."""
        return ChainState(temperature=self.annealing.initial_temperature)

    def propose(self, state: ChainState) -> Point:
        """Return the point to evaluate next: a seed, else a neighbour of the current point."""
        parameters = self.annealing
        if state.step < len(parameters.seeds):
            return self._clip(parameters.seeds[state.step])
        if state.current is None:  # Every seed failed: there is nothing to move from yet.
            centre = self._clip(tuple((low + high) / 2 for low, high in parameters.bounds))
            state = replace(state, current=centre)
        assert state.current is not None
        size = max(
            parameters.min_step_size,
            parameters.step_size * state.temperature / parameters.initial_temperature,
        )
        drawn = self._draws(state)
        point = list(state.current)
        point[drawn.coordinate] += size * state.step_factor * drawn.move
        return self._clip(tuple(point))

    def advance(self, state: ChainState, point: Point, reward: float | None) -> ChainState:
        """Return the state after `point` gave `reward`; None or not finite: it failed.

        A failed evaluation is rejected, never scored.
        """
        if reward is not None and not math.isfinite(reward):
            reward = None
        accepted = reward is not None and self.accepts(state, reward)
        return self.branch(state, point, reward, accepted)

    def accepts(self, state: ChainState, reward: float) -> bool:
        """Return whether the chain moves to a point of this reward."""
        gain = reward - state.current_reward
        return gain > 0 or gain > self.min_gain(state)

    def min_gain(self, state: ChainState) -> float:
        """Return the gain over the current reward above which a proposal is accepted.

        It is T ln u, at most 0; known before the proposal is evaluated, since u is.
        """
        if self.is_seed(state):
            return 0.0
        drawn = self._draws(state).acceptance
        return state.temperature * math.log(drawn) if drawn > 0 else -math.inf

    def is_seed(self, state: ChainState) -> bool:
        """Return whether the next proposal is a starting point."""
        return state.step < len(self.annealing.seeds)

    def branch(
        self, state: ChainState, point: Point, reward: float | None, accepted: bool
    ) -> ChainState:
        """Return the state after `point` was accepted or rejected, whichever is asked for."""
        parameters = self.annealing
        is_seed = self.is_seed(state)
        event: Event = (
            "fail" if reward is None else "seed" if is_seed else "accept" if accepted else "reject"
        )
        after = replace(state, step=state.step + 1, event=event)
        if reward is not None and accepted:
            after = replace(after, current=point, current_reward=reward)
        if reward is not None and reward > state.best_reward:
            after = replace(after, best=point, best_reward=reward, steps_since_best=0)
        elif not is_seed:
            after = replace(after, steps_since_best=state.steps_since_best + 1)
        if not is_seed:
            after = self._cool(after)
        if after.step >= len(parameters.seeds) + parameters.num_steps:
            after = replace(after, finished=True)
        return after

    def _cool(self, state: ChainState) -> ChainState:
        parameters = self.annealing
        state = replace(state, temperature=parameters.cooling * state.temperature)
        if state.temperature < parameters.min_temperature:
            state = self._restart(state)
        if parameters.patience is not None and state.steps_since_best >= parameters.patience:
            state = self._escape(replace(state, steps_since_best=0))
        return state

    def _escape(self, state: ChainState) -> ChainState:
        parameters = self.annealing
        worth_refining = state.best_reward > parameters.reheat_above
        if worth_refining and state.num_reheats < parameters.max_reheats:
            return replace(
                state,
                temperature=state.temperature * parameters.reheat_factor,
                num_reheats=state.num_reheats + 1,
            )
        return self._restart(
            replace(
                state,
                current=state.best,
                current_reward=state.best_reward,
                step_factor=parameters.restart_step_factor,
            )
        )

    def _restart(self, state: ChainState) -> ChainState:
        return replace(
            state,
            temperature=self.annealing.initial_temperature,
            num_restarts=state.num_restarts + 1,
            finished=state.num_restarts + 1 > self.annealing.max_restarts,
        )

    def _draws(self, state: ChainState) -> Draws:
        return draws(self._seed, self._chain, state.step, len(self.annealing.bounds))

    def _clip(self, point: Point) -> Point:
        pairs = zip(point, self.annealing.bounds, strict=True)
        return tuple(round(min(max(value, low), high), DECIMALS) for value, (low, high) in pairs)
