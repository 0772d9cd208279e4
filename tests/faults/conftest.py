import json
import os

import pytest
from filelock import FileLock
from ray.cluster_utils import Cluster

from search.runs import RATIOS_FILE

pytest.register_assert_rewrite("tests.faults.sessions")

from tests.faults.sessions import Searching  # noqa: E402

# Of each node.
NODE = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000}


@pytest.fixture(scope="module")
def cluster(ray_tmpdir):
    """A Ray cluster of two nodes, a CPU each, whose processes are ours to end."""
    with pytest.MonkeyPatch.context() as patch:
        # It holds the address that address="auto" means: not the whole machine's.
        patch.setenv("RAY_TMPDIR", ray_tmpdir)
        nodes = Cluster(initialize_head=True, head_node_args=NODE)
        nodes.add_node(**NODE)
        yield nodes
        nodes.shutdown()


@pytest.fixture
def searching(cluster, tmp_path):
    """Make a search on the cluster; whatever happens, no session of it goes on after the test."""
    made = []

    def make(*arguments, **options):
        folder = tmp_path / f"search{len(made)}"
        made.append(Searching(folder, cluster.address, arguments, **options))
        return made[-1]

    yield make
    for search in made:
        search.kill()


@pytest.fixture
def reference(cluster, shared_folder):
    """The same search, left alone. Whoever needs it first runs it for all test processes."""

    def run(arguments):
        folder = shared_folder / "-".join(["alone", *arguments])
        with FileLock(f"{folder}.lock"):
            search = Searching(folder, cluster.address, arguments)
            if RATIOS_FILE not in search.results.files():
                search.finish()
        return search

    return run


@pytest.fixture
def tally():
    """Note how often a fault was injected and what it lost, for the README's table.

    lost: rows that were in the ledger and are not any more, and rows that are there twice.
    """

    def note(fault, injected, lost):
        if file := os.environ.get("CRDIFF_FAULTS"):
            with open(file, "a") as out:
                line = {"fault": fault, "injected": injected, "lost": lost}
                out.write(json.dumps(line) + "\n")

    return note
