"""Rewards: each scores rendered pictures against their prompts; one file per reward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

from crdiff_core.errors import RewardError

if TYPE_CHECKING:
    from torch import Tensor


Resize = Literal[256, "none"]
"""What ImageReward sees: the whole picture squashed to 256x256 pixels, or its middle."""


class Reward(Protocol):
    """A deterministic score of pictures against their prompts; higher is better.

    name, version: part of the ledger's key; a change of the score is a new version.
    """

    @property
    def name(self) -> str:
        """What it is called in conf."""
        ...

    @property
    def version(self) -> str:
        """What tells its scores from those of other weights or code. Raises RewardError."""
        ...

    def check(self, prompts: Sequence[str]) -> None:
        """Raise RewardError for a prompt that it cannot score, before anything is drawn."""
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Score each picture.

        images:  (N, 3, H, W), float32 in [0, 1], on any device.
        prompts: N texts.
        Returns N scores.
        """
        ...


# A name -> (module, class) table; a module is imported when its reward is asked for.
_REWARDS = {
    "shapes": ("crdiff_core.rewards.shapes", "ShapesReward"),
    "image_reward": ("crdiff_core.rewards.image_reward", "ImageReward"),
    "image_reward_package": ("crdiff_core.rewards.image_reward_package", "ImageRewardPackage"),
}


def load_reward(name: str, **options: Any) -> Reward:
    """Build the reward of that name; it loads no weights before it scores.

    options: of the reward's class, as its docstring says.
    Raises RewardError if there is no such reward or it takes no such option.
    """
    if name not in _REWARDS:
        raise RewardError(f"reward {name!r} is unknown: choose one of {', '.join(_REWARDS)}")
    module, cls = _REWARDS[name]
    build = cast(Callable[..., Reward], getattr(import_module(module), cls))
    known = inspect.signature(build).parameters
    if unknown := [option for option in options if option not in known]:
        raise RewardError(
            f"reward {name} takes no {', '.join(unknown)}: "
            f"{'choose among ' + ', '.join(known) if known else 'it has no options'}"
        )
    return build(**options)


def checked_resize(value: Any) -> Resize:
    """Return the value. Raises RewardError unless it is one of Resize's."""
    if value not in get_args(Resize):
        raise RewardError(
            f"resize {shown(value)} is unknown: give 256, which squashes the picture as the "
            "reference does, or none, which crops it as the package does"
        )
    return cast(Resize, value)


def resize_suffix(resize: Resize) -> str:
    """Return what a reward's version says of it: nothing for none, as before it was a setting."""
    return "" if resize == "none" else f"-resize{resize}"
