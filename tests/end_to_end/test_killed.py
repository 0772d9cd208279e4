"""A search whose driver is killed: the same command goes on and finds the same."""

import json
import os
import signal
import subprocess
import time

import pyarrow.parquet as pq

from search.runs import RATIOS_FILE
from tests.processes import stop
from tests.searches import num_drawn, search, start


def rows(ledger):
    """The ledger's rewards by key, prompt and seed; a reward that is there twice fails."""
    found = pq.read_table(ledger).to_pylist()
    rewards = {(row["key"], row["prompt"], row["seed"]): row["reward"] for row in found}
    assert len(rewards) == len(found)
    return rewards


def answer(folder):
    """best_ratios.json without what the search took."""
    found = json.loads((folder / RATIOS_FILE).read_text())
    del found["provenance"]["use"]
    return found


def test_a_killed_search_goes_on_and_finds_what_one_left_alone_finds(
    tmp_path, environment, finished
):
    cell = tmp_path / "shapes_24x40"
    killed = start(tmp_path, environment, subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while len(list((cell / "ledger").glob("*.parquet"))) < 3:
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(killed.pid, signal.SIGKILL)
    finally:
        stop(killed)
    before = rows(cell / "ledger")
    done = search(tmp_path, environment)
    after = rows(cell / "ledger")

    assert done.returncode == 0, done.stdout + done.stderr
    assert before.items() <= after.items()
    assert num_drawn(done.stdout) == len(after) - len(before) > 0
    assert answer(cell / "annealing-seed0") == answer(finished.folder)
    # What was evaluated ahead depends on who was free; the rewards do not.
    alone = rows(finished.folder.parent / "ledger")
    both = after.keys() & alone.keys()
    assert both
    assert {key: after[key] for key in both} == {key: alone[key] for key in both}
