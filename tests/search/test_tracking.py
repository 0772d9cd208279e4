import contextlib
import math
import shutil
import sqlite3
import time

import pytest
from mlflow import MlflowClient

from search.racing import Race
from search.tracking import EVALUATION_TAG, RUN_TAG, Experiment, Tracker
from tests.search.landscapes import make_search, work

PARAMS = {"model.name": "analytic", "seed": 0}


@pytest.fixture
def experiment(tmp_path, mlflow_database):
    shutil.copy(mlflow_database, tmp_path)
    artifacts = (tmp_path / "artifacts").as_uri()
    return Experiment(f"sqlite:///{tmp_path / 'mlflow.db'}", "crdiff-test", artifacts)


def track(experiment, search, status="FINISHED", files=None, abandoned=tuple):
    name = "analytic_24x40 annealing-seed0"
    tracker = Tracker(experiment, "key0", name, PARAMS, {"model": "analytic"}, abandoned)
    tell(tracker, search)
    metrics, tags = {"validation_difference": 0.01}, {"verdict": "better"}
    tracker.finish(status, metrics, tags, lambda: files or {}, patience_s=60)
    return tracker


def tell(tracker, search):
    for evaluation in search.evaluations:
        tracker.evaluation(evaluation)
    for number, step in enumerate(search.steps, 1):
        reward = math.nan if step.reward is None else step.reward
        at = step.evaluation.measured_at
        tracker.chart(number, at, {"reward": reward, "temperature": 0.1})


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
    def points():
        client, (parent,), children = runs(experiment)
        histories = [
            client.get_metric_history(run.info.run_id, key)
            for run in (parent, *children)
            for key in run.data.metrics
        ]
        points = [(point.key, point.step, point.value) for each in histories for point in each]
        return parent.info.run_id, {run.info.run_id for run in children}, sorted(points)

    track(experiment, search)
    before = points()
    track(experiment, search)

    assert points() == before


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


def test_a_killed_driver_leaves_a_whole_database_or_none(search, tmp_path):
    database, copy = tmp_path / "mlflow.db", tmp_path / "copy.db"
    tracker = Tracker(Experiment(f"sqlite:///{database}", "x"), "key0", "name", PARAMS, {})
    while not database.exists():
        assert tracker.error is None
        time.sleep(0.001)
    shutil.copy(database, copy)  # What there would be, had it been killed now.
    tracker.finish("FINISHED", {}, {}, dict, patience_s=60)

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
    stopped = [run for run in children if run.data.tags["status"] == "stopped"]

    assert len(stopped) == sum(evaluation.is_stopped for evaluation in search.evaluations) > 0
    assert all(0 < int(run.data.params["num_prompts"]) < 7 for run in stopped)
    assert all("reward" not in run.data.metrics for run in stopped)


def test_an_mlflow_that_cannot_be_reached_is_said_and_nothing_more(search):
    nobody_listens = Experiment("http://127.0.0.1:9", "x")
    tracker = track(nobody_listens, search)

    assert tracker.error == "http://127.0.0.1:9: Connection refused"


def test_a_database_that_is_none_is_said_and_nothing_more(search, tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"torn" * 1000)
    tracker = track(Experiment(f"sqlite:///{tmp_path / 'mlflow.db'}", "x"), search)

    assert "file is not a database" in tracker.error


def test_points_of_the_charts_have_the_time_of_their_measurement(experiment, search):
    track(experiment, search)
    client, (parent,), children = runs(experiment)
    history = client.get_metric_history(parent.info.run_id, "reward")
    by_step = {point.step: point.timestamp for point in history}

    for number, step in enumerate(search.steps, 1):
        assert by_step[number] == round(1000 * step.evaluation.measured_at)
    assert {run.info.end_time for run in children} == {
        round(1000 * evaluation.measured_at) for evaluation in search.evaluations
    }


def test_a_setting_too_long_for_mlflow_is_cut(experiment, search, monkeypatch):
    monkeypatch.setitem(PARAMS, "prompts.text", "x" * 10_000)
    tracker = track(experiment, search)
    _, (parent,), _ = runs(experiment)

    assert tracker.error is None
    assert parent.data.params["prompts.text"] == "x" * 6000


def test_what_a_killed_driver_left_half_written_is_completed(experiment, search):
    """Parent without parameters, a child without rewards, another written twice."""
    track(experiment, search)
    client, (parent,), children = runs(experiment)
    for run in [parent, *children]:
        client.delete_run(run.info.run_id)
    tags = {tag: parent.data.tags[tag] for tag in (RUN_TAG, "model")}
    begun = client.create_run(parent.info.experiment_id, tags=tags).info.run_id
    for child in (children[0], children[1], children[1]):
        tags = {EVALUATION_TAG: child.data.tags[EVALUATION_TAG], "kind": child.data.tags["kind"]}
        client.create_run(parent.info.experiment_id, tags={**tags, "mlflow.parentRunId": begun})
    track(experiment, search)
    _, (again,), completed = runs(experiment)

    assert again.info.run_id == begun
    assert again.data.params == parent.data.params

    def content(found):
        return sorted((run.info.status, *sorted(run.data.metrics.items())) for run in found)

    assert content(completed) == content(children)


def test_a_failure_that_was_mended_has_a_child_of_its_own(experiment, tmp_path):
    from tests.search.test_evaluation_search import failing

    search = make_search(tmp_path / "ledger", steps=6)
    work(search, outcome=failing(lambda ratios: ratios.down > 0.31))
    track(experiment, search)
    num_failed = sum(evaluation.failure is not None for evaluation in search.evaluations)
    search = make_search(tmp_path / "ledger", steps=6, retry_failed=True)
    work(search)
    track(experiment, search)
    _, _, children = runs(experiment)
    rewards = {run.data.metrics["reward"] for run in children if run.info.status == "FINISHED"}

    assert sum(run.info.status == "FAILED" for run in children) == num_failed
    assert {evaluation.mean for evaluation in search.evaluations} <= rewards


def test_runs_of_searches_whose_driver_is_gone_are_closed(experiment, search):
    client = MlflowClient(experiment.uri)
    name = client.create_experiment(experiment.name, artifact_location=experiment.artifacts)
    gone, at_work = (
        client.create_run(name, tags={RUN_TAG: key}).info.run_id for key in ("gone", "at work")
    )
    child = client.create_run(name, tags={"mlflow.parentRunId": gone}).info.run_id
    track(experiment, search, abandoned=lambda: ["gone", "key0"])

    assert client.get_run(gone).info.status == "KILLED"
    assert client.get_run(child).info.status == "KILLED"
    assert client.get_run(at_work).info.status == "RUNNING"
    assert next(run for run in runs(experiment)[1] if run.data.tags[RUN_TAG] == "key0")


def test_the_dashboard_command_opens_this_database(experiment, search):
    command = track(experiment, search).dashboard_command

    assert command == f"mlflow ui --backend-store-uri {experiment.uri} --port 5000"
