"""Models: what a folder is checked for, its revision, and what is known without loading it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from crdiff_core import pruning
from crdiff_core.errors import ModelError
from crdiff_core.models import Model
from crdiff_core.ratios import Resolution
from tests.core.conftest import CPU


@pytest.fixture
def copied(sd_folder: Path, tmp_path: Path) -> Path:
    """A model folder that a test may break."""
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


def model(folder: Path, dtype: str = "float32") -> Model:
    return Model("small", str(folder), dtype)


def weights_file(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def one_line(caught: pytest.ExceptionInfo[ModelError]) -> bool:
    return "\n" not in str(caught.value)


# Loading


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_model_loads_in_the_dtype_asked_for(sd_folder, dtype):
    assert model(sd_folder, dtype).load(CPU).unet.dtype == getattr(torch, dtype)


def test_a_loaded_model_only_draws(pipe):
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not part.training
        assert not any(weight.requires_grad for weight in part.parameters())


def test_an_unknown_name_without_a_path_is_refused():
    with pytest.raises(ModelError, match=r"model sdxl is not embedded: set model.path"):
        _ = Model("sdxl").folder


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"absent is not a diffusers folder .*: set model.path"):
        model(tmp_path / "absent").load(CPU)


def test_a_pipeline_of_another_class_is_refused(copied):
    index = copied / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "FluxPipeline"}))
    with pytest.raises(ModelError, match="holds a FluxPipeline: CR-Diff draws with Stable"):
        model(copied).load(CPU)


@pytest.mark.parametrize("content", ["", "{"], ids=["empty", "cut"])
def test_a_broken_index_is_refused(copied, content):
    (copied / "model_index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model_index.json is missing or broken: fetch"):
        model(copied).load(CPU)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("size", [0, 1000], ids=["empty", "cut"])
def test_broken_weights_are_refused_in_one_line(copied, part, size):
    file = weights_file(copied, part)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"does not load: .*: fetch it again$") as caught:
        model(copied).load(CPU)
    assert one_line(caught)


def test_missing_weights_are_refused_in_one_line(copied):
    weights_file(copied, "unet").unlink()
    with pytest.raises(ModelError, match=r"does not load: .*: fetch it again$") as caught:
        model(copied).load(CPU)
    assert one_line(caught)


# Resolutions


def test_a_resolution_that_the_pipeline_can_draw_passes(sd_folder, deep_vae_folder):
    for folder in (sd_folder, deep_vae_folder):
        model(folder).check_resolution(Resolution(24, 40))


@pytest.mark.parametrize(
    ("asked", "nearest"), [("25x40", "24x40"), ("24x44", "24x48"), ("2x2", "8x8")]
)
def test_a_resolution_that_8_does_not_divide_is_refused_with_the_nearest(
    sd_folder, asked, nearest
):
    with pytest.raises(ModelError) as caught:
        model(sd_folder).check_resolution(Resolution.parse(asked))
    assert str(caught.value) == (
        f"resolution {asked} is not divisible by 8, as small needs: the nearest is res={nearest}"
    )


def test_the_vae_factor_is_read_from_its_config(sd_folder, deep_vae_folder):
    assert model(sd_folder).vae_factor == 2
    assert model(deep_vae_folder).vae_factor == 8


# What is known without loading


def test_the_prunable_weights_of_the_file_are_those_of_the_loaded_unet(folder):
    loaded = model(folder).load(CPU).unet
    assert model(folder).num_prunable() == pruning.num_prunable(loaded)


@pytest.mark.parametrize("size", [0, 4, 1000])
def test_the_prunable_weights_of_a_broken_file_are_refused(copied, size):
    file = weights_file(copied, "unet")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"safetensors is broken .*: fetch the model again"):
        model(copied).num_prunable()


def test_the_prunable_weights_of_no_file_are_refused(copied):
    weights_file(copied, "unet").unlink()
    with pytest.raises(ModelError, match="holds no safetensors weights: fetch the model again"):
        model(copied).num_prunable()


def test_the_schedulers_name_is_its_class(sd_folder):
    assert model(sd_folder).scheduler == "DPMSolverMultistepScheduler"


# Revisions


def test_a_copy_has_the_same_revision(sd_folder, copied):
    assert model(copied).revision == model(sd_folder).revision


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_one_changed_weight_byte_is_another_revision(sd_folder, copied, part):
    file = weights_file(copied, part)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert model(copied).revision != model(sd_folder).revision


def test_a_changed_config_is_another_revision(sd_folder, copied):
    config = copied / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.02", "0.03"))
    assert model(copied).revision != model(sd_folder).revision


def test_a_note_beside_the_weights_is_not_another_revision(sd_folder, copied):
    (copied / "README.md").write_text("fetched in November")
    assert model(copied).revision == model(sd_folder).revision
