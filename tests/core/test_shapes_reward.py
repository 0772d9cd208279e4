"""The shapes reward: clean renders score high, each way of being wrong scores lower."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from crdiff_core.errors import RewardError
from crdiff_core.rewards.shapes import ShapesReward
from crdiff_core.shapes import grammar
from crdiff_core.shapes.grammar import Placement, Scene, Thing

SIZES = [
    (24, 24),
    (32, 32),
    (24, 40),
    (40, 24),
    (48, 24),
    (24, 48),
    (48, 48),
    (64, 64),
    (256, 192),
]
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    pool = grammar.scenes_of(held_out=True)
    ones = [scene for scene in pool if scene.place]
    twos = [scene for scene in pool if scene.relation]
    return ones[::10] + twos[::2]


def score(scenes, placements=None, size=(32, 32), captions=None) -> np.ndarray:
    rng = np.random.default_rng(0)
    placements = placements or [grammar.place(scene, rng) for scene in scenes]
    images = torch.from_numpy(grammar.draw(scenes, placements, *size))
    return np.array(ShapesReward()(images, captions or [scene.caption for scene in scenes]))


@pytest.mark.parametrize("size", SIZES)
def test_clean_renders_score_high_at_every_size(scenes, size):
    rewards = score(scenes, size=size)
    assert rewards.mean() > 0.99
    assert rewards.min() > 0.95


def test_other_captions_score_low(scenes):
    captions = [scene.caption for scene in scenes]
    rewards = score(scenes, captions=captions[7:] + captions[:7])
    assert rewards.mean() < 0.4


def placed(scenes) -> list[Placement]:
    rng = np.random.default_rng(0)
    return [grammar.place(scene, rng) for scene in scenes]


def change(scene: Scene, k: int = 0, **changes: str) -> Scene:
    things = list(scene.things)
    things[k] = replace(things[k], **changes)
    return replace(scene, things=tuple(things))


def other(values, *taken):
    return next(value for value in values if value not in taken)


def missing(scene, spot):
    last = len(scene.things) - 1
    return replace(scene, things=scene.things[:last]), Placement(
        spot.x[:last], spot.y[:last], spot.radius[:last]
    )


def wrong_colour(scene, spot):
    taken = [thing.colour for thing in scene.things]
    return change(scene, colour=other(grammar.COLOURS, *taken)), spot


def wrong_shape(scene, spot):
    taken = [thing.shape for thing in scene.things]
    return change(scene, shape=other(grammar.SHAPES, *taken)), spot


def wrong_background(scene, spot):
    return replace(scene, background=other(grammar.BACKGROUNDS, scene.background)), spot


def wrong_layout(scene, spot):
    """Pairs only lie the other way; one thing moves to the opposite side (or off the middle)."""
    if scene.relation:
        return scene, replace(spot, x=spot.y, y=spot.x)
    away = [1 - at if abs(at - 0.5) > 0.1 else 0.24 for at in (*spot.x, *spot.y)]
    return scene, replace(spot, x=(away[0],), y=(away[1],))


def wrong_size(scene, spot):
    if scene.relation:
        return wrong_layout(scene, spot)
    radius = 0.26 if scene.size == "small" else 0.13
    inside = [min(max(at, 0.36), 0.64) for at in (*spot.x, *spot.y)]
    return scene, Placement((inside[0],), (inside[1],), (radius,))


def extra(scene, spot):
    colour = other(grammar.COLOURS, *[thing.colour for thing in scene.things])
    return add(scene, spot, Thing(colour, "circle"))


def duplicated(scene, spot):
    return add(scene, spot, scene.things[0])


def add(scene, spot, thing):
    # In the corner farthest from what is there.
    corners = [(x, y) for x in (0.13, 0.87) for y in (0.13, 0.87)]
    x, y = max(
        corners,
        key=lambda corner: min(
            np.hypot(corner[0] - x, corner[1] - y) for x, y in zip(spot.x, spot.y, strict=True)
        ),
    )
    return replace(scene, things=(*scene.things, thing)), Placement(
        (*spot.x, x), (*spot.y, y), (*spot.radius, 0.11)
    )


@pytest.mark.parametrize(
    "fault",
    [
        missing,
        wrong_colour,
        wrong_shape,
        wrong_background,
        wrong_layout,
        wrong_size,
        extra,
        duplicated,
    ],
    ids=lambda fault: fault.__name__,
)
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (48, 48)])
def test_each_fault_scores_lower(scenes, fault, size):
    spots = placed(scenes)
    captions = [scene.caption for scene in scenes]
    clean = score(scenes, spots, size, captions)
    broken = [fault(scene, spot) for scene, spot in zip(scenes, spots, strict=True)]
    worse = score([scene for scene, _ in broken], [spot for _, spot in broken], size, captions)
    assert (worse < clean - 0.04).all(), [
        captions[i] for i in np.flatnonzero(worse >= clean - 0.04)
    ]


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (48, 48)])
def test_blank_and_noise_score_lowest(scenes, size):
    captions = [scene.caption for scene in scenes]
    noise = torch.rand(len(scenes), 3, *size, generator=torch.Generator().manual_seed(0))
    rewards = ShapesReward()(noise, captions)
    assert max(rewards) < 0.6  # By chance a few pixels make a thing of the right colour.
    assert sum(rewards) / len(rewards) < 0.05
    for level in (0.0, 0.5, 1.0):
        assert max(ShapesReward()(torch.full_like(noise, level), captions)) < 0.3


def test_a_pictures_score_does_not_depend_on_its_batch(scenes):
    images = torch.from_numpy(grammar.pictures(scenes[:12], 0, 32, 32))
    captions = [scene.caption for scene in scenes[:12]]
    together = ShapesReward()(images, captions)
    alone = [ShapesReward()(images[i : i + 1], captions[i : i + 1])[0] for i in range(12)]
    assert together == pytest.approx(alone, abs=1e-6)


def test_other_dtypes_and_an_empty_batch(scenes):
    images = torch.from_numpy(grammar.pictures(scenes[:4], 0, 32, 32))
    captions = [scene.caption for scene in scenes[:4]]
    full = ShapesReward()(images, captions)
    assert ShapesReward()(images.half(), captions) == pytest.approx(full, abs=0.02)
    assert ShapesReward()(images[:0], []) == []


def test_a_caption_outside_the_grammar_is_one_clear_line():
    with pytest.raises(RewardError, match=r"'a cat' is outside the shapes grammar") as error:
        ShapesReward()(torch.zeros(1, 3, 32, 32), ["a cat"])
    assert "\n" not in str(error.value)


def test_pictures_that_do_not_fit_the_prompts_are_refused():
    with pytest.raises(RewardError, match=r"shape \(2, 3, 32, 32\) for 1 prompts"):
        ShapesReward()(torch.zeros(2, 3, 32, 32), ["a cat"])


def test_it_takes_milliseconds(scenes):
    images = torch.from_numpy(grammar.pictures(scenes[:16], 0, 40, 24))
    captions = [scene.caption for scene in scenes[:16]]
    reward = ShapesReward()
    reward(images, captions)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        reward(images, captions)
        took.append(time.perf_counter() - start)
    assert min(took) / 16 < 0.005
