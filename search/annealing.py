"""The annealing chain: (state, outcome) -> state. No Ray, no clock, no global random state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Literal, NamedTuple

import numpy as np

from search.surrogate import Observation, Point, most_promising, to_unit

Event = Literal["seed", "accept", "reject", "jump", "fail"]

DECIMALS = 6
"""Proposals are rounded so that a point survives JSON and Parquet as the same key."""


@dataclass(frozen=True)
class Annealing:
    """Parameters of the chain; with REFERENCE it is the reference implementation's.

    bounds:              (low, high) of each dimension.
    seeds:               starting points; the chain starts from the best of them.
    num_steps:           proposals after the seeds, N_iter; jumps are made beside them.
    initial_temperature: T_init, in units of the reward; None: TEMPERATURE_SHARE of how far the
                         best of the first rewards is above the median one.
    cooling:             alpha, the temperature's factor at each step, in (0, 1].
    min_temperature:     below it the temperature is T_init again, which counts as a restart from
                         where the chain is; in units of the reward, or of T_init if that is None.
                         0: never. Algorithm 1 has such a bound, the reference none.
    step_size:           scale of a move at T_init; shrinks with T / T_init. In widths of the box,
                         and in units of the coordinate without candidates.
    min_step_size:       the scale never shrinks below this.
    candidates:          neighbours drawn for each proposal, of which the surrogate chooses one;
                         1: no surrogate, one coordinate moves, uniformly within the step size.
    exploration:         standard deviations above the surrogate's mean that a candidate counts.
    lag:                 a proposal depends on no reward of the last `lag` steps, only on which of
                         them were accepted: so it can be made, for either answer, that far ahead.
    patience:            steps without a new best, accepted ones too, before reheating, or
                         restarting from the best point; None: never, as in Algorithm 1.
    reheat_above:        reheat only if a proposal has been a new best above this; None: above the
                         seeds'.
    reheat_factor:       T grows by it at a reheat.
    max_reheats:         after these a lack of progress restarts.
    restart_jump:        largest move of one coordinate by which a restart leaves the best point,
                         in units of the coordinate. The chain goes on from there, whatever the
                         reward; 0: it goes on from the best point itself.
    max_restarts:        R_max; the chain ends when it would restart once more; None: never.
    known:               observations of other searches, for the surrogate.
    """

    bounds: tuple[tuple[float, float], ...]
    seeds: tuple[Point, ...]
    num_steps: int = 120
    initial_temperature: float | None = None
    cooling: float = 0.95
    min_temperature: float = 1e-3
    step_size: float = 0.2
    min_step_size: float = 0.005
    candidates: int = 100
    exploration: float = 2.0
    lag: int = 4
    patience: int | None = 16
    reheat_above: float | None = None
    reheat_factor: float = 1.5
    max_reheats: int = 3
    restart_jump: float = 0.0
    max_restarts: int | None = None
    known: tuple[Observation, ...] = ()


REFERENCE = {
    "initial_temperature": 0.1,
    "min_temperature": 0.0,
    "step_size": 0.10,
    "candidates": 1,
    "exploration": 0.0,
    "lag": 0,
    "patience": 24,
    "reheat_above": 0.8,
    "restart_jump": 0.30,
    "max_restarts": 2,
}
"""Where CR-Diff's reference implementation differs from the defaults of Annealing."""

TEMPERATURE_SHARE = 0.02
"""T_init as a share of (best - median) of the first rewards, where it is not given."""

NUM_FIRST = 8
"""How many rewards those are, or as many as there are seeds."""


class ChainState(NamedTuple):
    """Where the chain is after `step` outcomes, seeds included.

    current and best hold no point until an evaluation has succeeded; rewards are -inf then.
    temperature is in units of the reward, or of T_init if that is left to the seeds.
    is_jump says that the next proposal is the jump of a restart; jumps has the steps that were.
    history has all outcomes in their order. In a state that is only supposed, no reward is known
    from step `num_known` on.
    """

    temperature: float
    step: int = 0
    current: Point | None = None
    current_reward: float = -math.inf
    best: Point | None = None
    best_reward: float = -math.inf
    is_jump: bool = False
    jumps: tuple[int, ...] = ()
    steps_since_best: int = 0
    num_reheats: int = 0
    num_restarts: int = 0
    event: Event | None = None
    finished: bool = False
    history: tuple[Observation, ...] = ()
    num_known: int | None = None


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

    Algorithm 1, whose energy E is minus the reward, has a set of seeds, the acceptance rule, the
    cooling, and a restart where the chain is when the temperature is too small. The reference
    implementation has one seed and no such temperature, but acts on a lack of progress: patience,
    reheats, and restarts by a jump from the best point. Both end at one restart too many. The
    neighbour is the reference's, or the one of many with Cauchy steps that a surrogate prefers.

    This chain differs from the reference in three ways: its random numbers are a function of
    (seed, chain, step), not the next ones of Python's generator; points are rounded to DECIMALS;
    a failed evaluation is rejected, where the reference counts a failed prompt as a reward of -2.

    Source: CR-Diff (arXiv:2604.05524), supplement, Algorithm 1, and github.com/xuan9-9/CR-Diff;
    Szu and Hartley, Fast simulated annealing (1987); Regis and Shoemaker, DYCORS (2013).
    """

    def __init__(self, annealing: Annealing, seed: int = 0, chain: int = 0) -> None:
        self.annealing = annealing
        self._seed = seed
        self._chain = chain
        given = annealing.initial_temperature
        self._initial_temperature = 1.0 if given is None else given

    def start(self) -> ChainState:
        """Return the state before any outcome."""
        return ChainState(temperature=self._initial_temperature)

    def propose(self, state: ChainState) -> Point:
        """Return the point to evaluate next: a seed, or a neighbour of the current point."""
        parameters = self.annealing
        if state.step < len(parameters.seeds):
            return self._clip(parameters.seeds[state.step])
        if state.current is None:  # Every seed failed: there is nothing to move from yet.
            centre = self._clip(tuple((low + high) / 2 for low, high in parameters.bounds))
            state = state._replace(current=centre)
        assert state.current is not None
        size = max(
            parameters.min_step_size,
            parameters.step_size * state.temperature / self._initial_temperature,
        )
        if state.is_jump:
            size = parameters.restart_jump
        elif parameters.candidates > 1:
            return self._clip(self._choose(state, size))
        drawn = self._draws(state)
        point = list(state.current)
        point[drawn.coordinate] += size * drawn.move
        return self._clip(tuple(point))

    def can_propose(self, state: ChainState) -> bool:
        """Return whether enough is known in a supposed state to say what it would propose."""
        if self.is_seed(state) or self.annealing.candidates == 1:
            return True
        known = state.step if state.num_known is None else state.num_known
        return known >= state.step - self.annealing.lag

    def is_seed(self, state: ChainState) -> bool:
        """Return whether the next proposal is a starting point."""
        return state.step < len(self.annealing.seeds)

    def min_gain(self, state: ChainState) -> float:
        """Return the gain over the current reward above which a proposal is accepted.

        It is T ln u, at most 0; known before the proposal is evaluated, since u is. -inf for a
        jump.
        """
        if self.is_seed(state):
            return 0.0
        if state.is_jump:
            return -math.inf
        temperature = state.temperature * self._unit(state)
        drawn = self._draws(state).acceptance
        return temperature * math.log(drawn) if drawn > 0 else -math.inf

    def accepts(self, state: ChainState, reward: float) -> bool:
        """Return whether the chain moves to a point of this reward."""
        gain = reward - state.current_reward
        return gain > 0 or gain > self.min_gain(state)

    def advance(self, state: ChainState, seen: Observation) -> ChainState:
        """Return the state after an observation of what was proposed.

        A failed evaluation is rejected, never scored.
        """
        accepted = seen.reward is not None and self.accepts(state, seen.reward)
        event: Event = "accept" if accepted else "reject"
        if seen.reward is None:
            event = "fail"
        elif self.is_seed(state):
            event = "seed"
        elif state.is_jump:
            event = "jump"
        return self._after(state, seen, accepted, event)

    def suppose(self, state: ChainState, point: Point, accepted: bool) -> ChainState:
        """Return the state after `point`, not evaluated yet, if it is accepted or rejected.

        It proposes what the real one will, as far as `can_propose` says that it can. Whether an
        accepted point is a new best is a guess: if the current one is the best, and it is no jump.
        """
        reward = None
        if accepted:
            reward = state.current_reward if state.current else 0.0
            if not state.is_jump:
                reward = math.nextafter(reward, math.inf)
        if state.num_known is None:
            state = state._replace(num_known=state.step)
        return self._after(state, Observation(point, reward), accepted, None)

    def _after(
        self, state: ChainState, last: Observation, accepted: bool, event: Event | None
    ) -> ChainState:
        parameters = self.annealing
        current, best = (state.current, state.current_reward), (state.best, state.best_reward)
        if last.reward is not None and accepted:
            current = last.point, last.reward
        if last.reward is not None and last.reward > state.best_reward:
            best = last.point, last.reward
        after = state._replace(
            step=state.step + 1,
            history=(*state.history, last),
            current=current[0],
            current_reward=current[1],
            best=best[0],
            best_reward=best[1],
            is_jump=False,
            event=event,
        )
        if state.is_jump:  # It is no step of the cooling.
            after = after._replace(jumps=(*state.jumps, state.step))
        elif not self.is_seed(state):
            after = self._cool(after)
        num_proposed = after.step - len(after.jumps) - len(parameters.seeds)
        if num_proposed >= parameters.num_steps and not after.is_jump:
            after = after._replace(finished=True)
        return after

    def _unit(self, state: ChainState) -> float:
        """Return what the state's temperature is to be multiplied by to be a reward."""
        if self.annealing.initial_temperature is not None:
            return 1.0
        num_first = max(NUM_FIRST, len(self.annealing.seeds))
        rewards = _rewards(state.history[:num_first])
        return TEMPERATURE_SHARE * (max(rewards) - median(rewards)) if rewards else 0.0

    # --- the surrogate -----------------------------------------------------------------------

    def _choose(self, state: ChainState, size: float) -> Point:
        seen = self._seen(state)
        unseen = tuple(each.point for each in state.history[len(seen) :])
        assert state.current is not None
        numbers = (self._seed, self._chain, state.step)
        return _chosen(self.annealing, numbers, state.current, size, seen, unseen)

    def _seen(self, state: ChainState) -> tuple[Observation, ...]:
        """Return the outcomes whose rewards the next proposal may depend on."""
        return state.history[: max(0, state.step - self.annealing.lag)]

    # --- the temperature ---------------------------------------------------------------------

    def _cool(self, state: ChainState) -> ChainState:
        parameters = self.annealing
        state = state._replace(
            temperature=parameters.cooling * state.temperature,
            steps_since_best=0 if self._has_news(state) else state.steps_since_best + 1,
        )
        if parameters.patience is not None and state.steps_since_best >= parameters.patience:
            return self._escape(state._replace(steps_since_best=0))
        if state.temperature < parameters.min_temperature:
            return self._restart(state)
        return state

    def _has_news(self, state: ChainState) -> bool:
        """Whether the last outcome to be seen is a new best."""
        seen = self._seen(state)
        reward = seen[-1].reward if seen else None
        return reward is not None and reward > max(_rewards(seen[:-1]), default=-math.inf)

    def _escape(self, state: ChainState) -> ChainState:
        """Reheat, or restart from the best point, after steps without a new best."""
        parameters = self.annealing
        if state.num_reheats < parameters.max_reheats and self._is_worth_refining(state):
            return state._replace(
                temperature=state.temperature * parameters.reheat_factor,
                num_reheats=state.num_reheats + 1,
            )
        best, best_reward = _best(self._seen(state))
        restarted = self._restart(state._replace(current=best, current_reward=best_reward))
        will_jump = parameters.restart_jump > 0 and not restarted.finished
        return restarted._replace(is_jump=will_jump)

    def _is_worth_refining(self, state: ChainState) -> bool:
        """Whether a proposal, not a seed and not a jump, has been a new best above the bar."""
        seen, num_seeds = self._seen(state), len(self.annealing.seeds)
        bar = self.annealing.reheat_above
        if bar is None:
            bar = max(_rewards(seen[:num_seeds]), default=math.inf)
        best = -math.inf
        for step, each in enumerate(seen):
            if each.reward is None or each.reward <= best:
                continue
            best = each.reward
            if best > bar and step >= num_seeds and step not in state.jumps:
                return True
        return False

    def _restart(self, state: ChainState) -> ChainState:
        most = self.annealing.max_restarts
        return state._replace(
            temperature=self._initial_temperature,
            num_restarts=state.num_restarts + 1,
            finished=most is not None and state.num_restarts + 1 > most,
        )

    def _draws(self, state: ChainState) -> Draws:
        return draws(self._seed, self._chain, state.step, len(self.annealing.bounds))

    def _clip(self, point: Point) -> Point:
        pairs = zip(point, self.annealing.bounds, strict=True)
        return tuple(round(min(max(value, low), high), DECIMALS) for value, (low, high) in pairs)


def space_filling(bounds: Sequence[tuple[float, float]], num_points: int) -> tuple[Point, ...]:
    """Return points that fill the box evenly, the same ones each time.

    Source: Roberts, The unreasonable effectiveness of quasirandom sequences (2018), R_d.
    """
    root = 2.0
    for _ in range(64):  # The root of x^(d + 1) = x + 1.
        root = (1.0 + root) ** (1.0 / (len(bounds) + 1))
    return tuple(
        tuple(
            low + (high - low) * ((0.5 + (index + 1) * root ** -(axis + 1)) % 1.0)
            for axis, (low, high) in enumerate(bounds)
        )
        for index in range(num_points)
    )


def _rewards(seen: Sequence[Observation]) -> list[float]:
    return [each.reward for each in seen if each.reward is not None]


def _best(seen: Sequence[Observation]) -> tuple[Point | None, float]:
    """The first of the highest rewards and its point; (None, -inf) if all failed."""
    best: tuple[Point | None, float] = (None, -math.inf)
    for each in seen:
        if each.reward is not None and each.reward > best[1]:
            best = (each.point, each.reward)
    return best


# Walking ahead comes by the same states again and again.
@lru_cache(maxsize=8192)
def _chosen(
    annealing: Annealing,
    numbers: tuple[int, int, int],
    current: Point,
    size: float,
    seen: tuple[Observation, ...],
    unseen: tuple[Point, ...],
) -> Point:
    """Choose among neighbours the one that the surrogate has the highest hopes of.

    numbers: seed, chain and step, by which the neighbours are drawn.
    size:    scale of their Cauchy steps, in widths of the box.
    seen:    observations that the surrogate may know; unseen: points whose outcomes it may not.
    """
    *key, step = numbers
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 1, step]))
    shape = (annealing.candidates, len(current))
    moves = generator.normal(size=shape) / np.abs(generator.normal(size=(shape[0], 1)))
    neighbours = np.clip(to_unit([current], annealing.bounds) + size * moves, 0.0, 1.0)
    known = (*annealing.known, *seen)
    chosen = most_promising(neighbours, known, unseen, annealing.bounds, annealing.exploration)
    pairs = zip(chosen, annealing.bounds, strict=True)
    return tuple(low + float(x) * (high - low) for x, (low, high) in pairs)
