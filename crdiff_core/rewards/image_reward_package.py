"""ImageReward-v1.0 by the PyPI package image-reward itself, one picture at a time."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from crdiff_core.errors import RewardError
from crdiff_core.rewards import Resize, checked_resize, resize_suffix

_MODEL = "ImageReward-v1.0"


class ImageRewardPackage:
    """The score as the package gives it for 8-bit pictures: to check reward=image_reward by.

    The package is no dependency, as its last working transformers is 4.55.4; it downloads its
    weights itself, to ~/.cache/ImageReward.

    resize: 256 squashes the whole picture to 256x256 pixels first, as CR-Diff's reference
            implementation does; none leaves it to the package, which crops the middle.
    Both version and scores raise RewardError, in one line, where it does not import.
    Source: ImageReward (arXiv:2304.05977).
    """

    name = "image_reward_package"

    def __init__(self, resize: Resize = 256) -> None:
        self.resize = checked_resize(resize)
        self._model: Any = None
        self._device: torch.device | None = None

    @cached_property
    def version(self) -> str:
        """The package's version, its model's name and the resize: `1.5-<model>[-resize256]`."""
        # Imported although metadata would do: a search should fail before it starts.
        _ = self._package
        version = importlib.metadata.version("image-reward")
        return f"{version}-{_MODEL}{resize_suffix(self.resize)}"

    def check(self, prompts: Sequence[str]) -> None:
        """Accept every text: it was trained on whatever people write."""

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Score pictures of any size.

        images:  (N, 3, H, W), float in [0, 1], on any device; the network goes there too.
        prompts: N texts.
        Raises RewardError if the shapes do not fit or the package or its weights do not load.
        """
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise RewardError(
                f"image_reward_package got pictures of shape {tuple(images.shape)} for "
                f"{len(prompts)} prompts: give it (N, 3, H, W) and N prompts"
            )
        if not prompts:
            return []
        if self._device != images.device:
            try:
                self._model = self._package.load(_MODEL, device=str(images.device))
            # Whatever the package, the hub's client or the network raises.
            except Exception as error:
                raise _unusable("does not load", error) from error
            self._device = images.device
        pixels = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()
        return [
            float(self._model.score(prompt, self._resized(Image.fromarray(picture))))
            for prompt, picture in zip(prompts, pixels.numpy(), strict=True)
        ]

    def _resized(self, picture: Image.Image) -> Image.Image:
        if self.resize == "none":
            return picture
        # The width first, as Pillow did before 13 without being told, and as image_reward does.
        for size in ((self.resize, picture.height), (self.resize, self.resize)):
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        return picture

    @cached_property
    def _package(self) -> Any:
        # On import it turns off every warning of the whole program.
        with warnings.catch_warnings():
            try:
                return importlib.import_module("ImageReward")
            # With a newer transformers or torchvision it fails in many ways.
            except Exception as error:
                raise _unusable("does not import", error) from error


def _unusable(what: str, error: Exception) -> RewardError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return RewardError(f"package image-reward {what}: {reason}: use reward=image_reward")
