import os
import signal
import time

import pytest
from ray import tune

from crdiff_core.ratios import BlockRatios
from search.cluster import start_at_once
from search.deadline import Deadline
from search.ledger import Ledger
from search.trial import RatioTrial
from tests.search.landscapes import PROMPTS, course, make_search, measure, work

# On this prompt of the starting point it goes wrong.
BAD, AT = 4, dict.fromkeys(("down", "mid", "up"), 0.3)
TIMEOUT_S, LATE = 5.0, "it took too long"


class Faulty(RatioTrial):
    """A worker that measures the analytic reward, and that goes wrong on one batch.

    fault: stops (as it is, without an end), hangs or dies; times: how often; counter: a file.
    """

    def setup(self, config, setup, fault, times, counter):
        super().setup(config, setup)
        self._is_loaded, self._broken = True, "no replica to close"
        self._fault, self._times, self._counter = fault, times, counter

    def step(self):
        if self.config["ratios"] == AT and BAD in self.config["batch"] and self._is_due():
            if self._fault == "hangs":
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGSTOP if self._fault == "stops" else signal.SIGKILL)
        prompts = PROMPTS[self.config["prompts"]].prompts
        batch = [prompts[number] for number in self.config["batch"]]
        return {"measured": measure(BlockRatios(**self.config["ratios"]), batch), "done": True}

    def _is_due(self):
        with open(self._counter, "a+") as file:
            file.write("x")
            file.seek(0)
            return len(file.read()) <= self._times


def fit(search, folder, fault, times):
    trainable = tune.with_parameters(
        Faulty,
        setup=b"",
        fault=fault,
        times=times,
        counter=str(folder / "counter"),
    )
    search.max_trials = 2
    start_at_once(2)
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        tune_config=tune.TuneConfig(search_alg=search, num_samples=-1, reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=str(folder / "ray"),
            callbacks=[Deadline(TIMEOUT_S, lambda trial_id: search.give_up(trial_id, LATE))],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()
    return search


# Ray's part is the same: one is enough for every day.
FAULTS = pytest.mark.parametrize(
    "fault", ["stops", *(pytest.param(each, marks=pytest.mark.slow) for each in ("hangs", "dies"))]
)


def small(folder):
    return make_search(folder, steps=5, annealing={"seed": 3}, max_failures=1)


@FAULTS
def test_a_worker_that_goes_wrong_once_changes_nothing(tmp_path, module_ray, fault, tally):
    search = fit(small(tmp_path / "ledger"), tmp_path, fault, times=1)
    undisturbed = small(tmp_path / "undisturbed")
    work(undisturbed)
    rows = Ledger(tmp_path / "ledger").table().to_pylist()

    doubled = len(rows) - len({(row["key"], row["prompt"], row["seed"]) for row in rows})
    tally(f"a worker {fault}", 1, doubled)

    assert (tmp_path / "counter").read_text() == "xx"
    assert course(search) == course(undisturbed)
    assert doubled == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stops", "hangs", "dies"])
def test_a_batch_that_workers_go_wrong_on_again_and_again_fails(
    tmp_path, module_ray, fault, tally
):
    search = fit(small(tmp_path / "ledger"), tmp_path, fault, times=9)
    failed = [e for e in search.evaluations if e.failure is not None]
    tally(f"a worker {fault}", 2, 0)

    assert (tmp_path / "counter").read_text() == "xx"
    assert [e.ratios for e in failed] == [BlockRatios(0.3, 0.3, 0.3)]
    reason = "its worker died or could not start: log.jsonl" if fault == "dies" else LATE
    assert failed[0].failure.startswith(reason)
    assert search.steps[0].event == "fail"
    assert len(search.steps) == 5
    assert search.winner is not None


@pytest.mark.slow
def test_a_worker_that_dies_between_two_batches_changes_nothing(tmp_path, module_ray):
    """Ray Tune does not notice before it hands that worker the next one."""
    search, undisturbed = small(tmp_path / "ledger"), small(tmp_path / "undisturbed")
    settle = search.on_trial_complete
    ended = []

    def settle_and_kill(trial_id, result=None, error=False):
        settle(trial_id, result, error)
        ended.append(error)
        if len(ended) in {4, 12}:
            os.kill(result["pid"], signal.SIGKILL)

    search.on_trial_complete = settle_and_kill
    fit(search, tmp_path, None, times=0)
    work(undisturbed)

    assert ended.count(True) == 2
    assert course(search) == course(undisturbed)
