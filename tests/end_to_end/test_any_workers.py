"""The same search with any number of workers, and with one that dies, on a real Ray cluster."""

import io
import json
import threading
import time

import psutil
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster
from rich.console import Console

from search import driver, estimate
from search.plan import Plan
from search.progress import Progress
from tests.conf.test_config import composed

pytestmark = pytest.mark.services

# Search prompts make two batches of 9, the other sets one of their size.
SMALL = (
    *("budget.steps=12", "render.num_steps=2", "report.pictures=0", "tracking=none"),
    *("prompts.search=17", "prompts.rerank=4", "prompts.validation=8"),
)
PATIENCE_S = 120


@pytest.fixture(scope="module")
def cluster(ray_tmpdir):
    """A Ray cluster of this machine, with room for three workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", ray_tmpdir)
        node = {"num_cpus": 3, "include_dashboard": False, "object_store_memory": 80_000_000}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        yield cluster
        cluster.shutdown()


class Searched:
    """A finished search: its answer, and the reward of every picture."""

    def __init__(self, cluster, output, num_workers):
        config = composed(
            *SMALL,
            *("cluster=ray", f"cluster.address={cluster.address}"),
            *(f"cluster.num_workers={num_workers}", f"output={output}"),
        )
        driver.run(config, "command", Progress(Console(file=io.StringIO())))
        cell = output / "shapes_24x40"
        self.log = (cell / "annealing-seed0" / "log.jsonl").read_text()
        self.answer = json.loads((cell / "annealing-seed0" / "best_ratios.json").read_text())
        self.use = self.answer["provenance"].pop("use")
        rows = pq.read_table(cell / "ledger").to_pylist()
        self.rewards = {(row["key"], row["prompt"], row["seed"]): row["reward"] for row in rows}
        assert len(self.rewards) == len(rows)


@pytest.fixture(scope="module")
def alone(cluster, tmp_path_factory):
    return Searched(cluster, tmp_path_factory.mktemp("one"), 1)


def check(search, alone):
    """Compare bits: no reward may be off by the last of them."""
    shared = search.rewards.keys() & alone.rewards.keys()
    assert {key: search.rewards[key] for key in shared} == {
        key: alone.rewards[key] for key in shared
    }
    # One worker evaluates nothing that the search does not take.
    assert shared == alone.rewards.keys()
    assert search.answer == alone.answer


def test_three_workers_find_what_one_does(cluster, alone, tmp_path):
    check(Searched(cluster, tmp_path, 3), alone)


def test_two_workers_of_which_one_is_killed_find_what_one_does(cluster, alone, tmp_path):
    killed = []
    killer = threading.Thread(target=kill_one, args=(cluster, tmp_path, killed))
    killer.start()
    search = Searched(cluster, tmp_path, 2)
    killer.join()

    assert len(killed) == 1
    assert "Trial task failed for trial" in search.log
    check(search, alone)


def kill_one(cluster, output, killed):
    """Kill a worker at a batch, once the search is under way."""
    ledger = output / "shapes_24x40" / "ledger"
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if len(list(ledger.glob("*.parquet"))) >= 4:
            for worker in at_work(cluster):
                worker.kill()
                killed.append(worker.pid)
                return
        time.sleep(0.005)


def at_work(cluster):
    """The processes of workers that are at a batch."""
    (started,) = cluster.head_node.all_processes["raylet"]
    for process in psutil.Process(started.process.pid).children():
        try:
            if process.cmdline()[:1] == ["ray::ResourceTrainable.train"]:
                yield process
        except psutil.Error:  # It has just ended.
            continue


def test_a_dry_run_times_a_trial_on_a_worker(cluster, tmp_path, monkeypatch):
    def here(*_):
        raise AssertionError("timed in the driver's process")

    # Workers import it anew.
    monkeypatch.setattr(estimate, "time_trial", here)
    joined = ("cluster=ray", f"cluster.address={cluster.address}", f"output={tmp_path}")
    timing = estimate.estimate(Plan.make(composed(*SMALL, *joined))).timing

    assert (timing.device, timing.num_timed) == ("cpu", 9)
    assert timing.trial_s > 0
