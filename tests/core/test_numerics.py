"""Equal bits on a CPU, wherever arrays lie in memory."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from crdiff_core.commands import run
from crdiff_core.numerics import make_reproducible
from search.cluster import prepare_environment
from search.trial import RatioTrial
from tests.search.test_cluster import SETTINGS

VARIABLE = "MKL_CBWR"
# Draws with a pipeline whose weights begin so many numbers behind an aligned address.
DRAW = """
import hashlib, sys
from crdiff_core.numerics import make_reproducible
make_reproducible()
import torch
from crdiff_core.models import Model
from crdiff_core.prompts import Prompt
from crdiff_core.ratios import BlockRatios, Resolution
from crdiff_core.replica import Replica
folder, offset = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
pipe = Model.find(folder, "float32").load(torch.device("cpu"))
for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
    for weight in part.parameters():
        moved = torch.empty(weight.numel() + offset)[offset:].view(weight.shape)
        weight.data = moved.copy_(weight.data)
replica = Replica(pipe, Resolution(16, 24), num_steps=2, guidance_scale=3.0, poa_weight=1.5)
replica.set_ratios(BlockRatios(0.5, 0.5, 0.5))
pictures = replica.render([Prompt("a cat", "", seed) for seed in range(3)])
print(hashlib.sha256(pictures.numpy().tobytes()).hexdigest())
"""
MULTIPLY = """
from crdiff_core.numerics import make_reproducible
import torch
make_reproducible()
torch.ones(8, 8) @ torch.ones(8, 8)
"""


def printed(code, *arguments, **environment):
    """What Python code prints in a process that nobody has prepared."""
    bare = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, env={**bare, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_processes_whose_arrays_lie_elsewhere_draw_the_same_bits(sdxl_folder):
    folder = str(sdxl_folder)
    assert printed(DRAW, folder, "0") == printed(DRAW, folder, "1")


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")
@pytest.mark.parametrize(("given", "mode"), [({}, "AUTO"), ({VARIABLE: "COMPATIBLE"}, "COMPAT")])
def test_mkl_takes_the_setting_even_once_torch_is_imported(given, mode):
    assert f"CNR:{mode}" in printed(MULTIPLY, MKL_VERBOSE="1", **given)


@pytest.fixture
def unset(monkeypatch):
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != VARIABLE})


def a_worker():
    worker = RatioTrial.__new__(RatioTrial)  # Without Ray around it.
    worker.setup({}, b"no setup")
    with pytest.raises(pickle.UnpicklingError):
        worker._load()


BEGINNINGS = {
    "a search": lambda: prepare_environment(SETTINGS),
    "a worker": a_worker,
    "a command of crdiff_core": lambda: run(lambda _: None, []),
}


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize("begin", BEGINNINGS.values(), ids=BEGINNINGS)
def test_whatever_draws_begins_with_it(begin):
    begin()
    assert os.environ[VARIABLE] == "AUTO"


@pytest.mark.usefixtures("unset")
def test_a_users_own_value_stays():
    os.environ[VARIABLE] = "AVX2"
    make_reproducible()
    assert os.environ[VARIABLE] == "AVX2"


def test_importing_the_library_sets_nothing():
    code = f"import os, crdiff_core.pruning; print(os.environ.get({VARIABLE!r}))"
    assert printed(code) == "None\n"
