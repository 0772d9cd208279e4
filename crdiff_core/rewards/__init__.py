"""Rewards: each scores rendered pictures against their prompts; one file per reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from crdiff_core.errors import RewardError

if TYPE_CHECKING:
    from torch import Tensor


class Reward(Protocol):
    """A deterministic score of pictures against their prompts; higher is better.

    name, version: part of the ledger's key; a change of the score is a new version.
    """

    name: str
    version: str

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Score each picture.

        images:  (N, 3, H, W), float32 in [0, 1], on any device.
        prompts: N texts.
        Returns N scores.
        """
        ...


# A name -> (module, class) table; a module is imported when its reward is asked for.
_REWARDS = {"shapes": ("crdiff_core.rewards.shapes", "ShapesReward")}


def load_reward(name: str) -> Reward:
    """Build the reward of that name. Raises RewardError if there is none."""
    if name not in _REWARDS:
        raise RewardError(f"reward {name!r} is unknown: choose one of {', '.join(_REWARDS)}")
    module, cls = _REWARDS[name]
    return cast(Callable[[], Reward], getattr(import_module(module), cls))()
