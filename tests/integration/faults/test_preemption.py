"""The machine of the driver is taken away, with notice."""

import json
import os
import signal

from tests.integration.faults.sessions import Searching, check, check_tracked


def test_a_driver_that_is_preempted_writes_down_what_is_being_drawn(
    cluster, reference, tmp_path, tally
):
    search = Searching(tmp_path, cluster.address)
    session = search.start()
    search.wait(session, lambda: search.num_files >= 9)
    os.kill(session.pid, signal.SIGTERM)
    session.join(150)
    stopped = search.printed
    known = {row["reward"] for row in search.rows()}
    (parent,), children = search.tracked()
    tally("driver SIGTERM", 1, search.lost())

    assert session.exitcode == 130
    assert "WARNING: SIGTERM: what is being drawn is finished" in stopped
    assert "Stopped; nothing measured is lost. To go on: python -m search.run" in stopped
    assert "Traceback" not in stopped
    assert len(known) == sum(len(prompts) for _, prompts in search.begun)
    assert parent.info.status == "KILLED"
    assert {run.info.status for run in children} == {"FINISHED"}
    lines = search.results.read("log.jsonl").decode().splitlines()
    assert "search ends: KILLED" in [json.loads(line)["message"] for line in lines]

    search.finish()
    assert search.lost() == 0
    check(search, reference(()))
    check_tracked(search)
