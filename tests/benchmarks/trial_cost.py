"""The cost of a trial: ours, warm, against the reference's way and a warm but naive loop.

python -m tests.benchmarks.trial_cost

One trial of the embedded model: two prompts at its default size and steps, drawn with POA, scored.

- ours: `evaluate` on a replica that has drawn the prompts before: prune, draw both as a batch,
  score, measure the sparsity. Loading and the first trial happen once for a search and are given
  apart; what Ray adds to a trial (25-31 ms, FACTS section 5) is not counted.
- reference: for every prompt three new processes, one after the other: import, load, deep-copy,
  prune, draw, save; resize to 256; load the reward, score. All of it counts, because all of it
  happens in every trial. Files and modules are in the system's cache after the first. The model is
  tiny: with SDXL loading takes far longer, and so does drawing, so the factor is another one.
- naive: one process, the model loaded once and deep-copied; prune anew by the reference's way,
  then prompt by prompt: encode, call both UNets at each step, decode, score. The load is not
  counted.

All use the same number of threads, one unless told otherwise: what a trial of a search has. Each
trial's ratios differ from the one before. The three ways draw the same pictures, which is checked;
the reference scores PNGs resized to 256x256, so its rewards are compared to those of our pictures
saved and resized.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from crdiff_core.evaluation import evaluate
from crdiff_core.models import Model
from crdiff_core.prompts import Prompt, noise_seed
from crdiff_core.ratios import BlockRatios, Resolution
from crdiff_core.replica import Replica
from crdiff_core.rewards import Reward, load_reward
from crdiff_core.shapes.grammar import captions
from tests.benchmarks.measuring import (
    RESULTS,
    Goal,
    goals_as_json,
    machine,
    print_goals,
    seconds_of,
    write_json,
)
from tests.benchmarks.naive_loop import NaiveLoop
from tests.benchmarks.reference_way import SCORED_SIDE
from tests.benchmarks.trial_overhead import CONF, POA_WEIGHT, RATIOS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
REWARD = "shapes"
MIN_TIMES_REFERENCE = 20
MIN_TIMES_NAIVE = 1.5
# Batched or one by one, float32 sums differ in their last bits; a PNG rounds to 1/255.
PICTURE_TOLERANCE = 1e-3
PNG_TOLERANCE = 0.5 / 255 + PICTURE_TOLERANCE
# A pixel between two colours may change sides.
REWARD_TOLERANCE = 0.005


@dataclass(frozen=True)
class Recipe:
    """What all three ways draw."""

    model: Model
    resolution: Resolution
    num_steps: int
    guidance_scale: float

    @property
    def drawing(self) -> dict[str, Any]:
        return {
            "num_steps": self.num_steps,
            "guidance_scale": self.guidance_scale,
            "poa_weight": POA_WEIGHT,
        }


class ReferenceWay:
    """Three processes for every prompt."""

    def __init__(self, recipe: Recipe, folder: Path, num_threads: int) -> None:
        self._recipe = recipe
        self._folder = folder
        self._environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(num_threads),
            "MKL_NUM_THREADS": str(num_threads),
            "HF_HUB_OFFLINE": "1",
        }
        self.seconds: dict[str, list[float]] = {"render": [], "resize": [], "score": []}

    def trial(self, ratios: BlockRatios, prompts: Sequence[Prompt]) -> list[float]:
        """Return the rewards; the pictures stay in the folder."""
        return [self._picture(ratios, prompt) for prompt in prompts]

    def png(self, ratios: BlockRatios, prompt: Prompt) -> Path:
        return self._folder / f"{RATIOS.index(ratios)}-{prompt.tag}.png"

    def _picture(self, ratios: BlockRatios, prompt: Prompt) -> float:
        recipe = self._recipe
        task = {
            "model": str(recipe.model.folder),
            "dtype": recipe.model.dtype,
            "ratios": asdict(ratios),
            "text": prompt.text,
            "seed": prompt.seed,
            "height": recipe.resolution.height,
            "width": recipe.resolution.width,
            **recipe.drawing,
            "png": str(self.png(ratios, prompt)),
            "resized": str(self._folder / "resized.png"),
            "reward": REWARD,
        }
        for process, times in self.seconds.items():
            start = time.perf_counter()
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "tests.benchmarks.reference_way",
                    process,
                    json.dumps(task),
                ],
                cwd=ROOT,
                env=self._environment,
                capture_output=True,
                text=True,
            )
            times.append(time.perf_counter() - start)
            if done.returncode:
                raise RuntimeError(f"the reference's {process} process failed: {done.stderr}")
        return float(json.loads(done.stdout))


def to_png(picture: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> 8 bits."""
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


def from_png(picture: Image.Image) -> Tensor:
    """8 bits -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def check_same(
    replica: Replica,
    naive: NaiveLoop,
    reference: ReferenceWay,
    rewards: dict[str, list[list[float]]],
    prompts: Sequence[Prompt],
    reward: Reward,
) -> dict[str, float]:
    """Return how far the ways' pictures and rewards lie apart.

    rewards: by way, of each prompt, for each ratio triple that the reference has drawn.
    Raises AssertionError if that is more than the tolerances.
    """
    texts = [prompt.text for prompt in prompts]
    side = (SCORED_SIDE, SCORED_SIDE)
    apart = dict.fromkeys(
        ("naive_pictures", "reference_pictures", "naive_rewards", "reference_rewards"), 0.0
    )

    def note(name: str, ours: Tensor, theirs: Tensor) -> None:
        apart[name] = max(apart[name], float((ours - theirs).abs().max()))

    for index in range(len(rewards["reference"])):
        ratios = RATIOS[index]
        replica.set_ratios(ratios)
        naive.prune(ratios)
        ours = replica.render(prompts)
        note("naive_pictures", ours, torch.cat([naive.draw(prompt) for prompt in prompts]))
        pngs = [Image.open(reference.png(ratios, prompt)) for prompt in prompts]
        note("reference_pictures", ours, torch.stack([from_png(png) for png in pngs]))
        resized = [to_png(each).resize(side, Image.Resampling.BICUBIC) for each in ours]
        expected = reward(torch.stack([from_png(each) for each in resized]), texts)
        by_way = {way: torch.tensor(triples[index]) for way, triples in rewards.items()}
        note("naive_rewards", by_way["ours"], by_way["naive"])
        note("reference_rewards", torch.tensor(expected), by_way["reference"])
    assert apart["naive_pictures"] <= PICTURE_TOLERANCE, f"the naive pictures differ: {apart}"
    assert apart["reference_pictures"] <= PNG_TOLERANCE, f"the reference's differ: {apart}"
    assert apart["naive_rewards"] <= REWARD_TOLERANCE, f"the naive rewards differ: {apart}"
    assert apart["reference_rewards"] <= REWARD_TOLERANCE, f"the reference's differ: {apart}"
    return apart


def measure(
    recipe: Recipe, prompts: Sequence[Prompt], num_rounds: int, num_fast: int
) -> dict[str, Any]:
    """Time the three ways in turn; in each round the reference's once, the others num_fast times.

    Raises AssertionError if their pictures or rewards differ.
    """
    reward = load_reward(REWARD)

    def load() -> None:
        nonlocal replica
        pipe = recipe.model.load(CPU)
        replica = Replica(pipe, recipe.resolution, **recipe.drawing)

    replica: Any = None
    load_s = seconds_of(load, CPU)
    naive = NaiveLoop(recipe.model.load(CPU), recipe.resolution, **recipe.drawing)
    rewards: dict[str, list[list[float]]] = {"ours": [], "naive": [], "reference": []}
    seconds: dict[str, list[float]] = {way: [] for way in rewards}

    def ours(ratios: BlockRatios) -> list[float]:
        return list(evaluate(replica, ratios, prompts, reward).rewards)

    def warm(ratios: BlockRatios) -> list[float]:
        return naive.trial(ratios, prompts, reward)

    def timed(way: str, trial: Any, ratios: BlockRatios) -> None:
        found: list[float] = []
        seconds[way].append(seconds_of(lambda: found.extend(trial(ratios)), CPU))
        index = RATIOS.index(ratios)
        if len(rewards[way]) == index:
            rewards[way].append(found)
        else:
            assert rewards[way][index] == found, f"{way}: another reward the second time"

    first_s = seconds_of(partial(ours, RATIOS[1]), CPU)
    warm(RATIOS[1])
    with tempfile.TemporaryDirectory() as folder:
        reference = ReferenceWay(recipe, Path(folder), torch.get_num_threads())
        for round_ in range(num_rounds):
            for fast in range(num_fast):
                ratios = RATIOS[(round_ * num_fast + fast) % 2]
                timed("ours", ours, ratios)
                timed("naive", warm, ratios)
            timed("reference", partial(reference.trial, prompts=prompts), RATIOS[round_ % 2])
            medians = {way: statistics.median(times) for way, times in seconds.items()}
            print(
                f"round {round_ + 1}/{num_rounds}: "
                + ", ".join(f"{way} {median:.3f} s" for way, median in medians.items()),
                flush=True,
            )
        apart = check_same(replica, naive, reference, rewards, prompts, reward)
    return {
        "median_s": {way: round(median, 4) for way, median in medians.items()},
        "num_trials": {way: len(times) for way, times in seconds.items()},
        "fastest_s": {way: round(min(times), 4) for way, times in seconds.items()},
        "reference_process_median_s": {
            process: round(statistics.median(times), 3)
            for process, times in reference.seconds.items()
        },
        "ours_once_per_search_s": {"load": round(load_s, 3), "first_trial": round(first_s, 3)},
        "times_cheaper_than_reference": round(medians["reference"] / medians["ours"], 1),
        "times_cheaper_than_naive": round(medians["naive"] / medians["ours"], 2),
        "largest_differences": {name: round(value, 7) for name, value in apart.items()},
        "rewards": rewards,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON; 1 if a goal is missed."""
    conf = yaml.safe_load(CONF.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", default="", help="a diffusers folder instead of shapes")
    parser.add_argument("--resolution", default=conf["default_res"], help="HEIGHTxWIDTH")
    parser.add_argument("--num-prompts", type=int, default=2)
    parser.add_argument("--num-rounds", type=int, default=4, help="reference trials (default 4)")
    parser.add_argument(
        "--num-fast", type=int, default=5, help="trials of ours and the naive loop in a round"
    )
    parser.add_argument("--num-threads", type=int, default=1, help="of each way (default 1)")
    parser.add_argument("--output", type=Path, default=RESULTS / "trial_cost.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.num_threads)
    recipe = Recipe(
        Model("custom" if options.model_path else "shapes", options.model_path, conf["dtype"]),
        Resolution.parse(options.resolution),
        conf["num_steps"],
        conf["guidance_scale"],
    )
    prompts = [
        Prompt(text, f"p{i}", noise_seed(text, 0))
        for i, text in enumerate(captions(options.num_prompts, 0))
    ]
    measured = measure(recipe, prompts, options.num_rounds, options.num_fast)
    goals = [
        Goal(
            "times cheaper than the reference's way",
            measured["times_cheaper_than_reference"],
            "at least",
            MIN_TIMES_REFERENCE,
        ),
        Goal(
            "times cheaper than the naive loop",
            measured["times_cheaper_than_naive"],
            "at least",
            MIN_TIMES_NAIVE,
        ),
    ]
    result = {
        "benchmark": "trial_cost",
        "model": recipe.model.name,
        "revision": recipe.model.revision,
        "dtype": recipe.model.dtype,
        "resolution": str(recipe.resolution),
        "num_prompts": len(prompts),
        **recipe.drawing,
        **measured,
        "goals": goals_as_json(goals),
        "machine": machine(CPU),
    }
    write_json(result, options.output)
    print(f"\n{result['machine']['processor']}, {options.num_threads} threads")
    for way, seconds in measured["median_s"].items():
        print(f"  {way:<10} {seconds:>8.3f} s a trial")
    for process, seconds in measured["reference_process_median_s"].items():
        print(f"    {process:<8} {seconds:>8.3f} s a picture")
    once = measured["ours_once_per_search_s"]
    print(f"  ours, once: load {once['load']:.2f} s, first trial {once['first_trial']:.2f} s")
    return print_goals(goals, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
