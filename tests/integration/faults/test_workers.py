import os
import pickle
import signal
import time
from dataclasses import fields

import pytest
from ray import tune

from crdiff_core.ratios import BlockRatios
from search.cluster import start_at_once
from search.ledger import Ledger
from search.trial import RatioTrial, TrialSetup
from tests.search.landscapes import PROMPTS, course, make_search, measure, work

# On this prompt of the starting point it goes wrong.
BAD, AT = 4, dict.fromkeys(("down", "mid", "up"), 0.3)
TIMEOUT_S = 3.0


class Faulty(RatioTrial):
    """A worker that measures the analytic reward, and that goes wrong on one batch.

    fault: hangs or dies; times: how often; counter: a file that counts.
    """

    def setup(self, config, setup, fault, times, counter):
        super().setup(config, setup)
        self._is_loaded, self._broken = True, "no replica to close"
        self._fault, self._times, self._counter = fault, times, counter

    def _draw(self):
        if self.config["ratios"] == AT and BAD in self.config["batch"] and self._is_due():
            if self._fault == "hangs":
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL)
        prompts = PROMPTS[self.config["prompts"]].prompts
        batch = [prompts[number] for number in self.config["batch"]]
        return {"measured": measure(BlockRatios(**self.config["ratios"]), batch), "done": True}

    def _is_due(self):
        with open(self._counter, "a+") as file:
            file.write("x")
            file.seek(0)
            return len(file.read()) <= self._times


def fit(search, folder, fault, times):
    setup = dict.fromkeys(field.name for field in fields(TrialSetup)) | {"timeout_s": TIMEOUT_S}
    trainable = tune.with_parameters(
        Faulty,
        setup=pickle.dumps(TrialSetup(**setup)),
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
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()
    return search


# Ray's part is the same: one is enough for every day.
FAULTS = pytest.mark.parametrize("fault", ["hangs", pytest.param("dies", marks=pytest.mark.slow)])


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


@FAULTS
def test_a_batch_that_workers_go_wrong_on_again_and_again_fails(
    tmp_path, module_ray, fault, tally
):
    search = fit(small(tmp_path / "ledger"), tmp_path, fault, times=9)
    failed = [e for e in search.evaluations if e.failure is not None]
    tally(f"a worker {fault}", 2, 0)

    assert (tmp_path / "counter").read_text() == "xx"
    assert [e.ratios for e in failed] == [BlockRatios(0.3, 0.3, 0.3)]
    assert "died, could not start, or took longer than" in failed[0].failure
    assert search.steps[0].event == "fail"
    assert len(search.steps) == 5
    assert search.winner is not None


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
