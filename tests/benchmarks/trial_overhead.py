"""The share of a shapes trial that is spent outside UNet, VAE and reward.

python -m tests.benchmarks.trial_overhead
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from crdiff_core.evaluation import evaluate
from crdiff_core.models import Model
from crdiff_core.prompts import Prompt, noise_seed
from crdiff_core.ratios import BlockRatios, Resolution
from crdiff_core.replica import Replica, choose_device
from crdiff_core.rewards import Reward, load_reward
from crdiff_core.shapes.grammar import captions
from tests.benchmarks.measuring import (
    RESULTS,
    Goal,
    finish,
    goals_as_json,
    machine,
    print_goals,
    write_json,
)

CONF = Path(__file__).parents[2] / "conf" / "model" / "shapes.yaml"
POA_WEIGHT = 1.5
MAX_SHARE = 0.05
# Each trial changes every ratio, as a search's may.
RATIOS = (BlockRatios(0.3, 0.3, 0.3), BlockRatios(0.5, 0.2, 0.4))


class Stopwatch:
    """Seconds spent in each part of a trial."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = {"unet": 0.0, "vae": 0.0, "reward": 0.0}
        self._started = 0.0

    def now(self) -> float:
        """The time once the device has done its work."""
        finish(self._device)
        return time.perf_counter()

    @contextmanager
    def running(self, part: str) -> Iterator[None]:
        """Count the time of the block for a part."""
        start = self.now()
        yield
        self.seconds[part] += self.now() - start

    def watch(self, module: nn.Module, part: str) -> None:
        """Count a module's forward passes for a part."""

        def before(*_: Any) -> None:
            self._started = self.now()

        def after(*_: Any) -> None:
            self.seconds[part] += self.now() - self._started

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


class TimedReward:
    """A reward under the stopwatch."""

    def __init__(self, reward: Reward, stopwatch: Stopwatch) -> None:
        self._reward, self._stopwatch = reward, stopwatch
        self.name, self.version = reward.name, reward.version

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        with self._stopwatch.running("reward"):
            return self._reward(images, prompts)


def time_vae(pipe: Any, stopwatch: Stopwatch) -> None:
    """Put pipe.vae.decode under the stopwatch."""
    decode = pipe.vae.decode

    def timed(*args: Any, **kwargs: Any) -> Any:
        with stopwatch.running("vae"):
            return decode(*args, **kwargs)

    pipe.vae.decode = timed


def measure(
    model: Model, resolution: Resolution, num_prompts: int, num_repeats: int, conf: dict[str, Any]
) -> dict[str, Any]:
    """Time trials of one replica: the first, which fills the caches, and the later ones.

    The dense and the pruned UNet are timed each by itself: combining their outputs, pruning and
    measuring the sparsity count as overhead.
    """
    device = choose_device()
    replica = Replica(
        model.load(device),
        resolution,
        num_steps=conf["num_steps"],
        guidance_scale=conf["guidance_scale"],
        poa_weight=POA_WEIGHT,
    )
    stopwatch = Stopwatch(device)
    stopwatch.watch(replica.denoiser.dense, "unet")
    stopwatch.watch(replica.denoiser.pruned, "unet")
    time_vae(replica.pipe, stopwatch)
    reward = TimedReward(load_reward("shapes"), stopwatch)
    prompts = [
        Prompt(text, f"p{i}", noise_seed(text, 0))
        for i, text in enumerate(captions(num_prompts, 0))
    ]
    trials: list[dict[str, float]] = []
    for repeat in range(num_repeats + 1):
        stopwatch.seconds = dict.fromkeys(stopwatch.seconds, 0.0)
        start = stopwatch.now()
        measurement = evaluate(replica, RATIOS[repeat % len(RATIOS)], prompts, reward)
        total = stopwatch.now() - start
        inside = sum(stopwatch.seconds.values())
        trials.append(
            {
                "total": total,
                **stopwatch.seconds,
                "prune": measurement.seconds["prune"],
                "outside": total - inside,
                "share": 1 - inside / total,
            }
        )
        kind = "first trial" if repeat == 0 else f"trial {repeat}/{num_repeats}"
        share = trials[-1]["share"]
        print(f"{kind}: {total:.3f} s, {share:.2%} of it outside", flush=True)
    replica.close()
    later = trials[1:]
    medians = {part: statistics.median(trial[part] for trial in later) for part in trials[0]}
    return {
        "benchmark": "trial_overhead",
        "model": model.name,
        "revision": model.revision,
        "dtype": model.dtype,
        "resolution": str(resolution),
        "num_prompts": num_prompts,
        "num_steps": conf["num_steps"],
        "guidance_scale": conf["guidance_scale"],
        "poa_weight": POA_WEIGHT,
        "num_trials": num_repeats,
        "share_outside": round(medians.pop("share"), 4),
        "share_outside_of_first_trial": round(trials[0]["share"], 4),
        "median_s": {part: round(value, 5) for part, value in medians.items()},
        "machine": machine(device),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON; 1 if the goal is missed."""
    conf = yaml.safe_load(CONF.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", default="", help="a diffusers folder instead of shapes")
    parser.add_argument("--resolution", default=conf["default_res"], help="HEIGHTxWIDTH")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--num-repeats", type=int, default=9, help="trials (default 9)")
    parser.add_argument("--output", type=Path, default=RESULTS / "trial_overhead.json")
    options = parser.parse_args(arguments)
    result = measure(
        Model("custom" if options.model_path else "shapes", options.model_path, conf["dtype"]),
        Resolution.parse(options.resolution),
        options.num_prompts,
        options.num_repeats,
        conf,
    )
    share, first = result["share_outside"], result["share_outside_of_first_trial"]
    goals = [Goal("share outside UNet, VAE and reward", share, "at most", MAX_SHARE)]
    write_json({**result, "goals": goals_as_json(goals)}, options.output)
    print(
        f"\n{result['model']} at {result['resolution']}, {result['num_prompts']} prompts, "
        f"{result['num_steps']} steps; {result['machine']['processor']}, "
        f"{result['machine']['num_threads']} threads"
    )
    for part, seconds in result["median_s"].items():
        print(f"  {part:<8} {seconds:>9.4f} s")
    print(f"  outside, of the first trial, which encodes the prompts: {first:.2%}")
    return print_goals(goals, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
