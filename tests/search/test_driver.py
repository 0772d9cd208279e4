"""The driver: what it does to a run's folder, and what a report that fails costs."""

import json
import os

import pytest

import search.report
from search.driver import _begin_folder, _report
from search.plan import Plan
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
