import os

import pytest

from search import run
from search.plan import Plan
from search.sync import Charts, _experiment
from tests.search.landscapes import make_search, work


@pytest.fixture
def experiment_of(monkeypatch, tmp_path):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["search.run", f"output={tmp_path}/runs", *arguments])
        return _experiment(Plan.make(run._compose()))

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
    search = make_search(tmp_path / "ledger", steps=20)
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
