"""Workers and nodes of a running search die, and others join."""

import time

import psutil
import pytest
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from tests.faults.conftest import NODE
from tests.faults.sessions import PATIENCE_S, check, check_tracked

# It has as much to do as many others together.
pytestmark = pytest.mark.timeout(1800)


def workers(node):
    """The processes of a node's workers that are at a batch."""
    found = psutil.Process(raylet_of(node).pid).children()
    return [each for each in found if title(each) == "ray::ResourceTrainable.train"]


def title(process):
    try:
        return process.cmdline()[0]
    except (psutil.Error, IndexError):  # It has just ended, or is about to begin.
        return ""


def raylet_of(node):
    (started,) = node.all_processes["raylet"]
    return started.process


def last_node(cluster):
    (node,) = cluster.worker_nodes
    return node


def replace_node(cluster, node):
    """End what is left of a node, and let another one join."""
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(**NODE)


def a_worker_is_killed(cluster):
    workers(cluster.head_node)[0].kill()


def a_node_is_lost(cluster):
    replace_node(cluster, last_node(cluster))


def a_node_is_told_to_end(cluster):
    """As before a preemption, by whoever sends SIGTERM."""
    node = last_node(cluster)
    raylet_of(node).terminate()
    raylet_of(node).wait(PATIENCE_S)
    replace_node(cluster, node)


def a_node_is_preempted(cluster):
    """As on a spot instance, with notice: Ray hands it nothing new, and then it is gone."""
    node = last_node(cluster)
    preemption = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int(time.time() * 1000) + 1000
    accepted, why = GcsClient(address=cluster.address).drain_node(
        node.node_id, preemption, "a spot instance is taken back", deadline_ms
    )
    assert accepted, why
    time.sleep(1)
    replace_node(cluster, node)


@pytest.mark.parametrize(
    "fault",
    [
        a_worker_is_killed,
        a_node_is_lost,
        pytest.param(a_node_is_told_to_end, marks=pytest.mark.slow),
        pytest.param(a_node_is_preempted, marks=pytest.mark.slow),
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_search_goes_on_when(fault, searching, cluster, reference, tally):
    search = searching()
    holds = [search.holds / "6", search.holds / "30"]
    for hold in holds:
        hold.touch()
    session = search.start()
    for hold in holds:
        assert search.wait(session, lambda: all(map(workers, cluster.list_all_nodes())))
        search.lost()
        fault(cluster)
        hold.unlink()
    session.join(PATIENCE_S)
    lost = search.lost()
    tally(fault.__name__.replace("_", " "), len(holds), lost)

    assert session.exitcode == 0, search.printed
    assert lost == 0
    assert len(search.begun) > len({str(batch) for batch in search.begun})
    check(search, reference(()))
    check_tracked(search)


def test_a_batch_that_kills_its_workers_is_a_rejection_with_a_reason(searching, tally):
    at = [0.3, 0.3, 0.3]
    lethal = [at, ["search 0", "search 1"]]
    search = searching("trial.max_failures=1", lethal=lethal)
    search.finish()
    tally("a batch kills its workers", 2, search.lost())
    _, children = search.tracked()
    failed = [row for row in search.rows() if row["failure"]]
    (step,) = [row for row in search.course() if row["failure"]]
    (child,) = [run for run in children if run.info.status == "FAILED"]

    assert search.begun.count(lethal) == 2
    assert [row["reward"] for row in failed] == [None, None]
    assert "its worker died or could not start" in failed[0]["failure"]
    assert (step["step"], step["event"], step["reward"]) == (1, "fail", None)
    assert child.data.tags["failure"] == failed[0]["failure"]
    assert search.lost() == 0
