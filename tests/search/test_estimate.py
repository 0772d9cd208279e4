"""dry_run=true: what a search would cost, without starting it."""

import re
import sys
from dataclasses import replace

import pytest

from crdiff_core.errors import ModelError
from search import estimate as module
from search import run
from search.config import ConfigError
from search.estimate import estimate
from search.plan import Plan
from tests.conf.test_config import composed

SMALL = (
    "budget.steps=3",
    "prompts.search=4",
    "prompts.rerank=4",
    "prompts.validation=6",
    "rerank.top=2",
)


@pytest.fixture
def plan(tmp_path):
    return Plan.make(composed(f"output={tmp_path}", *SMALL))


def test_it_counts_every_picture_that_a_search_may_draw(plan):
    found = estimate(plan)

    # Dense and three triples on 4 prompts, the best two on 4, winner and dense on 6, and for the
    # report the pruned model alone on 6.
    assert found.num_pictures == 4 * 4 + 2 * 4 + 2 * 6 + 6
    assert found.num_known == 0
    assert (found.num_timed, found.batch_size) == (4, 4)
    assert found.hours == pytest.approx(found.num_pictures * found.trial_s / 4 / 3600)


def test_it_leaves_nothing_behind(plan, tmp_path):
    estimate(plan)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(plan, monkeypatch):
    monkeypatch.setattr(module, "_free_bytes", lambda device: 1 << 20)

    with pytest.raises(ModelError, match=r"^shapes in float32 takes 0.0 GiB and cpu has 0.0 GiB"):
        estimate(plan)


def test_too_little_disk_is_refused(plan, monkeypatch):
    usage = module.shutil.disk_usage("/")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))

    with pytest.raises(ConfigError, match="free and the results may take"):
        estimate(plan)


def test_the_price_is_hours_times_the_price_of_one(plan):
    priced = replace(estimate(plan), device="NVIDIA H200", trial_s=3600.0, num_timed=1)
    config = plan.config.model_copy(
        update={"cluster": plan.config.cluster.model_copy(update={"gpu_hour_price": 2.5})}
    )
    lines = replace(priced, plan=replace(plan, config=config)).lines()

    assert any(re.match(r"price +about 105\.00, at 2\.5 a GPU hour", line) for line in lines)


def test_the_command_prints_it_and_starts_no_trial(tmp_path, monkeypatch, capsys):
    # Else a cluster of our own would get a token, which this process would keep.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", ["search.run", "dry_run=true", f"output={tmp_path}", *SMALL])
    assert run.main() == 0
    printed = capsys.readouterr()

    assert printed.out.startswith("model      shapes (embedded), revision ")
    assert "one trial  4 pictures of 8 steps" in printed.out
    assert "search     at most 3 evaluations, 42 pictures" in printed.out
    assert printed.err == "loading the model and timing a trial ...\n"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
