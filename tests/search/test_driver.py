"""The driver: what it does to a run's folder, and what a report that fails costs."""

import io
import json
import os

import pytest
from rich.console import Console

import search.report
from crdiff_core.evaluation import Measurement
from search import driver
from search.driver import _begin_folder, _report
from search.plan import Plan
from search.progress import Progress
from search.runs import RATIOS_FILE, REPORT_FILE, RUN_FILE
from tests.conf.test_config import composed


@pytest.fixture
def plan(tmp_path):
    def make(*overrides):
        return Plan.make(composed(f"output={tmp_path}", *overrides))

    return make


def begun(plan):
    """Begin a search, and leave what it would leave in the end."""
    _begin_folder(plan, "command")
    for name in (RATIOS_FILE, REPORT_FILE):
        plan.folder.write(name, f"{name} of {plan.key}".encode())
    return plan


def test_other_settings_keep_the_earlier_results(plan):
    first = begun(plan())
    second = begun(plan("prompts.validation=9"))
    (kept,) = (second.folder / "earlier").folders()

    assert first.folder == second.folder
    assert kept.read(RATIOS_FILE) == f"{RATIOS_FILE} of {first.key}".encode()
    assert kept.read(REPORT_FILE) == f"{REPORT_FILE} of {first.key}".encode()
    assert json.loads(kept.read(RUN_FILE))["key"] == first.key
    assert json.loads(second.folder.read(RUN_FILE))["key"] == second.key


def test_the_same_settings_leave_the_results_where_they_are(plan):
    first = begun(plan())
    _begin_folder(plan("budget.steps=70"), "command")

    assert first.folder.read(RATIOS_FILE) == f"{RATIOS_FILE} of {first.key}".encode()
    assert (first.folder / "earlier").folders() == []


def test_a_report_that_fails_costs_a_warning(plan, monkeypatch, caplog):
    def fail(_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(search.report, "write_report", fail)
    made = plan()

    assert _report(made) is None
    assert caplog.messages == [
        f"no report: RuntimeError: no ink: python -m search.report {made.folder} tries again"
    ]


def test_a_run_that_drew_nothing_keeps_its_report(plan):
    made = begun(plan())

    assert _report(made) == made.folder / REPORT_FILE
    assert made.folder.read(REPORT_FILE) == f"{REPORT_FILE} of {made.key}".encode()


def test_a_report_older_than_the_ratios_is_written_again(plan, monkeypatch):
    made = begun(plan())
    newer = made.folder.files()[REPORT_FILE] + 5
    os.utime(made.folder.local / RATIOS_FILE, (newer, newer))
    monkeypatch.setattr(search.report, "write_report", lambda plan: plan.folder / "written")

    assert _report(made) == made.folder / "written"


# --- the batch size ------------------------------------------------------------------------------


def measured(config):
    """Stand in for a worker: a reward for each prompt of a trial's batch."""
    num_prompts = len(config["batch"])
    seconds = {"prune": 0.0, "render": 1.0, "score": 0.0}
    return {"measured": Measurement((0.5,) * num_prompts, config["ratios"], seconds, num_prompts)}


def test_a_batch_size_that_fits_no_worker_begins_the_search_anew_with_a_smaller_one(
    tmp_path, monkeypatch, caplog
):
    batches = []

    def fit(plan, command, settings):
        while (config := plan.search.suggest("trial")) not in (None, "FINISHED"):
            batches.append(len(config["batch"]))
            if batches[-1] > 2:
                # Of what it says that fits, not all may fit either.
                report = {"num_fit": batches[-1] - 1, "device": "a small GPU"}
                plan.search.on_trial_result("trial", report)
            else:
                plan.search.on_trial_complete("trial", measured(config))

    monkeypatch.setattr(driver, "_fit", fit)
    monkeypatch.setattr(driver, "_report", lambda plan: None)
    sizes = ("budget.steps=1", "prompts.search=4", "prompts.rerank=2", "prompts.validation=5")
    config = composed(f"output={tmp_path}", "tracking=none", "report.pictures=0", *sizes)
    driver.run(config, "command", Progress(Console(file=io.StringIO())))
    folder = tmp_path / "shapes_24x40" / "annealing-seed0"

    # 4 prompts at once do not fit. 3 at most are two batches of 2 for dense and step; the 5 of
    # validation, 3 at once, do not fit either, so all is drawn 2 at once.
    assert batches == [4, *[2] * 4, 3, *[2] * 6]
    assert json.loads((folder / RUN_FILE).read_text())["batch_size"] == 2
    best = json.loads((folder / RATIOS_FILE).read_text())
    assert best["provenance"]["recipe"]["batch_size"] == 2
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warnings == [
        f"render.batch_size is {num_fit} from now on: {num_fit + 1} pictures at once do not fit "
        f"into the memory of a small GPU, {num_fit} do"
        for num_fit in (3, 2)
    ]
