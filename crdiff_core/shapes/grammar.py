"""Caption grammar of the shapes model: captions by seed, caption -> scene -> picture."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from crdiff_core.errors import PromptError

Array = NDArray[np.float32]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (160, 60, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 240),
    "grey": (128, 128, 128),
    "black": (16, 16, 16),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "big")
PLURALS = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}
# Where one thing is: words, and the thirds of the frame they mean (x, y; 0 is left or top).
PLACES = {
    "in the top left": (0, 0),
    "at the top": (1, 0),
    "in the top right": (2, 0),
    "on the left": (0, 1),
    "in the middle": (1, 1),
    "on the right": (2, 1),
    "in the bottom left": (0, 2),
    "at the bottom": (1, 2),
    "in the bottom right": (2, 2),
}
RELATIONS = ("side by side", "stacked")

HELD_OUT = 0.6
"""Share of the captions that training never sees; each of their words it does."""

# Radius as a fraction of the frame's shorter side. Pairs use `None`.
RADII: dict[str | None, tuple[float, float]] = {
    "small": (0.12, 0.15),
    "big": (0.23, 0.26),
    None: (0.165, 0.19),
}
# Area of a shape of radius 1.
AREAS = {"circle": np.pi, "square": 4 * 0.9**2, "triangle": 2.4, "cross": 8 * 0.37 - 4 * 0.37**2}


@dataclass(frozen=True)
class Thing:
    """One object a caption asks for."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What a caption means: one thing of a size in a place, or two of a kind in a relation.

    things: one, with `size` and `place`, or two, with `relation`; what is not said is None.
    """

    things: tuple[Thing, ...]
    background: str
    size: str | None = None
    place: str | None = None
    relation: str | None = None

    @property
    def caption(self) -> str:
        """The scene in words; `parse` is the inverse."""
        thing = self.things[0]
        ground = f"on a {self.background} background"
        if self.relation:
            return f"two {thing.colour} {PLURALS[thing.shape]} {self.relation} {ground}"
        return f"a {self.size} {thing.colour} {thing.shape} {self.place} {ground}"


@dataclass(frozen=True)
class Placement:
    """Where things are: relative to the frame, so that it fits every size and aspect.

    x, y:   centres, in [0, 1], one for each thing.
    radius: fractions of the frame's shorter side.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    radius: tuple[float, ...]


@cache
def _scenes_by_caption() -> dict[str, Scene]:
    things = [Thing(*pair) for pair in itertools.product(COLOURS, SHAPES)]
    ones = itertools.product(things, BACKGROUNDS, SIZES, PLACES)
    twos = itertools.product(things, BACKGROUNDS, RELATIONS)
    scenes = [Scene((thing,), ground, size, place) for thing, ground, size, place in ones]
    scenes += [Scene((thing, thing), ground, relation=how) for thing, ground, how in twos]
    return {scene.caption: scene for scene in scenes}


def scenes() -> tuple[Scene, ...]:
    """Every scene of the grammar (1080 of one thing, 120 of two), in a fixed order."""
    return tuple(_scenes_by_caption().values())


def parse(caption: str) -> Scene:
    """Read a caption.

    Raises PromptError if it is outside the grammar.
    """
    scene = _scenes_by_caption().get(caption)
    if scene is None:
        raise PromptError(
            f"caption {caption!r} is outside the shapes grammar: write it like "
            "'a small red circle in the top left on a white background' or 'two blue crosses side "
            "by side on a grey background'"
        )
    return scene


@cache
def scenes_of(held_out: bool) -> tuple[Scene, ...]:
    """The scenes held out of training, or those trained on; told apart by the caption's hash."""

    def is_held_out(scene: Scene) -> bool:
        digest = hashlib.sha256(scene.caption.encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32

    return tuple(scene for scene in scenes() if is_held_out(scene) == held_out)


def captions(num: int, seed: int) -> list[str]:
    """Distinct captions the shipped model has never seen, in an order fixed by the seed.

    A longer list with the same seed begins with the shorter one. One in ten is of two things.
    Raises PromptError if the held-out part of the grammar has fewer than `num`.
    """
    pool = scenes_of(held_out=True)
    if not 0 <= num <= len(pool):
        raise PromptError(
            f"{num} captions asked for, the held-out part of the shapes grammar has {len(pool)}: "
            f"ask for at most that many"
        )
    order = np.random.default_rng(seed).permutation(len(pool))
    return [pool[i].caption for i in order[:num]]


def place(scene: Scene, rng: np.random.Generator) -> Placement:
    """Draw where the scene's things are; two things never touch on frames up to 1:2."""
    radius = tuple(float(rng.uniform(*RADII[scene.size])) for _ in scene.things)
    if scene.place:
        # Middle thirds jitter; outer ones keep the whole thing inside (4/3: a triangle's top).
        edge = max(4 / 3 * radius[0] + 0.02, 0.22)
        near = {0: (edge, edge + 0.04), 1: (0.46, 0.54), 2: (0.96 - edge, 1 - edge)}
        x, y = (float(rng.uniform(*near[third])) for third in PLACES[scene.place])
        return Placement((x,), (y,), radius)
    along = (float(rng.uniform(0.24, 0.26)), float(rng.uniform(0.74, 0.76)))
    middle = float(rng.uniform(0.4, 0.6))
    across = (middle, middle + float(rng.uniform(-0.05, 0.05)))
    if scene.relation == "side by side":
        return Placement(along, across, radius)
    return Placement(across, along, radius)


def distance(shape: str, x: Array, y: Array) -> Array:
    """Signed distance to the outline of a shape of radius 1 at the origin, negative inside.

    x, y: any one shape, y downwards. Exact enough near the outline to antialias with.
    """
    if shape == "circle":
        circle: Array = np.sqrt(x * x + y * y) - np.float32(1)
        return circle
    x = np.abs(x)
    if shape == "square":
        return np.maximum(x, np.abs(y)) - np.float32(0.9)
    if shape == "triangle":
        # Corners (0, -4/3) and (+-1.2, 2/3), so that the centroid is the origin.
        side = (np.float32(2) * x - np.float32(1.2) * (y + np.float32(4 / 3))) / np.float32(
            np.hypot(2, 1.2)
        )
        triangle: Array = np.maximum(side, y - np.float32(2 / 3))
        return triangle
    y = np.abs(y)
    long, short = np.maximum(x, y), np.minimum(x, y)
    cross: Array = np.maximum(long - np.float32(1), short - np.float32(0.37))
    return cross


def coverage(shape: str, x: Array, y: Array, radius: Array, height: int, width: int) -> Array:
    """How much of each pixel N shapes of one kind cover, antialiased.

    x, y, radius: (N,), in pixels. Returns (N, height, width) in [0, 1].
    """
    scale = radius[:, None, None]
    grid_x = (np.arange(width, dtype=np.float32) + np.float32(0.5))[None, None, :]
    grid_y = (np.arange(height, dtype=np.float32) + np.float32(0.5))[None, :, None]
    across, down = np.broadcast_arrays(
        (grid_x - x[:, None, None]) / scale, (grid_y - y[:, None, None]) / scale
    )
    covered: Array = np.float32(0.5) - distance(shape, across, down) * scale
    return covered.clip(0, 1)


def draw(
    scenes: Sequence[Scene], placements: Sequence[Placement], height: int, width: int
) -> Array:
    """Draw clean pictures.

    Returns (N, 3, height, width), float32 in [0, 1].
    """
    side = min(height, width)
    images = np.empty((len(scenes), 3, height, width), np.float32)
    images[:] = np.array([BACKGROUNDS[scene.background] for scene in scenes])[:, :, None, None]
    layers: dict[tuple[int, str], list[int]] = {}
    for i, scene in enumerate(scenes):
        for k, thing in enumerate(scene.things):
            layers.setdefault((k, thing.shape), []).append(i)
    for (k, shape), rows in layers.items():
        spots = [placements[i] for i in rows]
        x = np.array([spot.x[k] for spot in spots], np.float32) * width
        y = np.array([spot.y[k] for spot in spots], np.float32) * height
        radius = np.array([spot.radius[k] for spot in spots], np.float32) * side
        alpha = coverage(shape, x, y, radius, height, width)[:, None]
        colour = np.array([COLOURS[scenes[i].things[k].colour] for i in rows], np.float32)
        images[rows] += alpha * (colour[:, :, None, None] - images[rows])
    return images / np.float32(255)


def pictures(scenes: Sequence[Scene], seed: int, height: int, width: int) -> Array:
    """Draw each scene once, its placement drawn from the seed.

    Returns (N, 3, height, width), float32 in [0, 1].
    """
    rng = np.random.default_rng(seed)
    return draw(scenes, [place(scene, rng) for scene in scenes], height, width)
