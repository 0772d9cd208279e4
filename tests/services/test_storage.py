"""Results in an object store."""

import json

import pytest

from search.export import load_plan
from search.storage import Storage
from tests.searches import search

SMALL = ("budget.steps=2", "prompts.search=4", "prompts.rerank=2", "prompts.validation=2")


@pytest.fixture
def far(environment, s3):
    """The environment of a process that may use the object store."""
    return environment | {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.mark.slow
def test_a_search_keeps_everything_in_an_object_store_and_goes_on_from_there(s3, far):
    first = search(f'"{s3}"', far, "tracking=none", *SMALL)
    assert first.returncode == 0, first.stderr
    run = Storage.at(s3) / "shapes_24x40" / "annealing-seed0"
    exported = run.read("best_ratios.json")
    again = search(f'"{s3}"', far, "tracking=none", *SMALL)
    plan = load_plan(str(run))

    assert "nothing was drawn" in again.stdout
    assert f"ratios file     {run / 'best_ratios.json'}" in again.stdout
    assert run.read("best_ratios.json") == exported
    assert json.loads(exported)["best_avg_score"] == pytest.approx(0.9, abs=0.2)
    assert {"run.json", "history.parquet"} <= run.files().keys()
    assert "driver.json" not in run.files()
    assert plan.search.replay()
    assert plan.search.num_drawn == 0


def test_mlflows_database_cannot_lie_in_an_object_store(s3, far):
    done = search(f'"{s3}"', far, *SMALL)

    assert done.returncode == 2
    assert "set tracking.uri to a server's, or tracking=none" in done.stderr
