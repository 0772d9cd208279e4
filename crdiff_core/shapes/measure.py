"""Measure the shapes model for its card: `python -m crdiff_core.shapes.measure`.

Every caption is held out of training; the prompts of one question are not those of another.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm import tqdm

from crdiff_core.evaluation import evaluate
from crdiff_core.models import Model
from crdiff_core.numerics import make_reproducible
from crdiff_core.prompts import Prompt, split_prompts
from crdiff_core.ratios import DEFAULT_POA_WEIGHT, GROUPS, BlockRatios, Resolution
from crdiff_core.replica import Replica, choose_device
from crdiff_core.rewards.shapes import ShapesReward
from crdiff_core.shapes import grammar

SIZES = ("32x32", "24x24", "24x40", "40x24", "32x48", "48x48")
"""Native first, then five that the UNet has never seen."""

BATCH = 32
LOW = 0.1


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and half of its 95% interval. values: (N,), N > 1."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


class Measuring:
    """One resolution's replica and the rewards it gets."""

    def __init__(self, options: argparse.Namespace, resolution: str) -> None:
        self.replica = Replica(
            Model("shapes", path=str(options.model or "")).load(choose_device(options.device)),
            Resolution.parse(resolution),
            num_steps=options.steps,
            guidance_scale=options.guidance,
            poa_weight=options.poa_weight,
        )
        self.reward = ShapesReward()
        self.seconds: list[float] = []

    def rewards(self, ratios: BlockRatios, prompts: Sequence[Prompt]) -> NDArray[np.float64]:
        """One reward for each prompt."""
        found: list[float] = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            measured = evaluate(self.replica, ratios, batch, self.reward)
            found += measured.rewards
            self.seconds.append(sum(measured.seconds.values()) / len(batch))
        return np.array(found)


def measure_sizes(options: argparse.Namespace, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Reward of the dense model at native and at unseen sizes."""
    found = {}
    for size in SIZES:
        mean, half = interval(Measuring(options, size).rewards(BlockRatios(), prompts))
        found[size] = {"mean": mean, "half_interval": half}
        print(f"dense {size}: {mean:.3f} +- {half:.3f}", flush=True)
    return found


def measure_landscape(
    options: argparse.Namespace, prompts: Sequence[Prompt], fresh: Sequence[Prompt]
) -> dict[str, Any]:
    """Random triples, each group alone at the upper bound, and the best triples once more.

    fresh: prompts that had no part in choosing the best.
    """
    here = Measuring(options, options.resolution)
    dense = here.rewards(BlockRatios(), prompts)
    here.seconds.clear()
    alone = {}
    for group in GROUPS:
        change = here.rewards(BlockRatios(**{group: options.high}), prompts) - dense
        mean, half = interval(change)
        alone[group] = {"mean": mean, "half_interval": half}
        print(f"{group} alone at {options.high}: {mean:+.3f} +- {half:.3f}", flush=True)

    rng = np.random.default_rng(options.seed)
    triples = [
        BlockRatios(*rng.uniform(LOW, options.high, 3).round(3)) for _ in range(options.triples)
    ]
    table = np.stack(
        [here.rewards(triple, prompts) for triple in tqdm(triples, "triples", mininterval=10)]
    )
    means = table.mean(1)
    errors = (table - dense).std(1, ddof=1) / np.sqrt(len(prompts))
    spread, error = float(means.std(ddof=1)), float(np.sqrt((errors**2).mean()))
    print(
        f"{len(triples)} triples: means {means.min():.3f} .. {means.max():.3f}, sd {spread:.4f} = "
        f"{spread / error:.1f} x paired standard error {error:.4f}; dense {dense.mean():.3f}"
    )

    dense_fresh = here.rewards(BlockRatios(), fresh)
    best = []
    for k in np.argsort(-means)[: options.best]:
        mean, half = interval(here.rewards(triples[k], fresh) - dense_fresh)
        searched = float(means[k] - dense.mean())
        best.append(
            {
                "ratios": triples[k].as_dict(),
                "searched": searched,
                "mean": mean,
                "half_interval": half,
            }
        )
        print(
            f"{triples[k]}: {searched:+.3f} searched, {mean:+.3f} +- {half:.3f} on fresh prompts"
        )
    return {
        "resolution": options.resolution,
        "dense": float(dense.mean()),
        "group_alone_at_upper_bound": alone,
        "triples": [
            {**triple.as_dict(), "mean": float(mean)}
            for triple, mean in zip(triples, means, strict=True)
        ],
        "sd_of_mean_reward": spread,
        "paired_standard_error": error,
        "dense_on_fresh_prompts": float(dense_fresh.mean()),
        "best_minus_dense_on_fresh_prompts": best,
        "seconds_per_poa_picture": float(np.median(here.seconds)),
    }


def draw_samples(
    options: argparse.Namespace, prompts: Sequence[Prompt], ratios: BlockRatios, file: Path
) -> None:
    """Write a sheet: native, dense at the other resolution, there with CR-Diff."""
    native, other = Measuring(options, SIZES[0]), Measuring(options, options.resolution)
    rows = []
    for here, triple in ((native, BlockRatios()), (other, BlockRatios()), (other, ratios)):
        here.replica.set_ratios(triple)
        rows.append(here.replica.render(prompts).cpu())
    zoom, gap, left = 3, 6, 92
    wide = max(row.shape[3] for row in rows) * zoom + gap
    tall = [row.shape[2] * zoom + gap for row in rows]
    sheet = Image.new("RGB", (left + wide * len(prompts), sum(tall)), "white")
    pen = ImageDraw.Draw(sheet)
    names = (f"{SIZES[0]} dense", f"{options.resolution} dense", f"{options.resolution} CR-Diff")
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = sum(tall[:i])
        pen.text((2, top + tall[i] // 2 - 8), name, fill="black")
        for k, picture in enumerate(row):
            pixels = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            tile = Image.fromarray(pixels)
            tile = tile.resize((tile.width * zoom, tile.height * zoom), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + wide * k, top + gap // 2))
    sheet.save(file, optimize=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write measurements.json and samples.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the two files")
    parser.add_argument("--model", type=Path, help="another pipeline folder than the shipped one")
    parser.add_argument("--resolution", default="24x40", help="of the landscape, HEIGHTxWIDTH")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--poa-weight", type=float, default=DEFAULT_POA_WEIGHT)
    parser.add_argument("--high", type=float, default=0.95, help="upper bound of each ratio")
    parser.add_argument("--triples", type=int, default=64)
    parser.add_argument("--best", type=int, default=3, help="triples measured on fresh prompts")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--fresh-prompts", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    make_reproducible()
    began = time.perf_counter()
    wanted = {
        "sizes": options.prompts,
        "landscape": options.prompts,
        "fresh": options.fresh_prompts,
        "samples": 8,
    }
    texts = grammar.captions(sum(wanted.values()), options.seed)
    sets = split_prompts(texts, wanted, options.seed, "the shapes grammar")
    found = {
        "settings": {
            "steps": options.steps,
            "guidance": options.guidance,
            "poa_weight": options.poa_weight,
            "bounds": [LOW, options.high],
            "num_prompts": wanted,
            "seed": options.seed,
        },
        "dense_by_size": measure_sizes(options, sets["sizes"].prompts),
        **measure_landscape(options, sets["landscape"].prompts, sets["fresh"].prompts),
    }
    best = BlockRatios(**found["best_minus_dense_on_fresh_prompts"][0]["ratios"])
    options.out.mkdir(parents=True, exist_ok=True)
    draw_samples(options, sets["samples"].prompts, best, options.out / "samples.png")
    found["minutes"] = (time.perf_counter() - began) / 60
    (options.out / "measurements.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
