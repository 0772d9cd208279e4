import contextlib
import math
import shutil
import sqlite3
import time

import pytest
from mlflow import MlflowClient

from search.racing import Race
from search.tracking import RUN_TAG, Experiment, Tracker
from tests.search.landscapes import make_search, work

PARAMS = {"model.name": "analytic", "seed": 0}


@pytest.fixture
def experiment(tmp_path):
    artifacts = (tmp_path / "artifacts").as_uri()
    return Experiment(f"sqlite:///{tmp_path / 'mlflow.db'}", "crdiff-test", artifacts)


def track(experiment, search, status="FINISHED", files=None):
    tracker = Tracker(experiment, "key0", "analytic_24x40 annealing-seed0")
    tracker.start(PARAMS, {"model": "analytic"})
    for evaluation in search.evaluations:
        tracker.evaluation(evaluation)
    for number, step in enumerate(search.steps, 1):
        tracker.chart(
            number, {"reward": math.nan if step.reward is None else step.reward, "temp": 0.1}
        )
    tracker.finish(status, {"validation_difference": 0.01}, {"verdict": "better"}, files or {})
    return tracker


@pytest.fixture
def search(tmp_path):
    search = make_search(tmp_path / "ledger", steps=4)
    work(search)
    return search


def runs(experiment):
    client = MlflowClient(experiment.uri)
    found = client.search_runs([client.get_experiment_by_name(experiment.name).experiment_id])
    parents = [run for run in found if RUN_TAG in run.data.tags]
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    return client, parents, children


def test_a_search_is_a_parent_run_with_a_child_for_each_evaluation(experiment, search):
    tracker = track(experiment, search, files={"best_ratios.json": b"{}"})
    client, (parent,), children = runs(experiment)

    assert tracker.error is None
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"model.name": "analytic", "seed": "0"}
    assert parent.data.tags["verdict"] == "better"
    assert parent.data.metrics["validation_difference"] == 0.01
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == [
        "best_ratios.json"
    ]
    assert len(children) == len(search.evaluations)
    history = client.get_metric_history(parent.info.run_id, "reward")
    assert [(point.step, point.value) for point in sorted(history, key=lambda p: p.step)] == [
        (number, step.reward) for number, step in enumerate(search.steps, 1)
    ]


def test_a_child_has_ratios_reward_standard_error_and_seconds(experiment, search):
    track(experiment, search)
    _, _, children = runs(experiment)
    best = search.winner
    child = next(
        run
        for run in children
        if run.data.tags["kind"] == "search"
        and run.data.params["ratio_down"] == str(best.ratios.down)
        and run.data.params["ratio_up"] == str(best.ratios.up)
    )

    assert child.data.metrics["reward"] == pytest.approx(best.mean)
    assert child.data.metrics["reward_standard_error"] == pytest.approx(best.standard_error)
    assert child.data.metrics["seconds"] == pytest.approx(best.seconds)
    assert child.data.metrics["sparsity_down"] == pytest.approx(best.sparsity["down"])


def test_tracking_the_same_search_again_adds_nothing(experiment, search):
    track(experiment, search)
    _, _, before = runs(experiment)
    track(experiment, search)
    _, parents, after = runs(experiment)

    assert len(parents) == 1
    assert {run.info.run_id for run in after} == {run.info.run_id for run in before}


def test_what_a_stopped_search_missed_is_filled_in(experiment, search, tmp_path):
    part = make_search(tmp_path / "part", steps=4)
    work(part, max_trials=7)
    track(experiment, part, status="KILLED")
    _, (stopped,), few = runs(experiment)
    track(experiment, search)
    _, (finished,), children = runs(experiment)

    assert (stopped.info.status, finished.info.status) == ("KILLED", "FINISHED")
    assert stopped.info.run_id == finished.info.run_id
    assert len(few) < len(children) == len(search.evaluations)


def test_what_a_killed_driver_left_half_written_is_written_again(experiment, search):
    track(experiment, search)
    client, (parent,), children = runs(experiment)
    torn = children[0]
    client.update_run(torn.info.run_id, status="RUNNING")
    client.update_run(parent.info.run_id, status="RUNNING")
    track(experiment, search)
    _, (after,), written = runs(experiment)

    assert len(written) == len(children)
    assert {run.info.status for run in [after, *written]} == {"FINISHED"}
    assert torn.info.run_id not in {run.info.run_id for run in written}


def test_a_killed_driver_leaves_a_whole_database_or_none(experiment, tmp_path):
    database, copy = tmp_path / "mlflow.db", tmp_path / "copy.db"
    tracker = Tracker(experiment, "key0", "name")
    tracker.start(PARAMS, {})
    while not database.exists():
        assert tracker.error is None
        time.sleep(0.001)
    shutil.copy(database, copy)  # What there would be, had it been killed now.
    tracker.finish("FINISHED", {}, {}, {})

    assert tracker.error is None
    assert version(copy) == version(database) != []


def version(database):
    with contextlib.closing(sqlite3.connect(database)) as opened:
        return opened.execute("SELECT version_num FROM alembic_version").fetchall()


def test_a_failed_evaluation_is_a_failed_child_with_its_reason(experiment, tmp_path):
    from tests.search.test_evaluation_search import failing

    search = make_search(tmp_path / "ledger", steps=6)
    work(search, outcome=failing(lambda ratios: ratios.down > 0.31))
    track(experiment, search)
    _, _, children = runs(experiment)
    failed = [run for run in children if run.info.status == "FAILED"]

    assert failed
    assert all(run.data.tags["failure"] == "NaN pictures" for run in failed)
    assert all("reward" not in run.data.metrics for run in failed)


def test_a_stopped_evaluation_is_a_child_that_says_how_far_it_got(experiment, tmp_path):
    search = make_search(tmp_path / "ledger", race=Race(alpha=0.3, stride=2))
    work(search)
    track(experiment, search)
    _, _, children = runs(experiment)
    stopped = [run for run in children if "stopped" in run.data.tags]

    assert len(stopped) == sum(evaluation.is_stopped for evaluation in search.evaluations) > 0
    assert all(0 < int(run.data.params["num_prompts"]) < 7 for run in stopped)
    assert all("reward" not in run.data.metrics for run in stopped)


def test_an_mlflow_that_cannot_be_reached_is_said_and_nothing_more(search):
    nobody_listens = Experiment("http://127.0.0.1:9", "x")
    tracker = track(nobody_listens, search)

    assert "Max retries exceeded" in tracker.error


def test_the_dashboard_command_opens_this_database(experiment):
    command = Tracker(experiment, "key0", "name").dashboard_command

    assert command == f"mlflow ui --backend-store-uri {experiment.uri} --port 5000"
