"""The driver is killed again and again; the same command goes on."""

import json
import os
import random
import signal
import time

import pytest

from tests.faults.program import reward_of
from tests.faults.sessions import PATIENCE_S, check, check_tracked

# It has as much to do as many others together.
pytestmark = pytest.mark.timeout(1800)

SIGKILL = -9
RACING = ("racing=on", "racing.stride=2", "racing.alpha=0.4")


def at_start(search):
    """A moment: at once."""
    return True


def at_batch(number):
    """A moment: so many batches are in the ledger."""
    return lambda search: search.num_files >= number


def at_result(name):
    """A moment: a result is written; what comes after it, and MLflow's last, is not."""
    return lambda search: name in search.results.files()


AT_THE_END = [at_result("history.parquet"), at_result("best_ratios.json")]
# One before the first batch, two along the way, two at the end.
MOMENTS = [at_start, at_batch(3), at_batch(36), *AT_THE_END]


def campaign(search, moments, seed):
    """Kill the driver soon after each moment, then let it end.

    Returns how often it was killed, how many rows that lost, and the batches that were begun
    although the ledger had a reward of theirs.
    """
    chance = random.Random(seed)
    killed = lost = 0
    again = []
    for moment in [*moments, None]:
        known = {row["reward"] for row in search.rows()}
        num_begun = len(search.begun)
        if moment is None:
            search.finish()
        else:
            session = search.start()
            search.wait(session, lambda moment=moment: moment(search))
            time.sleep(chance.uniform(0, 0.3))
            session.kill()
            session.join()
            killed += session.exitcode == SIGKILL
        lost += search.lost()
        for ratios, prompts in search.begun[num_begun:]:
            again += [(ratios, p) for p in prompts if reward_of(ratios, p) in known]
    return killed, lost, again


@pytest.fixture(params=["a folder", "an object store"])
def elsewhere(request, tmp_path):
    """Where results are kept; '' is a folder of the search's own."""
    return "" if request.param == "a folder" else request.getfixturevalue("s3")


def test_a_driver_killed_at_five_moments_finds_what_one_left_alone_finds(
    searching, reference, tally
):
    search = searching()
    killed, lost, again = campaign(search, MOMENTS, seed=0)
    tally("driver SIGKILL", killed, lost)

    assert killed >= 4  # A session may end just before its end.
    assert (lost, again) == (0, [])
    check(search, reference(()))
    check_tracked(search)


def test_a_driver_that_is_preempted_writes_down_what_is_being_drawn(searching, reference, tally):
    search = searching()
    session = search.start()
    search.wait(session, lambda: search.num_files >= 9)
    os.kill(session.pid, signal.SIGTERM)
    session.join(PATIENCE_S)
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


def moments(num_kills, seed):
    """So many moments at which to kill a driver, one at least of each kind."""
    chance = random.Random(seed)
    ends = [*AT_THE_END, at_start]
    batches = sorted(chance.sample(range(1, 60), num_kills - 2 - len(ends)))
    return [at_start, at_start, *map(at_batch, batches), *ends]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arguments", [(), RACING], ids=["racing off", "racing on"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_driver_killed_thirty_times(arguments, seed, elsewhere, searching, reference, tally):
    search = searching(*arguments, place=elsewhere)
    killed, lost, again = campaign(search, moments(30, seed), seed)
    tally("driver SIGKILL" + ", object store" * bool(elsewhere), killed, lost)

    assert killed >= 25
    assert (lost, again) == (0, [])
    check(search, reference(arguments))
    check_tracked(search)
