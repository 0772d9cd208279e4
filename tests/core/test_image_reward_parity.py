"""Our ImageReward against the PyPI package's, on the same full-size random weights.

    pytest -m slow -rP tests/core/test_image_reward_parity.py

makes an environment for the package (2 GB, two minutes; kept if CRDIFF_PARITY_VENV names its
folder), lets image_reward_parity.py score three pictures there, and compares.
"""

from __future__ import annotations

import json
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crdiff_core.rewards.image_reward import ImageReward

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPT = Path(__file__).with_name("image_reward_parity.py")
REQUIREMENTS = (
    "image-reward==1.5",
    "transformers==4.55.4",  # The last that has what the package imports.
    "diffusers==0.36.0",
    f"torch=={torch.__version__.partition('+')[0]}",
    "torchvision<0.29",
    # Undeclared, and it imports pkg_resources, which setuptools 81 dropped.
    "openai-clip==1.0.1",
    "setuptools>=77.0.3,<81",
)


@pytest.fixture(scope="module")
def package_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Python that can import the package."""
    kept = os.environ.get("CRDIFF_PARITY_VENV")
    venv = Path(kept) if kept else tmp_path_factory.mktemp("image_reward_venv")
    python = venv / "bin" / "python"
    if not (venv / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", *REQUIREMENTS], check=True)
        (venv / "complete").touch()
    yield python
    if not kept:
        shutil.rmtree(venv)


@pytest.fixture(scope="module")
def folder(package_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Weights, pictures, and the package's scores of them."""
    folder = tmp_path_factory.mktemp("image_reward")
    tokenizer = folder / "bert-base-uncased"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    subprocess.run([package_python, SCRIPT, folder], check=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def package(folder: Path) -> dict:
    return json.loads((folder / "package.json").read_text())


@pytest.fixture(scope="module")
def reward(folder: Path) -> ImageReward:
    return ImageReward(
        path=str(folder / "ImageReward.pt"),
        tokenizer=str(folder / "bert-base-uncased"),
        resize="none",
    )


def vocabulary() -> list[str]:
    """As many tokens as bert-base-uncased's, its special ones in their places."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    characters = string.ascii_lowercase + string.digits + string.punctuation + "東京"
    words = (
        "a cat holding sign that says hello world billboard in times square showing the text "
        "future is now bold neon letters cafe uber naive robot of it word after ##s ##ing isn don"
    ).split()
    real = [*characters, *(f"##{character}" for character in characters), *words]
    tokens = [f"[unused{position}]" for position in range(30522)]
    for position, token in special.items():
        tokens[position] = token
    tokens[999 : 999 + len(real)] = real
    return tokens


def difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def test_random_weights_tell_pictures_and_prompts_apart(package):
    own, first = package["scores"], package["scores_of_first_prompt"]
    print(f"the package's scores: {own}, with the first prompt: {first}")
    assert min(abs(a - b) for i, a in enumerate(first) for b in first[:i]) > 0.05
    assert min(abs(a - b) for a, b in zip(own[1:], first[1:], strict=True)) > 0.05


def test_texts_have_the_packages_tokens(package, reward):
    for text, ids, mask in zip(
        package["texts"], package["input_ids"], package["attention_mask"], strict=True
    ):
        assert reward._tokenise(text).tolist() == [ids, mask], text


def test_same_pixels_get_the_packages_scores(package, reward, folder):
    pixels = torch.from_numpy(np.load(folder / "pixels.npy"))
    for prompts, theirs in (
        (package["prompts"], package["scores"]),
        ([package["prompts"][0]] * len(pixels), package["scores_of_first_prompt"]),
    ):
        tokens = torch.stack([reward._tokenise(prompt) for prompt in prompts])
        ours = reward._network(pixels, tokens).tolist()
        print(f"same pixels: {difference(ours, theirs):.2e}")
        assert difference(ours, theirs) <= 1e-5


@pytest.mark.parametrize(("resize", "scores"), [("none", "scores"), (256, "squashed_scores")])
def test_pictures_get_nearly_the_packages_scores(package, reward, folder, resize, scores):
    reward.resize = resize
    ours = []
    for index, prompt in enumerate(package["prompts"]):
        picture = np.array(Image.open(folder / f"{index}.png"))
        image = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        ours += reward(image, [prompt])
    print(f"own preprocessing, resize={resize}: {difference(ours, package[scores]):.2e}")
    assert difference(ours, package[scores]) <= 1e-3
