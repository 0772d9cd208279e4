import os

import pytest

from search import run
from search.plan import Plan
from search.sync import _experiment


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
