"""MLflow behind a network that fails: the search does not notice, and nothing is missed."""

import shutil
import time
from itertools import count

import pytest
from mlflow import MlflowClient

from search import tracking
from search.tracking import EVALUATION_TAG, RUN_TAG, Experiment, Tracker
from tests.faults.proxy import Proxy, serving
from tests.search.landscapes import make_search, work
from tests.search.test_tracking import PARAMS, tell

WHEN = ("at the start", "in the middle", "all the time")
EVERY_DAY = {("in the middle", "refuse"), ("in the middle", "cut"), ("all the time", "hang")}
CASES = [
    pytest.param(when, mode, marks=() if (when, mode) in EVERY_DAY else pytest.mark.slow)
    for when in WHEN
    for mode in ("refuse", "hang", "slow", "garble", "cut")
]
_names = count()


@pytest.fixture(scope="module")
def server(tmp_path_factory, mlflow_database):
    """The port of a real MLflow server of our own."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(mlflow_database, folder)
    with serving(folder) as port:
        yield port


@pytest.fixture
def proxy(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")
    monkeypatch.setattr(tracking, "_FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(tracking, "_LONGEST_PAUSE_S", 0.5)
    proxy = Proxy(server)
    yield proxy
    proxy.close()


@pytest.fixture
def search(tmp_path):
    search = make_search(tmp_path / "ledger", steps=6)
    work(search)
    return search


def follow(proxy, name):
    return Tracker(Experiment(f"http://127.0.0.1:{proxy.port}", name), "key0", "x", PARAMS, {})


def finish(tracker, patience_s):
    files = {"best_ratios.json": b"{}"}
    tracker.finish(
        "FINISHED", {"difference": 0.1}, {"verdict": "better"}, lambda: files, patience_s
    )


def check_all_there(server, name, search):
    """Everything is in MLflow, and once."""
    client = MlflowClient(f"http://127.0.0.1:{server}")
    experiment = client.get_experiment_by_name(name)
    found = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in found if RUN_TAG in run.data.tags)
    children = [run for run in found if EVALUATION_TAG in run.data.tags]
    rewards = sorted(run.data.metrics["reward"] for run in children)
    points = client.get_metric_history(parent.info.run_id, "reward")

    assert {run.info.status for run in found} == {"FINISHED"}
    assert len({run.data.tags[EVALUATION_TAG] for run in children}) == len(children)
    assert rewards == pytest.approx(sorted(e.mean for e in search.evaluations))
    assert sorted(p.step for p in points) == [step.number for step in search.steps]
    assert parent.data.params == {key: str(value) for key, value in PARAMS.items()}
    assert parent.data.metrics["difference"] == 0.1
    assert [f.path for f in client.list_artifacts(parent.info.run_id)] == ["best_ratios.json"]


@pytest.mark.parametrize(("when", "mode"), CASES)
def test_what_mlflow_missed_is_there_once_it_is_back(
    server, proxy, search, mode, when, tally, monkeypatch, capfd
):
    """By itself, or after the end by writing the search again."""
    name = f"experiment{next(_names)}"
    proxy.mode = "pass" if when == "in the middle" else mode
    tracker = follow(proxy, name)
    if when == "in the middle":
        wait_for(lambda: tracker.run_id is not None)
        proxy.mode = mode
    tell(tracker, search)
    # Until it has noticed; what is cut now and then, and slow, gets on.
    has_noticed = mode in {"refuse", "hang", "garble"}
    wait_for(lambda: tracker.num_waiting == 0 or (has_noticed and tracker.error is not None))
    is_back = when != "all the time"
    if is_back:
        proxy.mode = "pass"
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    finish(tracker, patience_s=120.0 if is_back else 1.0)
    if is_back:
        assert tracker.error is None
    else:  # As the next run of the same search, or search.sync, does.
        proxy.mode = "pass"
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        wait_for(lambda: not tracker._thread.is_alive())
        again = follow(proxy, name)
        tell(again, search)
        finish(again, patience_s=120.0)
        assert again.error is None

    assert proxy.num_injected > 0
    check_all_there(server, name, search)
    assert capfd.readouterr().out == ""
    tally(f"MLflow: {mode}", proxy.num_injected, 0)


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
