"""What a trial costs besides drawing: suggesting it, and Ray Tune's part, on a real cluster.

python -m tests.benchmarks.scheduling
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from crdiff_core.ratios import GROUPS, BlockRatios
from search.annealing import REFERENCE
from search.cluster import start_at_once
from search.searchers import AnnealingSearch
from tests.benchmarks.measuring import (
    RESULTS,
    Goal,
    goals_as_json,
    machine,
    print_goals,
    write_json,
)
from tests.search.landscapes import PROMPTS, make_search, measure

NUM_PENDING = 1000
MAX_SUGGESTION_S = 0.005
MAX_TRIAL_S = 0.05
MIN_SPEEDUP = 1.8
SLEEP_S = 0.5
# What loading a model takes, and more than a worker's start.
LOAD_S = 10.0
BOUNDS = dict.fromkeys(GROUPS, (0.1, 0.8))


class Sleeping(tune.Trainable):  # type: ignore[misc]
    """A trial that sleeps instead of drawing."""

    def setup(self, config: dict[str, Any], seconds: float) -> None:
        self._seconds = seconds
        self._is_loaded = False

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        if not self._is_loaded:
            time.sleep(LOAD_S)
            self._is_loaded = True
        time.sleep(self._seconds)
        prompts = PROMPTS[self.config["prompts"]].prompts
        batch = [prompts[number] for number in self.config["batch"]]
        measured = measure(BlockRatios(**self.config["ratios"]), batch)
        return {"measured": measured, "done": True}


def suggestion_s(num_pending: int) -> dict[str, float]:
    """Time suggestions while so many are under way.

    mean_s, most_s: of one that is asked for when an evaluation is done, any of them.
    after_a_step_s: where that was the one that the chain waits for, the taking of the step and the
                    new walk through the tree included.
    """
    search = AnnealingSearch(
        BOUNDS, speculation=10 * num_pending, max_steps=100_000, **REFERENCE | {"patience": None}
    )
    names = (f"trial{i}" for i in range(10 * num_pending))
    pending: dict[str, dict[str, float]] = {}
    chance = random.Random(0)

    def suggest() -> float:
        name = next(names)
        began = time.perf_counter()
        suggested = search.suggest(name)
        seconds = time.perf_counter() - began
        assert isinstance(suggested, dict)
        pending[name] = suggested
        return seconds

    def complete(name: str) -> float:
        began = time.perf_counter()
        search.on_trial_complete(name, {"reward": -sum(pending.pop(name).values())})
        return time.perf_counter() - began

    for _ in range(num_pending):
        suggest()
    any_done, step_done = [], []
    for _ in range(200):
        complete(chance.choice(list(pending)))
        any_done.append(suggest())
    for _ in range(20):
        seconds = complete(max(pending, key=search.likelihood))
        step_done.append(seconds + suggest())
    return {
        "mean_s": statistics.fmean(any_done),
        "most_s": max(any_done),
        "after_a_step_s": statistics.median(step_done),
    }


def trial_s(num_trials: int, num_workers: int, seconds: float) -> float:
    """Time each trial of a search on Ray Tune, from the first ones' end to the last one's."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        search = make_search(Path(folder) / "ledger", "random", steps=num_trials, batch_size=7)
        search.max_trials = num_workers
        start_at_once(num_workers)

        def complete(*args: Any, **kwargs: Any) -> None:
            told(*args, **kwargs)
            ends.append(time.perf_counter())

        told, search.on_trial_complete = search.on_trial_complete, complete
        trainable = tune.with_parameters(Sleeping, seconds=seconds)
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            tune_config=tune.TuneConfig(search_alg=search, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=folder,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()
    # The workers' first trials wait for the workers; the last five are re-ranking and validation.
    timed = ends[2 : num_trials + 1]
    return (timed[-1] - timed[0]) / (len(timed) - 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the results; return 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--trials", type=int, default=200, help="that do nothing (default 200)")
    parser.add_argument("--output", type=Path, default=RESULTS / "scheduling.json")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Trials that leave nothing on disk look like failures to Ray's own summary.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    suggestion = suggestion_s(NUM_PENDING)
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            nothing_s = trial_s(options.trials, num_workers=2, seconds=0.0)
            one_s, two_s = (trial_s(options.trials // 8, n, SLEEP_S) for n in (1, 2))
        finally:
            ray.shutdown()
    goals = [
        Goal(
            f"seconds of a suggestion, {NUM_PENDING} under way",
            round(suggestion["mean_s"], 5),
            "at most",
            MAX_SUGGESTION_S,
        ),
        Goal(
            "seconds of a trial on Ray that does nothing",
            round(nothing_s, 4),
            "at most",
            MAX_TRIAL_S,
        ),
        Goal(
            "speed of two workers on sleeping trials, against one",
            round(one_s / two_s, 3),
            "at least",
            MIN_SPEEDUP,
        ),
    ]
    result = {
        "machine": machine(torch.device("cpu")),
        "suggestion": {name: float(f"{value:.3g}") for name, value in suggestion.items()},
        "num_trials": options.trials,
        "goals": goals_as_json(goals),
    }
    write_json(result, options.output)
    return print_goals(goals, options.output)


if __name__ == "__main__":
    sys.exit(main())
