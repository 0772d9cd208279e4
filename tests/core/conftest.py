"""Small real pipelines on disk, made once for all core tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from crdiff_core.models import Model

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def deep_vae_folder(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SD pipeline with a VAE whose latents are 8x8 pixels, as in the paper's models."""
    folder = tmp_path_factory.mktemp("deep_vae") / "sd"
    shutil.copytree(sd_folder, folder)
    shutil.rmtree(folder / "vae")
    torch.manual_seed(1)
    AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(params=["sd", "sdxl"])
def folder(request: pytest.FixtureRequest, sd_folder: Path, sdxl_folder: Path) -> Path:
    """Each kind of pipeline in turn."""
    return {"sd": sd_folder, "sdxl": sdxl_folder}[request.param]


@pytest.fixture
def pipe(folder: Path) -> Any:
    """A freshly loaded pipeline of each kind in turn."""
    return Model("small", str(folder)).load(CPU)


@pytest.fixture
def sd_pipe(sd_folder: Path) -> Any:
    return Model("small", str(sd_folder)).load(CPU)
