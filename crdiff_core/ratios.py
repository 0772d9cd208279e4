"""BlockRatios, the resolution they hold for, and the JSON file in which both travel."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shown
from typing import Any, Literal

from crdiff_core.errors import RatiosError

Group = Literal["down", "mid", "up"]
GROUPS: tuple[Group, ...] = ("down", "mid", "up")

_PREFIXES: dict[str, Group] = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}


def group_of(name: str) -> Group | None:
    """Return the block group that a layer of this qualified name is pruned with; None: never.

    Self-attention and feed-forward layers are: the name contains `attn` or `ff`, not `attn2`.
    A LoRA's layers, `lora_A`, `lora_B` and the like, are not: both passes need them whole.
    Source: CR-Diff (arXiv:2604.05524), section 3.3, and its reference implementation.
    """
    if "attn2" in name or ".lora_" in name or not ("attn" in name or "ff" in name):
        return None
    return _PREFIXES.get(name.partition(".")[0])


FAMILY_OF_TEXT_WIDTH = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
"""The paper's models by the channels of the text that their UNets attend to."""

DEFAULT_POA_WEIGHT = 1.5
"""k of equation 2; the paper's choice (section 4.5, table 5)."""

HIGHEST_POA_WEIGHT = 10.0
"""Ample: at 2.5 pictures are spoilt already (paper, table 5)."""

# The reference's scripts know the paper's models by these names, and load no others.
_REFERENCE_NAMES = {"sd15": "sd1.5", "sd21": "sd2.1"}


def check_poa_weight(value: float) -> float:
    """Return k of equation 2. Raises RatiosError unless it is in [0, 10]; NaN is not."""
    if not 0 <= value <= HIGHEST_POA_WEIGHT:
        raise RatiosError(
            f"poa_weight {shown(value)} is outside [0, {HIGHEST_POA_WEIGHT:g}]: give 1 for the "
            "pruned model alone, 1.5 as the paper does, or about that"
        )
    return float(value)


@dataclass(frozen=True)
class BlockRatios:
    """The fraction of weights to prune in each block group of a UNet.

    down, mid, up: in [0, 1); 0 leaves the group as it is.
    Raises RatiosError for anything else.
    Source: CR-Diff (arXiv:2604.05524), section 3.3.
    """

    down: float = 0.0
    mid: float = 0.0
    up: float = 0.0

    def __post_init__(self) -> None:
        for group in GROUPS:
            ratio = getattr(self, group)
            if isinstance(ratio, bool) or not isinstance(ratio, int | float):
                raise RatiosError(
                    f"{group} ratio {shown(ratio)} is not a number: give a fraction in [0, 1)"
                )
            if not 0 <= ratio < 1:
                raise RatiosError(
                    f"{group} ratio {shown(ratio)} is outside [0, 1): give the fraction of "
                    "weights to prune, such as 0.3"
                )
            object.__setattr__(self, group, float(ratio))

    def __getitem__(self, group: Group) -> float:
        value: float = getattr(self, group)
        return value

    def as_dict(self) -> dict[Group, float]:
        """Return the ratios by group, in the order down, mid, up."""
        return {group: self[group] for group in GROUPS}

    @property
    def is_dense(self) -> bool:
        """Whether nothing is pruned."""
        return all(self[group] == 0 for group in GROUPS)

    def __str__(self) -> str:
        return " / ".join(f"{self[group]:.3f}" for group in GROUPS)


@dataclass(frozen=True)
class Resolution:
    """A picture's size in pixels; height comes first everywhere, as in the paper."""

    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Resolution:
        """Read `HEIGHTxWIDTH`, such as `480x360` (480 high). Raises RatiosError."""
        match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", str(text).strip())
        if match is None:
            raise RatiosError(f"resolution {shown(text)} is not HEIGHTxWIDTH: write it as 480x360")
        return cls(int(match[1]), int(match[2]))

    def scaled_to(self, other: Resolution, multiple: int = 8) -> Resolution:
        """Return the size of the same shape as this one, and about the area of the other."""
        scale = (other.height * other.width / (self.height * self.width)) ** 0.5
        height, width = (
            max(1, round(size * scale / multiple)) * multiple for size in (self.height, self.width)
        )
        return Resolution(height, width)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


@dataclass(frozen=True)
class RatiosFile:
    """What an exported file of best ratios says.

    model:          the model's name, such as `sdxl`; the paper's are sdxl, sd15 and sd21, however
                    a file spells them.
    resolution:     the one that the ratios were searched at.
    score:          mean reward that the search found for them.
    ratios:         the best ratios.
    poa_weight:     k of equation 2 that they were searched with, in [0, 10]; None in the
                    reference's files.
    provenance:     how they were found; empty in the reference's files.
    """

    model: str
    resolution: Resolution
    score: float
    ratios: BlockRatios
    poa_weight: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RatiosFile:
        """Read a file of ours or of the reference implementation. Raises RatiosError."""
        try:
            content = Path(path).read_bytes()
        except (OSError, ValueError) as error:  # Of a name with a NUL.
            reason = getattr(error, "strerror", None) or str(error)
            raise RatiosError(
                f"{path}: {reason}: give the path of an exported best_ratios.json"
            ) from error
        try:
            return cls._parse(json.loads(content))
        except RatiosError as error:
            raise RatiosError(f"{path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise RatiosError(f"{path}: not JSON ({error}): export it again") from error

    @classmethod
    def _parse(cls, raw: object) -> RatiosFile:
        config = _mapping(raw, "model_config")
        params = _mapping(raw, "best_global_params_ratio")
        expected = {f"{group}_ratio" for group in GROUPS}
        if set(params) != expected:
            raise RatiosError(
                f"best_global_params_ratio has the keys {shown(sorted(params))}: it needs exactly "
                f"{sorted(expected)}"
            )
        assert isinstance(raw, dict)
        height, width = config.get("height"), config.get("width")
        poa_weight = raw.get("poa_weight")
        score = raw.get("best_avg_score")
        if poa_weight is not None and not is_number(poa_weight):
            raise RatiosError(
                f"poa_weight {shown(poa_weight)} is not a number: the paper's is 1.5"
            )
        if not isinstance(score, int | float) or not is_number(score):
            raise RatiosError(
                f"best_avg_score {shown(score)} is not a number: export the file again"
            )
        method = raw.get("pruning_method", "ratio")
        if method != "ratio":
            raise RatiosError(
                f"pruning_method {shown(method)} is unknown: only 'ratio' is supported"
            )
        name = config.get("name", "")
        if not isinstance(name, str) or not name.isprintable():
            raise RatiosError(f"model_config.name {shown(name)} is not text: export it again")
        provenance = _mapping(raw, "provenance") if "provenance" in raw else {}
        try:
            json.dumps(provenance, allow_nan=False)
        except ValueError as error:  # Python reads NaN and infinity, which JSON has not.
            raise RatiosError(f"provenance: {error}: export the file again") from error
        return cls(
            model=_own_name(name),
            resolution=Resolution.parse(f"{height}x{width}"),
            score=score,
            ratios=BlockRatios(**{group: params[f"{group}_ratio"] for group in GROUPS}),
            poa_weight=None if poa_weight is None else check_poa_weight(poa_weight),
            provenance=provenance,
        )

    def as_json(self) -> str:
        """Return the file's text; the reference's scripts read it too (their keys first)."""
        raw = {
            "model_config": {
                "name": _REFERENCE_NAMES.get(self.model, self.model),
                "width": self.resolution.width,
                "height": self.resolution.height,
            },
            "best_avg_score": self.score,
            "best_global_params_ratio": {
                "down_ratio": self.ratios.down,
                "up_ratio": self.ratios.up,
                "mid_ratio": self.ratios.mid,
            },
            "pruning_method": "ratio",
            "poa_weight": DEFAULT_POA_WEIGHT if self.poa_weight is None else self.poa_weight,
            "provenance": dict(self.provenance),
        }
        return json.dumps(raw, indent=2, allow_nan=False) + "\n"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, atomically."""
        target = Path(path)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        draft.write_text(self.as_json(), encoding="utf-8")
        draft.replace(target)


def _mapping(raw: object, key: str) -> Mapping[str, Any]:
    value = raw.get(key) if isinstance(raw, dict) else None
    if not isinstance(value, dict):
        raise RatiosError(
            f"{key} is missing or not an object: a ratios file has model_config (name, width, "
            "height), best_avg_score and best_global_params_ratio (down_ratio, mid_ratio, "
            "up_ratio); give mere ratios by --down, --mid and --up, or as BlockRatios"
        )
    return value


def _own_name(name: str) -> str:
    """Return what we call one of the paper's models; other names as they are."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return plain if plain in FAMILY_OF_TEXT_WIDTH.values() else name


def is_number(value: object) -> bool:
    """Whether a value read from JSON is a number that a float can hold."""
    # The bound keeps NaN, infinities and integers too large for a float out.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )
