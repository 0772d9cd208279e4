"""What MLflow costs a search, in order and out of order, as a share of the search without it.

python -m tests.benchmarks.tracking
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from ray.cluster_utils import Cluster

from tests.benchmarks.measuring import (
    RESULTS,
    Goal,
    goals_as_json,
    machine,
    print_goals,
    write_json,
)
from tests.faults.proxy import Proxy, serving
from tests.faults.sessions import Searching

MAX_SLOWDOWN = 0.05
# A prompt batch: less than any that is worth a GPU, so that MLflow's share is at its largest.
BATCH_S = 0.5
# As a model takes to load, or less: beside a worker that is at work at once, with trials as short
# as these, Ray Tune starts a second one by chance only (search.trial.RatioTrial says why).
LOAD_S = 5.0
SEARCH = ("budget.steps=20",)
# The last line is the search without MLflow.
WAYS = ("SQLite", "a server", "slow", "refuse", "hang", "garble", "none")


@contextmanager
def two_nodes(folder: Path) -> Iterator[str]:
    """A Ray cluster as the tests' of faults; its address."""
    os.environ["RAY_TMPDIR"] = str(folder)
    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


def seconds(folder: Path, address: str, way: str, proxy: Proxy) -> tuple[float, float]:
    """Run the search once; returns how long it took, and how long it then waited for MLflow."""
    settings: tuple[str, ...] = SEARCH
    if way == "none":
        settings += ("tracking=none",)
    elif way != "SQLite":
        proxy.mode = "pass" if way == "a server" else way
        settings += (f"tracking.uri=http://127.0.0.1:{proxy.port}",)
    search = Searching(folder, address, settings, batch_s=BATCH_S, load_s=LOAD_S)
    search.finish()
    lines = (search.results.read("log.jsonl") or b"").decode().splitlines()
    times = {
        line["message"].partition(":")[0]: datetime.fromisoformat(line["at"])
        for line in map(json.loads, lines)
    }
    took = times["search ends"] - times["search begins"]
    waited = times.get("MLflow is done with", times["search ends"]) - times["search ends"]
    return took.total_seconds(), waited.total_seconds()


def measure(rounds: int) -> dict[str, Any]:
    """Return medians over the rounds; the ways take turns, so that they share the host's moods."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="crb", dir="/tmp") as name:
        folder = Path(name)
        (folder / "server").mkdir()
        with two_nodes(folder) as address, serving(folder / "server") as port:
            proxy = Proxy(port)
            seconds(folder / "warm-up", address, "none", proxy)
            for number in range(rounds):
                for way in WAYS:
                    place = folder / f"{way} {number}"
                    found[way].append(seconds(place, address, way, proxy))
                    print(f"{way}: {found[way][-1][0]:.1f} s", file=sys.stderr, flush=True)
                    shutil.rmtree(place)
            proxy.close()
    medians = {way: statistics.median(took for took, _ in found[way]) for way in WAYS}
    return {
        "batch_s": BATCH_S,
        "load_s": LOAD_S,
        "rounds": rounds,
        "seconds": {way: round(took, 2) for way, took in medians.items()},
        "waited_s": {way: round(max(w for _, w in found[way]), 2) for way in WAYS[:-1]},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "tracking.json")
    options = parser.parse_args(arguments)
    found = measure(options.rounds)
    goals = [
        Goal(
            f"share that a search takes longer, MLflow: {way}",
            round(found["seconds"][way] / found["seconds"]["none"] - 1, 4),
            "at most",
            MAX_SLOWDOWN,
        )
        for way in WAYS[:-1]
    ]
    result = {"machine": machine(torch.device("cpu")), **found, "goals": goals_as_json(goals)}
    write_json(result, options.output)
    return print_goals(goals, options.output)


if __name__ == "__main__":
    sys.exit(main())
