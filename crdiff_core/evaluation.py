"""Evaluation: (replica, ratios, prompts, reward) -> one reward for each prompt."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from crdiff_core.errors import RenderError, RewardError
from crdiff_core.prompts import Prompt
from crdiff_core.ratios import BlockRatios, Group
from crdiff_core.replica import Replica
from crdiff_core.rewards import Reward


@dataclass(frozen=True)
class Measurement:
    """What one prompt batch gave.

    rewards:    one for each prompt, finite.
    sparsity:   measured, by block group.
    seconds:    wall time of prune, render and score.
    batch_size: pictures drawn at once; fewer than the prompts if they did not fit into memory.
    """

    rewards: tuple[float, ...]
    sparsity: dict[Group, float]
    seconds: dict[str, float]
    batch_size: int


def evaluate(
    replica: Replica, ratios: BlockRatios, prompts: Sequence[Prompt], reward: Reward
) -> Measurement:
    """Prune, draw the prompts, as one batch if it fits, and score each picture.

    Where that ends in broken pictures or scores, or for want of memory, it is tried once more with
    `Replica.carefully`, at the cost of its speed.
    Raises RenderError for broken pictures, RewardError for a score that is not finite.
    Source: CR-Diff (arXiv:2604.05524), section 3.3: the objective of the search.
    """
    began = _now(replica.device)
    try:
        return _measure(replica, ratios, prompts, reward, began)
    except (RenderError, RewardError):
        pass  # Only after it does the exception let go of the pictures in its frames.
    with replica.carefully():
        return _measure(replica, ratios, prompts, reward, began)


def _measure(
    replica: Replica,
    ratios: BlockRatios,
    prompts: Sequence[Prompt],
    reward: Reward,
    began: float,
) -> Measurement:
    marks = [began]
    replica.set_ratios(ratios)
    marks.append(_now(replica.device))
    images = replica.render(prompts)
    marks.append(_now(replica.device))
    rewards = tuple(reward(images, [prompt.text for prompt in prompts]))
    marks.append(_now(replica.device))
    for prompt, value in zip(prompts, rewards, strict=True):
        if not math.isfinite(value):
            raise RewardError(f"reward {reward.name} of {prompt.text!r} is {value}: not a score")
    stages = ("prune", "render", "score")
    seconds = {stage: marks[i + 1] - marks[i] for i, stage in enumerate(stages)}
    batch_size = min(len(prompts), replica.batch_limit)
    return Measurement(rewards, replica.sparsity(), seconds, batch_size)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
