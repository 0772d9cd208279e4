"""AnnealingSearch: the annealing chain, and its speculation, as a ray.tune searcher."""

from __future__ import annotations

import heapq
import itertools
import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from search.annealing import DECIMALS, Annealing, Chain, ChainState, space_filling
from search.racing import Expectation, Race
from search.speculation import Commit, Speculation
from search.surrogate import Observation, Point, expect_rewards

Bounds = Mapping[str, tuple[float, float]]

# Below this a proposal is not worth a worker that would else be idle.
_LEAST_LIKELIHOOD = 0.01
_NUM_SEEDS = 8
_PARAMETERS = {each.name for each in fields(Annealing)} - {
    *("bounds", "seeds", "num_steps", "known"),
}
# Standard errors that an estimate counts as off by. What was stopped was stopped for looking bad,
# so it looks worse than it is; and the surrogate would never propose to look again.
_DOUBT = 2.0


class AnnealingSearch(Searcher):  # type: ignore[misc]
    """The annealing chain of CR-Diff as a ray.tune searcher, for any number of workers.

        AnnealingSearch(space={"down": (0.1, 0.8), "mid": (0.1, 0.8), "up": (0.1, 0.8)},
                        metric="reward", mode="max", seed=0, max_steps=60)

    Workers that are free evaluate what the chain will likely propose next; its steps are taken in
    their order, as the outcomes come, so `commits` and the best are the same for any number of
    workers and any order of completion. A step back to a point that is known is taken without a
    suggestion, so that there may be fewer of them than steps.

    space:        (low, high) of each parameter; it stays within them.
    metric, mode: what trials report, and whether "max" or "min" is better.
    seed:         of every random number; equal seeds and results give equal commits.
    max_steps:    steps in all, starting points included and jumps of restarts not, over all
                  chains; then it is finished.
    seeds:        starting points, in any order, moved to the space's edge if they lie outside; by
                  default eight that fill the space evenly.
    speculation:  evaluations under way at most, dead ones not counted; "auto": as many as are
                  asked for and at least a hundredth likely to be needed; "off": one for
                  each chain.
    chains:       independent chains that share max_steps, dealt the starting points in turn.
    race:         how evaluations are stopped early that report their `rewards` by prompt.
    parameters:   of `search.annealing.Annealing`, such as cooling=0.9.
    A failed trial, or a result that is not finite, is a rejection. Results for unknown or
    finished trials are ignored.
    Source: CR-Diff (arXiv:2604.05524), supplement, Algorithm 1.
    """

    def __init__(
        self,
        space: Bounds,
        metric: str = "reward",
        mode: str = "max",
        seed: int = 0,
        max_steps: int = 120,
        seeds: Sequence[Mapping[str, float]] | None = None,
        speculation: int | str = "auto",
        chains: int = 1,
        race: Race | None = None,
        **parameters: Any,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}: choose max or min")
        super().__init__(metric=metric, mode=mode)
        unknown = parameters.keys() - _PARAMETERS
        if unknown:
            raise ValueError(
                f"there is no parameter {', '.join(sorted(unknown))}: choose of "
                f"{', '.join(sorted(_PARAMETERS))}"
            )
        if not space:
            raise ValueError("space is empty: name at least one parameter and its (low, high)")
        for name, (low, high) in space.items():
            if not low < high:
                raise ValueError(f"space of {name} is ({low}, {high}): give low < high")
        if speculation not in ("auto", "off") and not (
            isinstance(speculation, int) and speculation >= 1
        ):
            raise ValueError(
                f"speculation is {speculation!r}: give auto, off or a count from 1 up"
            )
        self.commits: list[Commit] = []
        """Every step taken; those of one chain in their order."""
        self.race = race
        self.names = tuple(space)
        self._bounds = tuple((float(low), float(high)) for low, high in space.values())
        filling = space_filling(self._bounds, min(_NUM_SEEDS, max(1, max_steps)))
        self._given = [
            self._point(start)
            for start in seeds or [dict(zip(space, each, strict=True)) for each in filling]
        ]
        if max_steps < len(self._given):
            raise ValueError(
                f"max_steps {max_steps} is less than the {len(self._given)} seeds: raise it"
            )
        if not 1 <= chains <= max_steps:
            raise ValueError(f"chains is {chains}: give 1 to max_steps, {max_steps}")
        self._arguments: dict[str, Any] = {
            "space": dict(zip(self.names, self._bounds, strict=True)),
            "metric": metric,
            "mode": mode,
            "seed": int(seed),
            "max_steps": int(max_steps),
            "seeds": [dict(zip(self.names, start, strict=True)) for start in self._given],
            "speculation": speculation,
            "chains": chains,
            **parameters,
        }
        self._sign = 1.0 if mode == "max" else -1.0
        self._seed = seed
        self._max_steps = max_steps
        self._num_chains = chains
        self._speculation = speculation
        self._parameters = parameters
        # What is known of points: how they came out, and rewards by prompt as far as they go.
        self._seen: dict[Point, Observation] = {}
        self._rewards: dict[Point, tuple[float, ...]] = {}
        # Rewards on all prompts behind an observation, which may be estimates.
        self._rows: dict[tuple[Point, float], tuple[float, ...]] = {}
        # Of other searches, from before this one began.
        self._known: tuple[Observation, ...] = ()
        self._pending: dict[str, Point] = {}
        # Pending when this searcher was saved: their results count, but nobody waits for them.
        self._pending_before: dict[str, Point] = {}
        self._max_concurrent: float = math.inf
        self._has_suggested = False
        self._begin()

    # --- what Ray asks -----------------------------------------------------------------------

    def suggest(self, trial_id: str) -> dict[str, float] | str | None:
        """Return the likeliest proposal that nobody evaluates yet.

        None: none is worth it until an outcome is known. FINISHED: every step is taken.
        """
        if self.finished:
            return str(Searcher.FINISHED)
        if len(self._pending) >= self._max_concurrent or self._peek() is None:
            return None
        likelihood, point = self._next.popleft()
        self._has_suggested = True
        self._pending[trial_id] = point
        self._likelihoods[point] = likelihood
        return dict(zip(self.names, point, strict=True))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Take the rewards of the first prompts of an evaluation under way, under `rewards`."""
        point = self._pending.get(trial_id) or self._pending_before.get(trial_id)
        if point is not None and self.race is not None and "rewards" in result:
            self._take_rewards(point, result["rewards"])
            self._commit()

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Take an outcome, and every step that it makes possible."""
        point = self._pending.pop(trial_id, None) or self._pending_before.pop(trial_id, None)
        if point is None or point in self._seen:  # The first outcome of a point counts.
            return
        value = None if error or not result else result.get(self.metric)
        if value is not None and result is not None and "rewards" in result:
            self._take_rewards(point, result["rewards"])
        self._seen[point] = Observation(point, self._finite(value))
        self._commit()

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Keep to so many under way; return True, so that Ray wraps no limiter around it."""
        self._max_concurrent = max_concurrent
        return True

    def add_evaluated_point(
        self,
        parameters: Mapping[str, float],
        value: float | None,
        error: bool = False,
        pruned: bool = False,
        intermediate_values: Sequence[float] | None = None,
    ) -> None:
        """Take a result of another search; the best one becomes a further starting point.

        What failed, was pruned or is not finite is never taken for a reward, and a point outside
        the space is ignored. Once this search has begun, a point is known and starts nothing.
        intermediate_values: its rewards by prompt, which a race needs.
        Raises ValueError if a parameter of the space is missing.
        """
        point = self._point(parameters)
        inside = all(low <= x <= high for x, (low, high) in zip(point, self._bounds, strict=True))
        if pruned or not inside:
            return
        seen = Observation(point, None if error else self._finite(value))
        self._seen[point] = seen
        if intermediate_values is not None and seen.reward is not None:
            self._take_rewards(point, intermediate_values)
        if self._has_suggested:
            self._commit()
        else:
            self._known = (*self._known, seen)
            self._begin()

    def save(self, checkpoint_path: str) -> None:
        """Write its arguments, every known outcome and what is pending, as JSON."""
        raw = {
            "arguments": self._arguments,
            "race": None if self.race is None else asdict(self.race),
            "known": self._known,
            "seen": list(self._seen.values()),
            "rewards": list(self._rewards.items()),
            "pending": {**self._pending_before, **self._pending},
            "has_suggested": self._has_suggested,
        }
        Path(checkpoint_path).write_text(json.dumps(raw), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Become the searcher that `save` wrote, whatever the arguments of this one were.

        A result of a trial that was pending then counts. Its point is suggested again all the
        same, since Ray may have lost the trial.
        """
        raw = json.loads(Path(checkpoint_path).read_text(encoding="utf-8"))
        race = None if raw["race"] is None else Race(**raw["race"])
        saved = AnnealingSearch(**raw["arguments"], race=race)
        saved._max_concurrent = self._max_concurrent  # Ray has set it for this run.
        self.__dict__.update(saved.__dict__)
        seen = [Observation(tuple(point), *rest) for point, *rest in raw["seen"]]
        self._seen = {each.point: each for each in seen}
        self._rewards = {tuple(point): tuple(rewards) for point, rewards in raw["rewards"]}
        self._known = tuple(Observation(tuple(point), *rest) for point, *rest in raw["known"])
        self._pending_before = {name: tuple(point) for name, point in raw["pending"].items()}
        self._has_suggested = raw["has_suggested"]
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        # The trees are grown again.
        grown = ("_chains", "_walk", "_next", "_following", "_likelihoods", "_expectations")
        return {name: value for name, value in self.__dict__.items() if name not in grown}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    # --- what an EvaluationSearch asks ---------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether every step is taken."""
        return all(chain.state.finished for chain in self._chains)

    @property
    def best(self) -> Commit | None:
        """The step with the best reward so far, of equal ones the first: `best.seen.point`.

        With mode="min" its reward is the metric's negative.
        """
        scored = [each for each in self.commits if each.seen.reward is not None]
        return max(scored, key=lambda each: each.seen.reward or 0.0, default=None)

    def likelihood(self, trial_id: str) -> float:
        """Return how likely a pending suggestion is to be needed; 0: it is dead."""
        self._refresh()
        return self._likelihoods.get(self._pending[trial_id], 0.0)

    @property
    def next_likelihood(self) -> float:
        """How likely what `suggest` would return is to be needed; 0 if that is None."""
        following = self._peek()
        return 0.0 if following is None else following[0]

    def drop(self, trial_id: str) -> None:
        """Forget a pending suggestion that nobody will evaluate further."""
        del self._pending[trial_id]
        self._is_stale = True

    # --- the chains --------------------------------------------------------------------------

    def _begin(self) -> None:
        """Set the chains to their start, and take them along what is known."""
        self._seeds = list(self._given)
        scored = [(each.reward, each.point) for each in self._known if each.reward is not None]
        best = max(scored, default=None)
        if best is not None and best[1] not in self._seeds:
            self._seeds.append(best[1])
        self.commits.clear()
        self._chains = [self._chain(number) for number in range(self._num_chains)]
        self._commit()

    def _chain(self, number: int) -> Speculation:
        # Steps and starting points are dealt to the chains like cards.
        num_steps = len(range(number, self._max_steps, self._num_chains))
        seeds = tuple(self._seeds[number :: self._num_chains])
        if not seeds:
            anywhere = np.random.Generator(np.random.Philox(key=[self._seed, number]))
            seeds = (tuple(float(anywhere.uniform(*bounds)) for bounds in self._bounds),)
        annealing = Annealing(
            bounds=self._bounds,
            seeds=seeds,
            num_steps=max(0, num_steps - len(seeds)),
            known=self._known,
            **self._parameters,
        )
        return Speculation(Chain(annealing, self._seed, number), self._observe, number)

    def _observe(self, chain: Chain, state: ChainState, point: Point) -> Observation | None:
        """Return what is known of a proposal; the race counts even if all prompts are known.

        So a step's outcome does not depend on how many prompts were drawn at once.
        """
        rewards, found = self._rewards.get(point), self._seen.get(point)
        if self.race is None or not rewards:
            return found
        expectation = self._expectation(state, point)
        if expectation is not None:
            needed = state.current_reward + chain.min_gain(state)
            lost = self.race.lost(rewards, expectation, needed)
            if lost is not None:
                self._rows[point, lost.mean] = lost.rewards
                return Observation(point, lost.mean, _DOUBT * lost.error, stopped=True)
        if found is not None and found.reward is not None:
            self._rows[point, found.reward] = rewards
        return found

    def _expectation(self, state: ChainState, point: Point) -> Expectation | None:
        """Return what a proposal's rewards should be; None: its incumbent's are not known."""
        if state.current is None:
            return None
        incumbent = self._rows.get((state.current, state.current_reward))
        if incumbent is None:
            return None
        key = state.history, point
        if key not in self._expectations:
            # In a state that is only supposed, the latest rewards are not known.
            behind = {
                each: self._rows[each.point, each.reward]
                for each in state.history
                if each.reward is not None and (each.point, each.reward) in self._rows
            }
            self._expectations[key] = Expectation(
                *expect_rewards(behind, incumbent, point, self._bounds),
                highest=max(max(rewards) for rewards in (incumbent, *behind.values())),
            )
        return self._expectations[key]

    def _commit(self) -> None:
        self._expectations: dict[tuple[tuple[Observation, ...], Point], Expectation] = {}
        for chain in self._chains:
            self.commits.extend(chain.commit())
        self._is_stale = True

    # --- speculation -------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Walk the chains' trees again, as far as the pending evaluations reach in them."""
        if not self._is_stale:
            return
        self._is_stale = False
        self._next: deque[tuple[float, Point]] = deque()
        self._following: set[Point] = set()
        self._likelihoods: dict[Point, float] = {}
        walks = (chain.walk() for chain in self._chains)
        self._walk = heapq.merge(*walks, key=lambda found: -found[0])
        pending = set(self._pending.values())
        # What is not found by then is far less likely than much that nobody evaluates.
        for found in itertools.islice(self._walk, len(pending) + len(pending) // 4 + 8):
            self._sort_in(found, pending)
            if len(self._likelihoods) == len(pending):
                break

    def _sort_in(self, found: tuple[float, Point], pending: Iterable[Point]) -> None:
        likelihood, point = found
        if point in self._likelihoods:  # Found before, on a likelier way.
            return
        if point in pending:
            self._likelihoods[point] = likelihood
        elif point not in self._following:
            self._following.add(point)
            self._next.append(found)

    def _peek(self) -> tuple[float, Point] | None:
        """Return the likeliest proposal that is not pending, if it is worth a worker."""
        self._refresh()
        least, most = 0.0, math.inf
        if self._speculation == "auto":
            least = _LEAST_LIKELIHOOD
        elif self._speculation == "off":
            least, most = 1.0, sum(not chain.state.finished for chain in self._chains)
        else:
            most = int(self._speculation)
        if len(self._likelihoods) >= most:
            return None
        pending = set(self._pending.values())
        while not self._next:
            found = next(self._walk, None)
            if found is None:
                return None
            self._sort_in(found, pending)
            if found[0] < least:
                break
        if not self._next or self._next[0][0] < least:
            return None
        return self._next[0]

    # --- values ------------------------------------------------------------------------------

    def _take_rewards(self, point: Point, rewards: Sequence[float]) -> None:
        self._rewards[point] = tuple(self._sign * float(each) for each in rewards)

    def _finite(self, value: float | None) -> float | None:
        if value is None or not math.isfinite(value):
            return None
        return self._sign * float(value)

    def _point(self, parameters: Mapping[str, float]) -> Point:
        missing = [name for name in self.names if name not in parameters]
        if missing:
            raise ValueError(
                f"the point {dict(parameters)} has no {', '.join(missing)}: name every parameter "
                "of the space"
            )
        return tuple(round(float(parameters[name]), DECIMALS) for name in self.names)
