"""Tabulated landscapes: rewards of the shapes model over a grid of ratios, and interpolated.

`python -m tests.benchmarks.landscapes` renders them and writes tests/benchmarks/landscapes/.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from numpy.typing import NDArray
from scipy.interpolate import RegularGridInterpolator

from crdiff_core.evaluation import evaluate
from crdiff_core.models import Model
from crdiff_core.prompts import PromptSet, split_prompts
from crdiff_core.ratios import DEFAULT_POA_WEIGHT, GROUPS, BlockRatios, Resolution
from crdiff_core.replica import Replica, choose_device
from crdiff_core.rewards import load_reward
from crdiff_core.shapes import grammar

Array = NDArray[np.float64]
Triple = tuple[float, ...]

FOLDER = Path(__file__).with_suffix("")
CONF = Path(__file__).parents[2] / "conf" / "model" / "shapes.yaml"
SIZES = ("24x40", "24x24")
GRID = (0.1, 0.27, 0.44, 0.61, 0.78, 0.95)
NUM_PROMPTS = 64
SEED = 20_240
BATCH = 16
NUM_WORKERS = 2


class Landscape:
    """Each prompt's reward as a multilinear function of the ratios, maximised on average.

    bounds:      (low, high) of down, mid and up.
    best:        the largest mean reward; a multilinear function has it at a vertex of its grid.
    scale:       best minus the median of the vertices: regrets are comparable in units of it.
    dense:       each prompt's reward without pruning, (num_prompts,).
    """

    def __init__(self, grid: Sequence[Array], table: Array, dense: Array) -> None:
        """Interpolate a table. grid: three ascending axes; table: (a, b, c, num_prompts)."""
        self.grid = tuple(grid)
        self.table = table
        self.dense = dense
        self.bounds = tuple((float(axis[0]), float(axis[-1])) for axis in grid)
        self.num_prompts = table.shape[-1]
        self.best = float(table.mean(-1).max())
        self.scale = self.best - float(np.median(table.mean(-1)))

    @classmethod
    def read(cls, name: str) -> Landscape:
        """Read one that ships, by its size, such as 24x40."""
        columns = pq.read_table(FOLDER / f"shapes_{name}.parquet").to_pydict()
        triples = np.array([columns[group] for group in GROUPS]).T
        rewards = np.array(columns["reward"], dtype=float)
        is_dense = (triples == 0).all(1)
        triples, dense, rewards = triples[~is_dense], rewards[is_dense], rewards[~is_dense]
        grid = [np.unique(axis) for axis in triples.T]
        # Rows are in the order of the axes, prompts innermost.
        return cls(grid, rewards.reshape(*map(len, grid), len(dense)), dense)

    def rewards(self, points: Array) -> Array:
        """Return the rewards of (n, 3) ratios within the bounds: (n, num_prompts)."""
        found: Array = self._interpolate(points)
        return found

    @property
    def best_point(self) -> Triple:
        """The vertex with the largest mean reward."""
        means = self.table.mean(-1)
        at = np.unravel_index(means.argmax(), means.shape)
        return tuple(float(axis[i]) for axis, i in zip(self.grid, at, strict=True))

    @cached_property
    def _interpolate(self) -> RegularGridInterpolator:
        return RegularGridInterpolator(self.grid, self.table)


# --- rendering ---------------------------------------------------------------------------------


def prompt_set() -> PromptSet:
    """Return captions that the model has not seen in training, with their noise."""
    texts = grammar.captions(NUM_PROMPTS, SEED)
    sets = split_prompts(texts, {"landscape": NUM_PROMPTS}, SEED, "the shapes grammar")
    return sets["landscape"]


def triples() -> list[Triple]:
    """Return the dense model's and the grid's, `up` innermost."""
    return [(0.0, 0.0, 0.0), *product(GRID, repeat=len(GROUPS))]


class Renderer:
    """One process's replica."""

    current: Renderer

    def __init__(self, size: str) -> None:
        torch.set_num_threads(1)
        conf = yaml.safe_load(CONF.read_text(encoding="utf-8"))
        model = Model.find("shapes", conf["dtype"])
        self.replica = Replica(
            model.load(choose_device("cpu")),
            Resolution.parse(size),
            num_steps=conf["num_steps"],
            guidance_scale=conf["guidance_scale"],
            poa_weight=DEFAULT_POA_WEIGHT,
        )
        self.reward = load_reward("shapes")
        self.prompts = prompt_set().prompts

    @classmethod
    def start(cls, size: str) -> None:
        """Load this process's replica."""
        cls.current = cls(size)

    @classmethod
    def rewards(cls, triple: Triple) -> tuple[Triple, list[float]]:
        """Return the triple and the rewards of its pictures."""
        self = cls.current
        found: list[float] = []
        for first in range(0, len(self.prompts), BATCH):
            batch = self.prompts[first : first + BATCH]
            found += evaluate(self.replica, BlockRatios(*triple), batch, self.reward).rewards
        return triple, found


def read_lines(path: Path) -> Iterator[Any]:
    """Yield what a file of JSON lines holds; a last line that was cut short is left out."""
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def render(size: str, work: Path) -> dict[Triple, list[float]]:
    """Render every triple that the file `work` does not have yet, and add it there."""
    done = {tuple(line["ratios"]): line["rewards"] for line in read_lines(work)}
    todo = [triple for triple in triples() if triple not in done]
    if not todo:
        return done
    began = time.monotonic()
    processes = multiprocessing.get_context("spawn")
    with (
        processes.Pool(NUM_WORKERS, Renderer.start, (size,)) as pool,
        work.open("a", encoding="utf-8") as file,
    ):
        for count, (triple, rewards) in enumerate(pool.imap(Renderer.rewards, todo), 1):
            file.write("\n" * (count == 1) + json.dumps({"ratios": triple, "rewards": rewards}))
            file.write("\n")
            file.flush()
            done[triple] = rewards
            left = (time.monotonic() - began) / count * (len(todo) - count)
            mean = float(np.mean(rewards))
            print(
                f"{size} {len(done)}/{len(triples())} {BlockRatios(*triple)}: {mean:.3f}, "
                f"{left / 60:.1f} min left",
                flush=True,
            )
    return done


def write(size: str, rewards: dict[Triple, list[float]], path: Path) -> None:
    """Write a size's table, one row for each picture."""
    conf = yaml.safe_load(CONF.read_text(encoding="utf-8"))
    metadata = {
        "model": "shapes",
        "revision": Model.find("shapes", conf["dtype"]).revision,
        "resolution": size,
        "num_steps": conf["num_steps"],
        "guidance_scale": conf["guidance_scale"],
        "poa_weight": DEFAULT_POA_WEIGHT,
        "prompts": prompt_set().digest,
    }
    order = np.array(triples())
    columns: dict[str, Any] = {
        group: np.repeat(order[:, axis], NUM_PROMPTS) for axis, group in enumerate(GROUPS)
    }
    columns["prompt"] = np.tile(np.arange(NUM_PROMPTS, dtype=np.int32), len(order))
    columns["reward"] = np.concatenate([rewards[tuple(triple)] for triple in order.tolist()])
    columns["reward"] = columns["reward"].astype(np.float32)
    table = pa.table(columns).replace_schema_metadata(
        {name: str(value) for name, value in metadata.items()}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")


def describe(size: str) -> str:
    """Say in a line how much the ratios matter."""
    landscape = Landscape.read(size)
    table = landscape.table.reshape(-1, landscape.num_prompts)
    means = table.mean(1)
    errors = (table - landscape.dense).std(1, ddof=1) / np.sqrt(landscape.num_prompts)
    error = float(np.sqrt((errors**2).mean()))
    return (
        f"{size}: best {landscape.best:.3f} at {BlockRatios(*landscape.best_point)}, "
        f"dense {landscape.dense.mean():.3f}, triples {means.min():.3f} .. {means.max():.3f}, "
        f"median {np.median(means):.3f}, sd {means.std(ddof=1):.4f} = "
        f"{means.std(ddof=1) / error:.1f} x paired standard error {error:.4f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Render what is missing, write the Parquet files, and describe them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder to go on from")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="HEIGHTxWIDTH")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    for size in options.sizes:
        # What another model or other prompts gave is never mixed in.
        named = f"{Model.find('shapes', 'float32').revision[:8]}-{prompt_set().digest[:8]}"
        rewards = render(size, options.work / f"{size}-{named}.jsonl")
        write(size, rewards, FOLDER / f"shapes_{size}.parquet")
        print(describe(size), flush=True)


if __name__ == "__main__":
    main()
