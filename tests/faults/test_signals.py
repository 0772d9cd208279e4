"""Ctrl-C at a real search: its own Ray, its own model."""

import os
import signal
import subprocess
import time

import pyarrow.parquet as pq

from search.export import load_plan
from tests.searches import start


def test_ctrl_c_keeps_everything_and_says_how_to_go_on(tmp_path, environment):
    process = start(tmp_path, environment, subprocess.PIPE)
    ledger = tmp_path / "shapes_24x40" / "ledger"
    deadline = time.monotonic() + 120
    while len(list(ledger.glob("*.parquet"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    known = pq.read_table(ledger).num_rows

    assert process.returncode == 130
    assert "nothing measured is lost. To go on: python -m search.run" in errors
    assert "Traceback" not in errors

    # tests/end_to_end/test_killed.py goes on to the end after a harder stop.
    plan = load_plan(tmp_path / "shapes_24x40" / "annealing-seed0")
    assert not plan.search.replay()
    # The other worker may have evaluated ahead of where the search is.
    assert 0 < plan.search.num_known <= known == plan.ledger.table().num_rows
