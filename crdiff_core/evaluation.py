"""Evaluation: (replica, ratios, prompts, reward) -> one reward for each prompt."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from crdiff_core.errors import RenderError, RewardError, TooLittleMemoryError
from crdiff_core.prompts import Prompt
from crdiff_core.ratios import BlockRatios, Group, Resolution
from crdiff_core.replica import Replica
from crdiff_core.rewards import Reward

# Pixels of a picture in which JPEG's blocks would be seen.
_SMALL = 128 * 128


@dataclass(frozen=True)
class Measurement:
    """What one prompt batch gave.

    rewards:    one for each prompt, finite.
    sparsity:   measured, by block group.
    seconds:    wall time of prune, render and score.
    batch_size: pictures drawn at once; fewer than the prompts if they did not fit into memory.
    memory_gib: the GPU's peak, allocated by torch; None on a CPU.
    pictures:   those that were to be kept, by their place in the batch: files of PNG or JPEG.
    redrawn:    whether a first try had failed, or fewer pictures than usual were decoded or scored
                at once, so that its digits may differ.
    """

    rewards: tuple[float, ...]
    sparsity: dict[Group, float]
    seconds: dict[str, float]
    batch_size: int
    memory_gib: float | None = None
    pictures: dict[int, bytes] = field(default_factory=dict)
    redrawn: bool = False


def evaluate(
    replica: Replica,
    ratios: BlockRatios,
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    drawn_at: Resolution | None = None,
    keep: Collection[int] = (),
) -> Measurement:
    """Prune, draw the prompts, as one batch if it fits, and score each picture.

    drawn_at: a size to draw at; the pictures are then resized to the replica's own, and scored
              so. None: they are drawn at its own.
    keep:     places in the batch whose pictures are wanted.

    Where the memory does not suffice for the reward, fewer pictures are scored at once. Where
    pictures or scores are broken, or not even one picture fits, all is tried once more with
    `Replica.carefully`, at the cost of its speed.
    Raises RenderError for broken pictures, RewardError for a score that is not finite.
    Source: CR-Diff (arXiv:2604.05524), section 3.3: the objective of the search.
    """
    work = _Work(replica, ratios, prompts, reward, drawn_at, keep)
    began = _now(replica.device)
    try:
        return _measure(work, began)
    except (RenderError, RewardError):
        pass  # Only after it does the exception let go of the pictures in its frames.
    wasted_s = _now(replica.device) - began
    with replica.carefully():
        return replace(_measure(work, _now(replica.device), wasted_s), redrawn=True)


@dataclass(frozen=True)
class _Work:
    replica: Replica
    ratios: BlockRatios
    prompts: Sequence[Prompt]
    reward: Reward
    drawn_at: Resolution | None
    keep: Collection[int]


def _measure(work: _Work, began: float, wasted_s: float = 0.0) -> Measurement:
    """Measure once. wasted_s: what a try that failed before took, which was paid too."""
    replica, prompts, reward = work.replica, work.prompts, work.reward
    on_gpu = replica.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(replica.device)
    num_shortages = replica.num_shortages
    marks = [began]
    replica.set_ratios(work.ratios)
    marks.append(_now(replica.device))
    if work.drawn_at is None:
        images = replica.render(prompts)
    else:
        with replica.at(work.drawn_at):
            images = resized(replica.render(prompts), replica.own_resolution)
    marks.append(_now(replica.device))
    rewards = score(replica, reward, images, [prompt.text for prompt in prompts])
    marks.append(_now(replica.device))
    for prompt, value in zip(prompts, rewards, strict=True):
        if not math.isfinite(value):
            raise RewardError(f"reward {reward.name} of {prompt.text!r} is {value}: not a score")
    stages = ("prune", "render", "score")
    seconds = {stage: marks[i + 1] - marks[i] for i, stage in enumerate(stages)}
    seconds["render"] += wasted_s
    peak = torch.cuda.max_memory_allocated(replica.device) / (1 << 30) if on_gpu else None
    return Measurement(
        rewards,
        replica.sparsity(),
        seconds,
        batch_size=min(len(prompts), replica.batch_limit),
        memory_gib=peak,
        pictures=_kept(images, work.keep),
        redrawn=replica.num_shortages > num_shortages,
    )


def score(
    replica: Replica, reward: Reward, images: Tensor, texts: Sequence[str]
) -> tuple[float, ...]:
    """Score pictures against their prompts, fewer at once where the memory does not suffice.

    images: (N, 3, H, W), float32 in [0, 1].
    Raises RewardError if the memory does not suffice for one picture.
    """
    try:
        portions = replica.in_portions(
            lambda places: reward(images[places], texts[places]), len(images), at_once=len(images)
        )
    except TooLittleMemoryError:
        raise RewardError(
            f"reward {reward.name} cannot score even one picture in the memory that the model "
            f"leaves on {replica.device}: use a larger GPU or a half-precision model.dtype"
        ) from None
    return tuple(chain.from_iterable(portions))


def _kept(images: Tensor, places: Collection[int]) -> dict[int, bytes]:
    """Encode what is to be kept; none of it is worth the rewards that are there by now."""
    with suppress(RuntimeError, OSError, ValueError):
        return {place: encoded(images[place].cpu()) for place in sorted(places)}
    return {}


def resized(images: Tensor, size: Resolution) -> Tensor:
    """(N, 3, h, w) -> (N, 3, H, W), both in [0, 1]: bicubic, without aliases, as PIL would."""
    shape = (size.height, size.width)
    return interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)


def encoded(image: Tensor) -> bytes:
    """Return a picture's file: PNG where it is small, else JPEG, which takes a tenth of the time.

    image: (3, H, W), in [0, 1].
    """
    pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
    file = io.BytesIO()
    if image.shape[-2] * image.shape[-1] <= _SMALL:
        Image.fromarray(pixels).save(file, "PNG")
    else:
        Image.fromarray(pixels).save(file, "JPEG", quality=92, subsampling=0)
    return file.getvalue()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
