"""What MLflow is told of a search: its charts, what each evaluation gained, files, and a note."""

import io
import os
import statistics
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from search.plan import Plan
from search.run import _compose
from search.sync import Charts, TrackedSearch, _experiment
from tests.search.landscapes import make_search, work
from tests.search.test_report import make_plan, searched


@pytest.fixture
def experiment_of(monkeypatch, tmp_path):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["search.run", f"output={tmp_path}/runs", *arguments])
        return _experiment(Plan.make(_compose(False)[0].config))

    return call


def test_pictures_and_files_lie_beside_the_database(experiment_of, tmp_path):
    ours = experiment_of()
    theirs = experiment_of(f"tracking.uri=sqlite:///{tmp_path}/elsewhere/theirs.db")
    relative = experiment_of("tracking.uri=sqlite:///theirs.db")

    assert ours.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert ours.artifacts == f"file://{tmp_path}/runs/mlartifacts"
    assert theirs.artifacts == f"file://{tmp_path}/elsewhere/mlartifacts"
    assert relative.artifacts == f"file://{os.getcwd()}/mlartifacts"


def test_a_server_keeps_them_where_it_likes(experiment_of):
    assert experiment_of("tracking.uri=http://127.0.0.1:5000").artifacts == ""


def test_charts_follow_from_the_steps_alone(tmp_path):
    search = make_search(tmp_path / "ledger", steps=20, batch_size=1)
    work(search, num_workers=3)
    charts = Charts()
    points = [charts.take(step) for step in search.steps]
    events = [step.event for step in search.steps]
    last = points[-1]

    assert [each["best_reward"] for each in points] == [
        max(step.evaluation.mean for step in search.steps[: number + 1]) for number in range(20)
    ]
    num_accepted, num_rejected = events.count("accept"), events.count("reject")
    assert last["acceptance_rate"] == num_accepted / (num_accepted + num_rejected)
    assert last["num_failed"] == 0
    assert last["pictures_per_second"] == 1.0  # A second a picture, in this landscape.


# --- a whole search in MLflow -----------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A finished search of analytic rewards, two of whose candidates failed: plan and runs."""
    folder = tmp_path_factory.mktemp("tracked")
    plan = searched(folder, fails=lambda ratios: 0.7 < ratios.down < 0.8)
    in_mlflow = TrackedSearch(plan)
    in_mlflow.close("FINISHED", patience_s=120.0)
    assert in_mlflow.tracker.error is None
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.get_experiment_by_name("crdiff-search")
    parent, *children = client.search_runs(
        [found.experiment_id], max_results=1000, order_by=["attributes.start_time DESC"]
    )
    if "mlflow.parentRunId" in parent.data.tags:
        runs = [parent, *children]
        (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        children = [run for run in runs if run is not parent]
    return plan, client, parent, children


def of_kind(children, kind):
    return [run for run in children if run.data.tags["kind"] == kind]


def test_a_child_says_what_it_gained_over_the_dense_model(tracked):
    plan, _, _, children = tracked
    dense = plan.search.of("dense")
    by_ratios = {
        tuple(e.ratios.as_dict().values()): e
        for e in plan.search.evaluations
        if e.kind == "search" and e.is_complete
    }
    found = [run for run in of_kind(children, "search") if run.info.status == "FINISHED"]

    assert found
    for run in found:
        ratios = tuple(float(run.data.params[f"ratio_{group}"]) for group in ("down", "mid", "up"))
        gains = [a - b for a, b in zip(by_ratios[ratios].rewards, dense.rewards, strict=True)]
        assert run.data.metrics["difference_to_dense"] == pytest.approx(statistics.fmean(gains))
        assert run.data.metrics["difference_to_dense_standard_error"] == pytest.approx(
            statistics.stdev(gains) / len(gains) ** 0.5
        )


def test_what_was_chosen_by_its_gains_is_compared_with_nothing(tracked):
    _, _, _, children = tracked

    for run in (*of_kind(children, "pruned alone"), *of_kind(children, "dense")):
        assert "reward" in run.data.metrics
        assert "difference_to_dense" not in run.data.metrics


def test_a_child_has_its_stages_and_its_memory(tracked):
    _, _, _, children = tracked
    metrics = of_kind(children, "dense")[0].data.metrics

    assert metrics["seconds_prune"] == 0.5
    assert (metrics["seconds_render"], metrics["seconds_score"]) == (4.0, 0.25)
    assert metrics["memory_gib"] == 3.5


def test_a_failed_child_has_its_reason_and_no_reward(tracked):
    plan, _, _, children = tracked
    failed = [run for run in children if run.info.status == "FAILED"]

    assert len(failed) == sum(e.failure is not None for e in plan.search.evaluations) > 0
    for run in failed:
        assert run.data.tags["failure"] == "black pictures & <b>no</b> light"
        assert run.data.tags["status"] == "failed"
        assert "reward" not in run.data.metrics


def test_the_parent_says_of_what_code_it_is(tracked):
    _, _, parent, _ = tracked
    head = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    tags = parent.data.tags

    assert tags["version"]
    assert tags["status"] == "finished"
    assert tags["verdict"] == "better"
    assert tags.get("mlflow.source.git.commit", head) == head
    assert tags["revision"] == parent.data.tags["revision"] != ""


def test_the_note_has_the_verdict_first(tracked):
    plan, _, parent, _ = tracked
    note = parent.data.tags["mlflow.note.content"]

    assert note.startswith("**Against dense: better.** +")
    assert str(plan.search.winner.ratios) in note
    assert "python -m crdiff_core.generate --ratios best_ratios.json" in note


def test_the_ledgers_extract_has_each_picture_of_the_search_once(tracked):
    plan, client, parent, _ = tracked
    place = client.download_artifacts(parent.info.run_id, "ledger.parquet")
    rows = pq.read_table(io.BytesIO(Path(place).read_bytes())).to_pylist()
    keys = [(row["key"], row["prompt"], row["seed"]) for row in rows]
    wanted = {
        (e.key, prompt.text, prompt.seed): reward
        for e in plan.search.evaluations
        for prompt, reward in zip(e.prompts.prompts, e.rewards, strict=False)
    }

    assert len(keys) == len(set(keys))
    assert {k: row["reward"] for k, row in zip(keys, rows, strict=True) if k in wanted} == wanted
    assert {row["failure"] for row in rows if row["reward"] is None} == {
        "black pictures & <b>no</b> light"
    }


def test_a_search_that_failed_before_it_drew_is_in_mlflow_too(tmp_path):
    plan = make_plan(tmp_path)
    plan.search.fail("no GPU")
    in_mlflow = TrackedSearch(plan)
    in_mlflow.close("FAILED", patience_s=120.0)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (only,) = client.search_runs([in_mlflow.tracker.experiment_id])

    assert in_mlflow.tracker.error is None
    assert only.info.status == "FAILED"
    assert only.data.tags["failure"] == "no GPU"
    assert "no GPU" in only.data.tags["mlflow.note.content"]
