"""Our ratios file in the reference implementation's scripts, and theirs in ours."""

from __future__ import annotations

import copy
import json
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

import crdiff_core
from crdiff_core import BlockRatios, RatiosFile, Resolution, bake, generate
from crdiff_core.models import Model
from crdiff_core.sheet import GAP
from tests.core.conftest import CPU
from tests.core.test_poa import draw, prune

# Diffusers' scheduler calls np.array on a tensor, which torch has not yet adapted to numpy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

# The names that its scripts translate into repositories; others they take for one.
THEIR_NAMES = {"sdxl", "sd1.5", "sd2.1"}


class TheirSettings(NamedTuple):
    """What the reference's unet_pruning_experiment.py takes from a file."""

    model: str
    height: int
    width: int
    ratios: BlockRatios


def read_as_they_do(path) -> TheirSettings:
    content: dict[str, Any] = json.loads(path.read_text())
    model, found = content["model_config"], content["best_global_params_ratio"]
    assert content.get("pruning_method", "ratio") == "ratio"
    # Handed on as text: three ratios in this order, three zeros.
    text = " ".join(str(found[f"{group}_ratio"]) for group in ("down", "up", "mid")) + " 0 0 0"
    down, up, mid, *zeros = map(float, text.split())
    assert zeros == [0, 0, 0]
    ratios = BlockRatios(down=down, mid=mid, up=up)
    return TheirSettings(model["name"], int(model["height"]), int(model["width"]), ratios)


@pytest.mark.parametrize("model", ["sdxl", "sd15", "sd21"])
@pytest.mark.parametrize(
    "ratios", [BlockRatios(0.43, 0.5, 0.36), BlockRatios(9e-05, 1 / 3, 0.0)], ids=str
)
def test_their_scripts_read_ours(tmp_path, model, ratios):
    RatiosFile(model, Resolution(480, 360), 0.71, ratios, 1.5, {"seed": 0}).write(
        tmp_path / "best_ratios.json"
    )
    read = read_as_they_do(tmp_path / "best_ratios.json")

    assert read.model in THEIR_NAMES
    assert (read.height, read.width, read.ratios) == (480, 360, ratios)


def test_their_scripts_draw_from_ours_what_we_draw(sd_pipe, tmp_path):
    file = tmp_path / "best_ratios.json"
    RatiosFile("mine", Resolution(16, 24), 0.71, BlockRatios(0.4, 0.6, 0.5), 1.0).write(file)
    theirs = copy.deepcopy(sd_pipe)
    prune(theirs.unet, read_as_they_do(file).ratios)

    assert torch.equal(draw(theirs), draw(crdiff_core.apply(sd_pipe, file)))


@pytest.fixture
def their_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "model_config": {"name": "mine", "width": 24, "height": 16},
                "best_avg_score": 0.71,
                "best_global_params_ratio": {
                    "down_ratio": 0.4,
                    "up_ratio": 0.5,
                    "mid_ratio": 0.6,
                },
            },
            indent=4,
        )
    )
    return path


def test_generate_draws_theirs_as_their_poa_does(sd_folder, their_file, tmp_path):
    out = tmp_path / "picture.png"
    model = ["--model", str(sd_folder), "--ratios", str(their_file)]
    arguments = [*model, "--prompt", "a cat", "--steps", "2", "--zoom", "1", "--out", str(out)]
    drawing = generate._drawing(generate._parser().parse_args(arguments))

    assert (drawing.ratios, drawing.poa_weight) == (BlockRatios(0.4, 0.6, 0.5), 1.5)
    assert drawing.resolution == Resolution(height=16, width=24)
    assert generate.main(arguments) == 0
    with Image.open(out) as sheet:
        assert sheet.width == 2 * 24 + 3 * GAP


def test_bake_saves_from_theirs_what_they_would_save(sd_folder, their_file, tmp_path):
    out = tmp_path / "baked"
    model = ["--model", str(sd_folder), "--ratios", str(their_file)]
    assert bake.main([*model, "--out", str(out), "--unet-only"]) == 0

    expected = prune(Model("small", str(sd_folder)).load(CPU).unet, BlockRatios(0.4, 0.6, 0.5))
    baked = UNet2DConditionModel.from_pretrained(out).state_dict()
    for name, weight in expected.state_dict().items():
        assert torch.equal(baked[name], weight), name
