"""Searchers: adapters from the annealing chain and Optuna's samplers to ray.tune's Searcher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from search.annealing import Annealing, Chain, ChainState

Space = Mapping[str, tuple[float, float]]


class AnnealingSearch(Searcher):  # type: ignore[misc]
    """The annealing chain of CR-Diff as a ray.tune searcher; one suggestion at a time.

        AnnealingSearch(space={"down": (0.1, 0.8), "mid": (0.1, 0.8), "up": (0.1, 0.8)},
                        metric="reward", mode="max", seed=0, max_evaluations=60)

    space:           (low, high) of each parameter; it stays within them.
    metric, mode:    what trials report, and whether "max" or "min" is better.
    seed:            of every random number; equal seeds and results give equal suggestions.
    max_evaluations: suggestions in all, seeds included; then it is finished.
    seeds:           starting points, best first or not; by default the middle of the space.
    parameters:      of `search.annealing.Annealing`, such as cooling=0.9.
    A failed trial, or a result that is not finite, is a rejection. Results for unknown or
    finished trials are ignored.
    Source: CR-Diff (arXiv:2604.05524), supplement, Algorithm 1.
    """

    def __init__(
        self,
        space: Space,
        metric: str = "reward",
        mode: str = "max",
        seed: int = 0,
        max_evaluations: int = 120,
        seeds: Sequence[Mapping[str, float]] | None = None,
        **parameters: Any,
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        if not space:
            raise ValueError("space is empty: name at least one parameter and its (low, high)")
        for name, (low, high) in space.items():
            if not low < high:
                raise ValueError(f"space of {name} is ({low}, {high}): give low < high")
        self._names = tuple(space)
        middle = {name: (low + high) / 2 for name, (low, high) in space.items()}
        starts = tuple(
            tuple(float(start[name]) for name in self._names) for start in seeds or [middle]
        )
        if max_evaluations < len(starts):
            raise ValueError(
                f"max_evaluations {max_evaluations} is less than the {len(starts)} seeds: raise it"
            )
        self._sign = 1.0 if mode == "max" else -1.0
        self._chain = Chain(
            Annealing(
                bounds=tuple((float(low), float(high)) for low, high in space.values()),
                seeds=starts,
                num_steps=max_evaluations - len(starts),
                **parameters,
            ),
            seed,
        )
        self.state = self._chain.start()
        self._pending: str | None = None

    def suggest(self, trial_id: str) -> dict[str, float] | str | None:
        """Return the chain's next proposal; None while one is out, FINISHED after the last."""
        if self.state.finished:
            return str(Searcher.FINISHED)
        if self._pending is not None:
            return None
        self._pending = trial_id
        return dict(zip(self._names, self._chain.propose(self.state), strict=True))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Commit the outcome of the pending suggestion."""
        if trial_id != self._pending:
            return
        self._pending = None
        value = None if error or not result else result.get(self.metric)
        reward = None if value is None else self._sign * float(value)
        self.state = self._chain.advance(self.state, self._chain.propose(self.state), reward)

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Return True: the searcher limits itself, so Ray wraps no limiter around it."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Write the chain's state as JSON; a pending suggestion is made again after restore."""
        Path(checkpoint_path).write_text(json.dumps(asdict(self.state)), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Read what `save` wrote, into a searcher of the same parameters."""
        raw = json.loads(Path(checkpoint_path).read_text(encoding="utf-8"))
        for name in ("current", "best"):
            raw[name] = None if raw[name] is None else tuple(raw[name])
        self.state = ChainState(**raw)
        self._pending = None


def random_search(space: Space, seed: int, metric: str = "reward") -> Searcher:
    """Return Optuna's random sampler as a searcher that maximises; it never finishes by itself."""
    import optuna
    from optuna.distributions import FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(
        {name: FloatDistribution(low, high) for name, (low, high) in space.items()},
        metric=metric,
        mode="max",
        sampler=optuna.samplers.RandomSampler(seed=seed),
    )
