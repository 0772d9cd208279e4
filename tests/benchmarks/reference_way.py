"""The reference implementation's way, written by us from its description (FACTS, section 3).

`prune_in_place` and `draw_with_poa` are what it computes. Run as a program this file is one of
the three processes that it starts for every picture, one after the other:

    python -m tests.benchmarks.reference_way render|resize|score TASK

TASK is JSON. Each imports what it needs and no more. The reference's search scores pruned-only
pictures; ours scores POA, so `render` draws with POA, from the two pipelines that the reference
loads anyway.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

SCORED_SIDE = 256
_BLOCKS = {"down": "down_blocks.", "mid": "mid_block.", "up": "up_blocks."}


def prune_in_place(weights: Sequence[Tensor], ratio: float) -> None:
    """Concatenate the magnitudes, kthvalue, mask, multiply."""
    import torch

    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    threshold = magnitudes.kthvalue(int(ratio * magnitudes.numel())).values
    for weight in weights:
        mask = weight.abs() > threshold
        weight.mul_(mask)


def group_weights(unet: nn.Module, group: str) -> list[Tensor]:
    """The self-attention and feed-forward weights of a block group."""
    from torch import nn

    return [
        layer.weight.data
        for name, layer in unet.named_modules()
        if name.startswith(_BLOCKS[group])
        and isinstance(layer, nn.Linear | nn.Conv2d)
        and ("attn" in name or "ff" in name)
        and "attn2" not in name
    ]


def draw_with_poa(dense: Any, pruned: Any, poa_weight: float, **settings: Any) -> Any:
    """Draw with the pruned pipeline, calling both pipelines' UNets at each step.

    settings: of the pipelines' call. Returns its output.
    """
    pruned_forward = pruned.unet.forward

    def both(*args: Any, return_dict: bool = True, **kwargs: Any) -> tuple[Tensor]:
        dense_output = dense.unet(*args, return_dict=False, **kwargs)[0]
        pruned_output = pruned_forward(*args, return_dict=False, **kwargs)[0]
        return (poa_weight * pruned_output + (1 - poa_weight) * dense_output,)

    pruned.unet.forward = both
    try:
        return pruned(**settings)
    finally:
        del pruned.unet.forward


def render(task: dict[str, Any]) -> None:
    """Load, deep-copy, prune the copy, draw one picture, save it as PNG."""
    import copy

    import torch
    from diffusers import StableDiffusionPipeline

    dense = StableDiffusionPipeline.from_pretrained(
        task["model"], dtype=getattr(torch, task["dtype"]), local_files_only=True
    )
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        for group, ratio in task["ratios"].items():
            prune_in_place(group_weights(pruned.unet, group), ratio)
    picture = draw_with_poa(
        dense,
        pruned,
        task["poa_weight"],
        prompt=task["text"],
        height=task["height"],
        width=task["width"],
        num_inference_steps=task["num_steps"],
        guidance_scale=task["guidance_scale"],
        generator=torch.Generator().manual_seed(task["seed"]),
    ).images[0]
    picture.save(task["png"])


def resize(task: dict[str, Any]) -> None:
    """Resize a PNG to the side that is scored, bicubic."""
    from PIL import Image

    with Image.open(task["png"]) as picture:
        side = (SCORED_SIDE, SCORED_SIDE)
        picture.resize(side, Image.Resampling.BICUBIC).save(task["resized"])


def score(task: dict[str, Any]) -> None:
    """Load the reward, score a PNG and print the score."""
    import numpy as np
    import torch
    from PIL import Image

    from crdiff_core.rewards import load_reward

    reward = load_reward(task["reward"])
    with Image.open(task["resized"]) as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    print(json.dumps(reward(pixels[None] / 255, [task["text"]])[0]))


PROCESSES = {"render": render, "resize": resize, "score": score}

if __name__ == "__main__":
    PROCESSES[sys.argv[1]](json.loads(sys.argv[2]))
