"""A worker whose memory is too small for the search's batches, on real Ray."""

import time

import pytest
from ray import tune

from crdiff_core.ratios import BlockRatios
from search.cluster import start_at_once
from search.driver import _stopper
from search.trial import RatioTrial
from tests.search.landscapes import PROMPTS, course, make_search, measure, work

pytestmark = pytest.mark.services
PATIENCE_S = 100


class Small(RatioTrial):
    """A worker that measures the analytic reward; the second to begin has too little memory.

    counter: a file with a sign for each worker.
    """

    def setup(self, config, setup, counter):
        super().setup(config, setup)
        self._broken = "no replica to close"
        self._drawn_by = {"device": "a small GPU"}
        self._counter = counter

    def step(self):
        if self._is_unfit:
            return super().step()
        if not self._is_loaded:
            self._is_loaded = True
            with self._counter.open("a") as file:
                file.write("x")
            if self._num_begun() == 2:
                return self._unfit(1)
            return {"picture_s": 0.0}
        # Else it may have drawn all before the other one begins.
        deadline_s = time.monotonic() + PATIENCE_S
        while self._num_begun() < 2 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        prompts = PROMPTS[self.config["prompts"]].prompts
        batch = [prompts[number] for number in self.config["batch"]]
        return {"measured": measure(BlockRatios(**self.config["ratios"]), batch), "done": True}

    def _num_begun(self):
        return len(self._counter.read_text())


def test_it_is_given_no_batch_and_the_search_ends_without_it(tmp_path, module_ray, caplog):
    search = make_search(tmp_path / "ledger", steps=5, num_fit=3)
    search.max_trials = 2
    start_at_once(2)
    trainable = tune.with_parameters(Small, setup=b"", counter=tmp_path / "counter")
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        tune_config=tune.TuneConfig(search_alg=search, num_samples=-1, reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "ray"),
            stop=_stopper(search),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()
    alone = make_search(tmp_path / "alone", steps=5)
    work(alone)

    # No third one was started in its place.
    assert (tmp_path / "counter").read_text() == "xx"
    assert [each for each in caplog.messages if "not used" in each] == [
        "a worker is not used: 3 pictures at once do not fit into the memory of a small GPU, 1 do"
    ]
    assert course(search) == course(alone)
