"""Reward of the shapes model: a detector that checks a picture's objects against its caption."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from crdiff_core.errors import PromptError, RewardError
from crdiff_core.shapes import grammar
from crdiff_core.shapes.grammar import AREAS, BACKGROUNDS, COLOURS, SHAPES, Scene

Array = NDArray[np.float32]

# What a perfect picture gets for each part; they sum to 1.
BACKGROUND, PRESENCE, SHAPE, LAYOUT, NO_EXTRA = 0.15, 0.25, 0.20, 0.20, 0.20

MIN_AREA = 0.012
"""Patches of colour below this share of the shorter side squared are specks, not objects."""

_PALETTE = np.array([*BACKGROUNDS.values(), *COLOURS.values()], np.float32) / np.float32(255)
_NUM_BACKGROUNDS = len(BACKGROUNDS)
_WORKING_SIDE = 64


@dataclass(frozen=True)
class Found:
    """One object in a picture.

    x, y:   centroid as a fraction of width and height.
    area:   pixels, as a share of the shorter side squared.
    fit:    for each shape, overlap (intersection over union) with a clean one of the same area.
    """

    colour: str
    x: float
    y: float
    area: float
    fit: dict[str, float]


class ShapesReward:
    """Share of what the caption says that the picture shows, in [0, 1].

    Parts: the background's colour .15; each thing present in its colour .25; in its shape .20; the
    size and place of one thing, or the relation of two, .20; nothing else in the picture .20 (as
    far as the things are present, so that a blank picture earns nothing for it).
    """

    name = "shapes"
    version = "1"

    def check(self, prompts: Sequence[str]) -> None:
        """Raise RewardError for a caption outside the grammar."""
        _scenes(prompts)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Score pictures of any size.

        images:  (N, 3, H, W), float in [0, 1], on any device.
        prompts: N captions of the grammar.
        Raises RewardError if a caption is outside the grammar or the shapes do not fit.
        """
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise RewardError(
                f"shapes reward got pictures of shape {tuple(images.shape)} for {len(prompts)} "
                f"prompts: give it (N, 3, H, W) and N prompts"
            )
        scenes = _scenes(prompts)
        if not scenes:
            return []
        images = images.detach().float().cpu()
        if (factor := min(images.shape[2:]) // _WORKING_SIDE) > 1:
            images = F.avg_pool2d(images, factor)
        pixels = np.nan_to_num(images.numpy()).clip(0, 1)
        classes = _classify(pixels)
        found = _find(pixels, classes)
        return [
            _score(scene, things, picture)
            for scene, things, picture in zip(scenes, found, classes, strict=True)
        ]


def _scenes(prompts: Sequence[str]) -> list[Scene]:
    try:
        return [grammar.parse(prompt) for prompt in prompts]
    except PromptError as error:
        raise RewardError(f"shapes reward: {error}") from error


def _classify(pixels: Array) -> NDArray[np.int64]:
    """Nearest palette entry of each pixel: (N, 3, H, W) -> (N, H, W), backgrounds first."""
    # |p - c|^2 without |p|^2, which is the same for every c.
    flat = np.moveaxis(pixels, 1, -1)
    distance = (_PALETTE**2).sum(1) - np.float32(2) * (flat @ _PALETTE.T)
    nearest: NDArray[np.int64] = distance.argmin(-1)
    return nearest


def _label(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Connected patches (4 neighbours) of one object colour; 0 is background.

    classes: (N, H, W). Returns (N, H, W) with a number unique over the batch for each patch.
    """
    label = np.arange(1, classes.size + 1).reshape(classes.shape)
    label[classes < _NUM_BACKGROUNDS] = 0
    down = (classes[:, 1:] == classes[:, :-1]) & (label[:, 1:] > 0)
    right = (classes[:, :, 1:] == classes[:, :, :-1]) & (label[:, :, 1:] > 0)
    parent = np.arange(classes.size + 1)
    # The largest number floods its patch; following each number to the one that flooded it
    # (pointer jumping) makes the rounds logarithmic in the patch's extent.
    while True:
        before = label.copy()
        for ahead, behind, joined in (
            (label[:, 1:], label[:, :-1], down),
            (label[:, :, 1:], label[:, :, :-1], right),
        ):
            top = np.where(joined, np.maximum(ahead, behind), 0)
            np.maximum(ahead, top, out=ahead)
            np.maximum(behind, top, out=behind)
        parent[1:] = label.ravel()
        label[:] = parent[parent[label]]
        if (label == before).all():
            return label


def _find(pixels: Array, classes: NDArray[np.int64]) -> list[list[Found]]:
    """Objects of each picture, largest first."""
    num, height, width = classes.shape
    side = min(height, width)
    label = _label(classes)
    ids, counts = np.unique(label, return_counts=True)
    # The blended rim between two colours can look like a third: an object has an inside.
    ids = ids[(ids > 0) & (counts >= MIN_AREA * side * side) & np.isin(ids, label[_inside(label)])]
    found: list[list[Found]] = [[] for _ in range(num)]
    if not len(ids):
        return found
    owner = (ids - 1) // (height * width)
    mask = label[owner] == ids[:, None, None]
    colour = np.array([classes[i][m][0] for i, m in zip(owner, mask, strict=True)])

    # How much of a pixel is the object: its place on the line from background to object colour.
    near = _dilate(mask)
    histogram = np.stack([(classes == k).sum((1, 2)) for k in range(_NUM_BACKGROUNDS)], 1)
    behind = _PALETTE[histogram.argmax(1)][owner]
    line = _PALETTE[colour] - behind
    offset = pixels[owner] - behind[:, :, None, None]
    alpha = np.einsum("nchw,nc->nhw", offset, line) / (line**2).sum(1)[:, None, None]
    alpha = np.where(near, alpha.clip(0, 1), 0).astype(np.float32)

    area = np.maximum(alpha.sum((1, 2)), np.float32(1e-6))
    x = (alpha.sum(1) @ (np.arange(width, dtype=np.float32) + np.float32(0.5))) / area
    y = (alpha.sum(2) @ (np.arange(height, dtype=np.float32) + np.float32(0.5))) / area
    fit = {}
    for shape in SHAPES:
        radius = np.sqrt(area / np.float32(AREAS[shape]))
        clean = grammar.coverage(shape, x, y, radius, height, width)
        fit[shape] = np.minimum(alpha, clean).sum((1, 2)) / np.maximum(alpha, clean).sum((1, 2))
    names = list(COLOURS)
    for k in np.argsort(-area, kind="stable"):
        found[owner[k]].append(
            Found(
                colour=names[colour[k] - _NUM_BACKGROUNDS],
                x=float(x[k]) / width,
                y=float(y[k]) / height,
                area=float(area[k]) / side**2,
                fit={shape: float(fit[shape][k]) for shape in SHAPES},
            )
        )
    return found


def _inside(label: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Pixels whose 4 neighbours bear their own label."""
    inside = np.zeros(label.shape, bool)
    core = label[:, 1:-1, 1:-1]
    inside[:, 1:-1, 1:-1] = (
        (core == label[:, :-2, 1:-1])
        & (core == label[:, 2:, 1:-1])
        & (core == label[:, 1:-1, :-2])
        & (core == label[:, 1:-1, 2:])
    )
    return inside


def _dilate(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Grow (N, H, W) masks by one pixel each way."""
    out = mask.copy()
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    tall = out.copy()
    out[:, :, 1:] |= tall[:, :, :-1]
    out[:, :, :-1] |= tall[:, :, 1:]
    return out


def _ramp(value: float, low: float, high: float) -> float:
    """0 at `low`, 1 at `high`, linear between; `low` may be the larger."""
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _shape_credit(thing: Found, shape: str) -> float:
    """1 for a good fit of the right shape, half at most if another shape fits better."""
    fit = thing.fit[shape]
    best = max(thing.fit.values())
    return _ramp(fit, 0.5, 0.75) * _ramp(best - fit, 0.08, 0.0)


def _score(scene: Scene, found: list[Found], classes: NDArray[np.int64]) -> float:
    """Reward of one picture from its objects and its (H, W) pixel classes."""
    wanted = scene.things
    matched: tuple[Found | None, ...] = (None,) * len(wanted)
    best = -1.0
    for choice in itertools.permutations([*found[:8], *[None] * len(wanted)], len(wanted)):
        value = sum(
            1 + _shape_credit(got, thing.shape)
            for got, thing in zip(choice, wanted, strict=True)
            if got is not None and got.colour == thing.colour
        )
        right = all(
            got is None or got.colour == thing.colour
            for got, thing in zip(choice, wanted, strict=True)
        )
        if right and value > best:
            best, matched = value, choice
    here = [got for got in matched if got is not None]
    presence = len(here) / len(wanted)
    shape = sum(
        _shape_credit(got, thing.shape)
        for got, thing in zip(matched, wanted, strict=True)
        if got is not None
    ) / len(wanted)
    layout = _layout(scene, matched)
    extra = 1 / (1 + len(found) - len(here))
    backdrop = classes[classes < _NUM_BACKGROUNDS]
    share = (backdrop == list(BACKGROUNDS).index(scene.background)).sum() / max(backdrop.size, 1)
    return (
        BACKGROUND * _ramp(float(share), 0.4, 0.85)
        + PRESENCE * presence
        + SHAPE * shape
        + LAYOUT * layout
        + NO_EXTRA * presence * extra
    )


def _layout(scene: Scene, matched: Sequence[Found | None]) -> float:
    """Credit for size and place of one thing (half each), or for the relation of two."""
    if scene.place:
        if (got := matched[0]) is None:
            return 0.0
        radius = float(np.sqrt(got.area / AREAS[scene.things[0].shape]))
        low, high = (0.22, 0.18) if scene.size == "small" else (0.15, 0.19)
        away = max(
            abs(at - (0.28, 0.5, 0.72)[third])
            for at, third in zip((got.x, got.y), grammar.PLACES[scene.place], strict=True)
        )
        return 0.5 * _ramp(radius, low, high) + 0.5 * _ramp(away, 0.18, 0.1)
    first, second = matched
    if first is None or second is None:
        return 0.0
    along, aside = abs(second.x - first.x), abs(second.y - first.y)
    if scene.relation == "stacked":
        along, aside = aside, along
    return _ramp(along - aside, 0.0, 0.2)
