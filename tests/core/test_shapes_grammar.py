"""The caption grammar: captions, parsing and drawing."""

import numpy as np
import pytest

from crdiff_core.errors import PromptError
from crdiff_core.shapes import grammar


def test_captions_are_distinct_and_fixed_by_the_seed():
    captions = grammar.captions(700, seed=3)
    assert len(set(captions)) == 700
    assert captions == grammar.captions(700, seed=3)
    assert captions != grammar.captions(700, seed=4)


def test_a_longer_list_begins_with_the_shorter_one():
    assert grammar.captions(200, seed=0)[:50] == grammar.captions(50, seed=0)


def test_captions_are_never_those_trained_on():
    trained = {scene.caption for scene in grammar.scenes_of(held_out=False)}
    held_out = {scene.caption for scene in grammar.scenes_of(held_out=True)}
    assert not trained & held_out
    assert len(trained) + len(held_out) == len(grammar.scenes())
    assert set(grammar.captions(len(held_out), seed=1)) == held_out
    # The split is by hash, so it is the same in every release.
    assert len(held_out) == 732


def test_more_captions_than_there_are_is_one_clear_line():
    with pytest.raises(PromptError, match=r"5000 captions asked for.*has 732") as error:
        grammar.captions(5000, seed=0)
    assert "\n" not in str(error.value)


def test_every_caption_parses_to_its_scene():
    for scene in grammar.scenes():
        assert grammar.parse(scene.caption) == scene


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "a red circle on a white background",
        "a big pink circle in the middle on a white background",
        "two red circles on a white background",
        "two red circle stacked on a white background",
        "a big red circle in the middle on a white background.",
    ],
)
def test_a_caption_outside_the_grammar_is_refused(caption):
    with pytest.raises(PromptError, match="outside the shapes grammar"):
        grammar.parse(caption)


@pytest.mark.parametrize("shape", grammar.SHAPES)
def test_coverage_has_the_area_and_centroid_of_the_shape(shape):
    x, y, radius = (np.array([value], np.float32) for value in (31.3, 33.8, 14.0))
    alpha = grammar.coverage(shape, x, y, radius, 64, 72)[0]
    assert alpha.min() == 0
    assert alpha.max() == 1
    assert alpha.sum() == pytest.approx(grammar.AREAS[shape] * 14**2, rel=0.01)
    rows, columns = np.indices(alpha.shape) + 0.5
    assert (alpha * columns).sum() / alpha.sum() == pytest.approx(31.3, abs=0.05)
    assert (alpha * rows).sum() / alpha.sum() == pytest.approx(33.8, abs=0.15)


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (48, 24), (40, 24), (96, 64)])
def test_pictures_hold_whole_things_that_do_not_touch(size):
    scenes = [grammar.parse(caption) for caption in grammar.captions(200, seed=5)]
    rng = np.random.default_rng(0)
    side = min(size)
    for scene in scenes:
        spot = grammar.place(scene, rng)
        masks = [
            grammar.coverage(
                thing.shape,
                np.array([spot.x[k] * size[1]], np.float32),
                np.array([spot.y[k] * size[0]], np.float32),
                np.array([spot.radius[k] * side], np.float32),
                *size,
            )[0]
            for k, thing in enumerate(scene.things)
        ]
        for mask in masks:
            border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
            assert border.max() < 0.75, scene.caption
        if len(masks) == 2:
            assert np.minimum(*masks).max() < 0.5, scene.caption


def test_pictures_are_fixed_by_the_seed():
    scenes = [grammar.parse(caption) for caption in grammar.captions(8, seed=5)]
    first, again, other = (grammar.pictures(scenes, seed, 32, 32) for seed in (1, 1, 2))
    assert first.shape == (8, 3, 32, 32)
    assert first.dtype == np.float32
    assert (first == again).all()
    assert (first != other).any()
    assert first.min() >= 0
    assert first.max() <= 1
