"""A warm but naive loop: two plain pipelines loaded once, then prompt by prompt."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crdiff_core.prompts import Prompt
from crdiff_core.ratios import GROUPS, BlockRatios, Resolution
from crdiff_core.rewards import Reward
from tests.benchmarks.reference_way import draw_with_poa, group_weights, prune_in_place


class NaiveLoop:
    """What one writes first: load once, prune as the reference does, draw one at a time.

    Every trial copies the dense weights and prunes them by kthvalue; every picture encodes its
    text, and calls both UNets at each step.
    """

    def __init__(
        self,
        pipe: Any,
        resolution: Resolution,
        *,
        num_steps: int,
        guidance_scale: float,
        poa_weight: float,
    ) -> None:
        self._dense, self._pruned = pipe, copy.deepcopy(pipe)
        self._resolution = resolution
        self._poa_weight = poa_weight
        self.num_steps = num_steps
        self._guidance_scale = guidance_scale

    @torch.no_grad()
    def prune(self, ratios: BlockRatios) -> None:
        for group in GROUPS:
            weights = group_weights(self._pruned.unet, group)
            for dense, pruned in zip(group_weights(self._dense.unet, group), weights, strict=True):
                pruned.copy_(dense)
            prune_in_place(weights, ratios[group])

    def draw(self, prompt: Prompt) -> Tensor:
        """(1, 3, H, W) in [0, 1]."""
        unet, factor = self._dense.unet, self._dense.vae_scale_factor
        height, width = self._resolution.height, self._resolution.width
        noise = torch.randn(
            (1, unet.config.in_channels, height // factor, width // factor),
            generator=torch.Generator().manual_seed(prompt.seed),
        )
        pictures: Tensor = draw_with_poa(
            self._dense,
            self._pruned,
            self._poa_weight,
            prompt=prompt.text,
            latents=noise.to(unet.device, unet.dtype),
            height=height,
            width=width,
            num_inference_steps=self.num_steps,
            guidance_scale=self._guidance_scale,
            output_type="pt",
        ).images
        return pictures

    def trial(self, ratios: BlockRatios, prompts: Sequence[Prompt], reward: Reward) -> list[float]:
        self.prune(ratios)
        return [reward(self.draw(prompt), [prompt.text])[0] for prompt in prompts]
