"""The worker: what it reports of a model that loads, and of a memory that is too small."""

import pickle
from dataclasses import replace

import pytest
import torch

from crdiff_core.models import Model
from crdiff_core.prompts import Prompt, PromptSet
from crdiff_core.ratios import Resolution
from crdiff_core.rewards import load_reward
from search.trial import RatioTrial, TrialSetup

PROMPTS = PromptSet(
    "search",
    tuple(
        Prompt(f"a big {colour} circle in the middle on a white background", str(seed), seed)
        for seed, colour in enumerate(("red", "blue"))
    ),
)
SETUP = TrialSetup(
    model=Model("shapes"),
    revision=Model("shapes").revision,
    resolution=Resolution(24, 24),
    num_steps=2,
    guidance_scale=3.0,
    poa_weight=1.5,
    size_conditioning=None,
    negative_prompt=None,
    compile="none",
    reward="shapes",
    reward_options={},
    reward_version=load_reward("shapes").version,
    prompt_sets={"search": PROMPTS},
    device="cpu",
    num_threads=1,
)
CONFIG = {
    "ratios": {"down": 0.3, "mid": 0.2, "up": 0.1},
    "poa_weight": 1.5,
    "drawn_at": "requested",
    "prompts": "search",
    "batch": [0, 1],
    "keep": [],
}


class Worker(RatioTrial):
    """A worker outside of Ray, whose UNet has room for so many pictures at once."""

    def __init__(self, config, room=99):
        self.config, self.room = config, room
        self.setup(config, pickle.dumps(SETUP))

    def _load(self):
        super()._load()
        if self._broken is None:
            unet = self._replica.denoiser
            unet.register_forward_pre_hook(self.allocate, with_kwargs=True)

    def allocate(self, module, given, named):
        sample = given[0] if given else named["sample"]
        if len(sample) // 2 > self.room:  # Each with its unconditional one.
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_first_step_loads_and_says_what_a_picture_takes():
    worker = Worker(CONFIG)

    loaded = worker.step()
    assert set(loaded) == {"picture_s"}
    assert loaded["picture_s"] > 0
    drawn = worker.step()
    assert drawn["done"]
    assert len(drawn["measured"].rewards) == 2
    assert drawn["redrawn"] is False
    drawn_by = dict(drawn["drawn_by"])
    assert drawn_by["torch"] == torch.__version__
    assert drawn_by["device"].startswith("cpu ")


def test_loading_changes_no_bit():
    first = Worker(CONFIG)
    first.step()
    both = [first.step()["measured"].rewards for _ in range(2)]

    assert both[0] == both[1]


def test_a_worker_with_too_little_memory_says_what_fits_and_idles(monkeypatch):
    monkeypatch.setattr("search.trial._IDLE_S", 0.0)
    worker = Worker(CONFIG, room=1)
    found = worker.step()

    assert found["num_fit"] == 1
    assert found["device"].startswith("cpu ")
    assert worker.step() == {"is_idle": True}


class WithALargeReward(Worker):
    """A worker whose reward, once it is loaded, leaves room for one picture at a time."""

    def _load(self):
        super()._load()
        score = self._reward

        def load_and_score(images, texts):
            self.room = 1
            return score(images, texts)

        load_and_score.name = score.name
        self._reward = load_and_score


def test_what_fits_is_what_fits_beside_the_reward():
    assert WithALargeReward(CONFIG).step()["num_fit"] == 1


def test_a_reward_that_never_fits_is_named(monkeypatch):
    worker = Worker(CONFIG)
    worker._load()

    def fail(images, texts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    fail.name = "shapes"
    worker._reward = fail
    worker.step()
    failure = worker.step()

    assert failure["failure"].startswith(
        "reward shapes cannot score even one picture in the memory"
    )
    assert not failure["transient"]


def test_a_worker_without_room_for_a_single_picture_says_so():
    assert Worker(CONFIG, room=0).step()["num_fit"] == 0


def test_a_larger_batch_than_before_may_not_fit_either():
    worker = Worker(CONFIG, room=2)
    worker.step()
    worker.step()
    worker.config = CONFIG | {"batch": [0, 1, 1]}

    assert worker.step()["num_fit"] == 1


def test_what_did_fit_and_does_not_for_a_while_is_drawn_in_parts_and_marked():
    worker = Worker(CONFIG)
    worker.step()
    worker.step()
    worker.room = 1
    short = worker.step()
    worker.room = 99
    again = worker.step()

    assert short["redrawn"] is True
    assert len(short["measured"].rewards) == 2
    assert again["redrawn"] is False
    assert again["measured"].batch_size == 2


def test_a_node_with_other_weights_fails_and_says_why():
    worker = Worker(CONFIG)
    worker.setup(CONFIG, pickle.dumps(replace(SETUP, revision="another")))
    failed = worker.step()

    assert failed["transient"] is False
    assert "give every node the same weights" in failed["failure"]
