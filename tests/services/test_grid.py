"""Real grids on real Ray: cells that end, cells that die, and the same command again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest

from search import grid
from tests.processes import stop

TINY = (
    "budget.steps=2",
    "searcher.space_filling=0",
    "prompts.search=2",
    "prompts.rerank=2",
    "prompts.validation=2",
    "rerank.top=1",
    "report.pictures=0",
    "render.num_steps=2",
    "tracking=none",
)


@contextmanager
def started(output, environment, *arguments):
    """A grid that runs, and has ended by the end."""
    command = [sys.executable, "-m", "search.run", "-m", *TINY, f"output={output}", *arguments]
    process = subprocess.Popen(
        command,
        cwd="/",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            stop(process)


def until(condition, process, timeout_s=280):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rows(output):
    tables = [pq.read_table(folder) for folder in output.glob("*/ledger")]
    return [row for table in tables for row in table.to_pylist()]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("a grid")


@pytest.fixture(scope="module")
def ended(output, environment):
    """A grid of two cells, the first of which was killed as it began."""
    lease = output / "shapes_24x24" / "annealing-seed0" / "driver.json"
    with started(output, environment, "res=24x24,24x32", "cluster.num_workers=1") as process:
        until(lease.is_file, process)
        os.kill(json.loads(lease.read_text())["process"], signal.SIGKILL)
        printed, errors = process.communicate(timeout=200)
    return process.returncode, printed, errors


def test_a_cell_that_dies_costs_only_itself(ended, output):
    code, printed, errors = ended
    killed, finished = json.loads((output / "grid.json").read_text())["cells"]

    assert code == 2, errors
    assert "cell 2 of 2: shapes_24x32" in printed
    assert re.search(r"^shapes_24x32: \d/\d evaluations, ", printed, re.MULTILINE)
    assert killed["status"] == "failed"
    assert "its process was ended by SIGKILL" in killed["reason"]
    assert errors.startswith("error: shapes_24x24: its process was ended by SIGKILL")
    assert finished["status"] == "finished"
    exported = json.loads((output / finished["folder"] / "best_ratios.json").read_text())
    ratios = exported["best_global_params_ratio"]
    assert finished["ratios"]["down"] == ratios["down_ratio"]
    assert "1 of 2 finished" in printed


def test_its_report_names_the_cells_and_the_reason(ended, output):
    page = (output / "grid_report.html").read_text()

    assert "its process was ended by SIGKILL" in page
    assert "python -m search.run" in page
    assert "shapes | 24x32 | " in (output / "grid.md").read_text()


def test_the_command_of_a_cell_is_the_one_for_it_alone(ended, output):
    record = json.loads((output / "shapes_24x32/annealing-seed0/run.json").read_text())

    assert record["command"].endswith(" res=24x32 cluster.num_workers=1")
    assert " -m search.run budget.steps=2 " in record["command"]
    assert record["config"]["cluster"]["address"] == "local"


def test_what_is_finished_is_not_drawn_again(ended, output, environment):
    before = rows(output)
    with started(output, environment, "res=24x32", "cluster.num_workers=1") as process:
        printed, errors = process.communicate(timeout=200)

    assert process.returncode == 0, errors
    assert "pictures  none drawn: the ledger had all" in printed
    assert rows(output) == before


def test_the_report_can_be_written_again(ended, output, environment, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)

    assert grid.main([str(copy)]) == 0
    cells = {
        each["folder"]: each for each in json.loads((copy / "grid.json").read_text())["cells"]
    }
    assert cells["shapes_24x32/annealing-seed0"]["status"] == "finished"
    assert set(cells) <= {"shapes_24x32/annealing-seed0", "shapes_24x24/annealing-seed0"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_cells_and_the_same_command_goes_on(tmp_path, environment, number):
    arguments = ("res=24x24,24x32,24x40", "cluster.cells=2", "budget.steps=8")
    with started(tmp_path, environment, *arguments) as process:
        until(lambda: len({row["width"] for row in rows(tmp_path)}) == 2, process)
        os.kill(process.pid, number)
        printed, errors = process.communicate(timeout=120)
    known = len(rows(tmp_path))

    assert process.returncode == 130, errors
    assert "nothing measured is lost. To go on: python -m search.run -m" in errors
    assert "Traceback" not in errors
    assert "cell 3 of 3" not in printed

    with started(tmp_path, environment, *arguments) as again:
        printed, errors = again.communicate(timeout=280)
    found = rows(tmp_path)
    keys = {(row["key"], row["prompt"], row["seed"]) for row in found}
    assert again.returncode == 0, errors
    assert len(found) == len(keys)
    assert f"pictures  {len(found) - known} drawn in this run" in printed
