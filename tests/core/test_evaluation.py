"""Evaluation: one reward for each prompt, in order, the same each time; never a false score."""

from __future__ import annotations

import io
import math
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from crdiff_core.errors import ModelError, RenderError, RewardError
from crdiff_core.evaluation import encoded, evaluate, resized
from crdiff_core.models import Model
from crdiff_core.prompts import Prompt
from crdiff_core.ratios import GROUPS, BlockRatios, Resolution
from crdiff_core.replica import Replica
from crdiff_core.rewards import load_reward
from crdiff_core.shapes.grammar import captions
from tests.core.conftest import CPU

# Diffusers' scheduler calls np.array on a tensor, which torch has not yet adapted to numpy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

PROMPTS = [Prompt(f"a {name}", name, seed) for seed, name in enumerate(["cat", "dog", "fox"])]
RATIOS = BlockRatios(0.4, 0.6, 0.5)


class Brightness:
    """A reward that any picture has."""

    name = "brightness"
    version = "1"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        assert len(images) == len(prompts)
        return [float(image.mean()) for image in images]


class Fixed(Brightness):
    """Says what it is told to."""

    def __init__(self, *rewards: float) -> None:
        self.rewards = list(rewards)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        return self.rewards


@pytest.fixture(scope="module")
def replica(sd_folder: Path) -> Replica:
    return Replica(
        Model("small", str(sd_folder)).load(CPU),
        Resolution(16, 16),
        num_steps=2,
        guidance_scale=3.0,
        poa_weight=1.5,
    )


def test_each_prompt_gets_its_pictures_reward_in_order(replica):
    rewards = evaluate(replica, RATIOS, PROMPTS, Brightness()).rewards
    replica.set_ratios(RATIOS)
    images = replica.render(PROMPTS)
    assert rewards == tuple(float(image.mean()) for image in images)


def test_an_evaluation_is_the_same_whatever_was_evaluated_before(replica):
    first = evaluate(replica, RATIOS, PROMPTS, Brightness()).rewards
    other = evaluate(replica, BlockRatios(up=0.9), PROMPTS, Brightness()).rewards
    assert evaluate(replica, RATIOS, PROMPTS, Brightness()).rewards == first != other


def test_a_batch_of_three_gives_the_rewards_of_three_batches_of_one(replica):
    together = evaluate(replica, RATIOS, PROMPTS, Brightness()).rewards
    alone = [evaluate(replica, RATIOS, [each], Brightness()).rewards[0] for each in PROMPTS]
    assert together == pytest.approx(alone, abs=1e-5)


def test_ratios_of_zero_measure_the_dense_model(replica):
    rewards = evaluate(replica, BlockRatios(), PROMPTS, Brightness()).rewards
    with torch.no_grad():
        replica.denoiser.configure(RATIOS, 0.0)
        assert rewards == tuple(Brightness()(replica.render(PROMPTS), [""] * 3))


def test_the_measured_sparsity_is_the_ratios(replica):
    sparsity = evaluate(replica, RATIOS, PROMPTS[:1], Brightness()).sparsity
    assert sparsity == pytest.approx({group: RATIOS[group] for group in GROUPS}, abs=1e-3)


def test_each_stage_is_timed(replica):
    seconds = evaluate(replica, RATIOS, PROMPTS[:1], Brightness()).seconds
    assert list(seconds) == ["prune", "render", "score"]
    assert seconds["render"] > seconds["score"] >= 0


def test_the_shapes_reward_scores_what_a_model_draws(replica):
    prompt = Prompt(captions(1, seed=0)[0], "t", 0)
    (reward,) = evaluate(replica, RATIOS, [prompt], load_reward("shapes")).rewards
    assert 0 <= reward <= 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_an_error_and_no_score(replica, value):
    with pytest.raises(RewardError, match=r"^reward brightness of 'a dog' is .*: not a score"):
        evaluate(replica, RATIOS, PROMPTS, Fixed(0.5, value, 0.5))


@pytest.mark.parametrize("num", [0, 2, 4])
def test_a_reward_for_another_number_of_pictures_is_an_error(replica, num):
    with pytest.raises(ValueError, match=r"zip\(\) argument 2"):
        evaluate(replica, RATIOS, PROMPTS, Fixed(*[0.5] * num))


def test_a_broken_picture_is_an_error_and_no_score(replica):
    handle = replica.pipe.vae.decoder.register_forward_hook(
        lambda _, __, images: torch.full_like(images, math.nan)
    )
    with pytest.raises(RenderError, match="3 of 3 pictures are NaN"):
        evaluate(replica, RATIOS, PROMPTS, Brightness())
    handle.remove()


# --- pictures that are kept, and pictures of another size -------------------------------------


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def test_a_kept_picture_is_the_one_that_was_scored(replica):
    measured = evaluate(replica, RATIOS, PROMPTS, Brightness(), keep=[0, 2])
    assert sorted(measured.pictures) == [0, 2]
    for place, file in measured.pictures.items():
        picture = opened(file)
        assert (picture.format, picture.size) == ("PNG", (16, 16))
        mean = np.asarray(picture).mean() / 255
        assert mean == pytest.approx(measured.rewards[place], abs=0.5 / 255)


def test_no_picture_is_kept_unasked(replica):
    assert evaluate(replica, RATIOS, PROMPTS, Brightness()).pictures == {}


def test_a_large_picture_is_kept_as_a_jpeg_of_its_size():
    ramp = torch.linspace(0, 1, 136 * 256).reshape(1, 136, 256).expand(3, -1, -1)
    picture = opened(encoded(ramp))
    assert (picture.format, picture.size) == ("JPEG", (256, 136))
    assert np.asarray(picture).transpose(2, 0, 1) / 255 == pytest.approx(ramp.numpy(), abs=0.02)


def test_pictures_drawn_at_another_size_are_scored_at_the_replicas_own(replica):
    shapes = []

    class Looking(Brightness):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
            shapes.append(tuple(images.shape))
            return super().__call__(images, prompts)

    at = Resolution(32, 32)
    measured = evaluate(replica, BlockRatios(), PROMPTS, Looking(), drawn_at=at, keep=range(3))
    large = Replica(replica.pipe, at, num_steps=2, guidance_scale=3.0, poa_weight=1.5)
    drawn = resized(large.render(PROMPTS), Resolution(16, 16))
    assert shapes == [(3, 3, 16, 16)]
    assert measured.rewards == tuple(float(image.mean()) for image in drawn)
    assert opened(measured.pictures[0]).size == (16, 16)


def test_after_another_size_it_draws_its_own_as_before(replica):
    before = evaluate(replica, RATIOS, PROMPTS, Brightness()).rewards
    evaluate(replica, RATIOS, PROMPTS, Brightness(), drawn_at=Resolution(24, 40))
    assert evaluate(replica, RATIOS, PROMPTS, Brightness()).rewards == before
    with pytest.raises(ModelError, match="resolution 20x20 is not divisible by 8"):
        evaluate(replica, RATIOS, PROMPTS, Brightness(), drawn_at=Resolution(20, 20))
    assert evaluate(replica, RATIOS, PROMPTS, Brightness()).rewards == before


def test_resizing_is_pils_bicubic():
    images = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    (small,) = resized(images, Resolution(24, 40))
    picture = Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy())
    wanted = np.asarray(picture.resize((40, 24), Image.Resampling.BICUBIC)) / 255
    # PIL rounds and clips between its two passes.
    assert small.permute(1, 2, 0).numpy() == pytest.approx(wanted, abs=5 / 255)


def test_a_try_that_failed_counts_as_rendering(replica):
    class Late(Brightness):
        num_calls = 0

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
            self.num_calls += 1
            if self.num_calls == 1:
                time.sleep(0.5)
                return [math.nan] * len(images)
            return super().__call__(images, prompts)

    seconds = evaluate(replica, RATIOS, PROMPTS[:1], Late()).seconds
    assert seconds["render"] >= 0.5 > seconds["prune"] + seconds["score"]


def test_a_picture_that_cannot_be_encoded_costs_no_reward(replica, monkeypatch):
    def fail(image: Tensor) -> bytes:
        raise RuntimeError("no memory")

    monkeypatch.setattr("crdiff_core.evaluation.encoded", fail)
    measured = evaluate(replica, RATIOS, PROMPTS, Brightness(), keep=[0])
    assert (len(measured.rewards), measured.pictures) == (3, {})


class Broken:
    """Breaks what the decoder makes, as long as it is told to."""

    def __init__(self, is_due: Callable[[Tensor], bool], value: float) -> None:
        self.is_due, self.value = is_due, value
        self.sizes: list[int] = []

    def __call__(self, module: object, given: object, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return torch.full_like(images, self.value) if self.is_due(images) else images


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.3])
def test_pictures_that_are_broken_once_are_drawn_again_singly(replica, value):
    expected = evaluate(replica, RATIOS, PROMPTS, Brightness())
    broken = Broken(lambda images: len(images) == 3, value)
    handle = replica.pipe.vae.decoder.register_forward_hook(broken)
    measured = evaluate(replica, RATIOS, PROMPTS, Brightness())
    handle.remove()

    assert broken.sizes == [3, 1, 1, 1]
    assert measured.rewards == pytest.approx(expected.rewards, abs=1e-5)
    assert measured.batch_size == 1
    # Only this once.
    assert evaluate(replica, RATIOS, PROMPTS, Brightness()).batch_size == 3


def test_a_decoder_that_overflows_in_half_precision_decodes_in_single(sd_folder):
    half = Replica(
        Model("small", str(sd_folder), dtype="bfloat16").load(CPU),
        Resolution(16, 16),
        num_steps=2,
        guidance_scale=3.0,
        poa_weight=1.5,
    )
    overflow = Broken(lambda images: images.dtype != torch.float32, math.inf)
    half.pipe.vae.decoder.register_forward_hook(overflow)
    rewards = evaluate(half, RATIOS, PROMPTS[:2], Brightness()).rewards

    assert all(math.isfinite(reward) for reward in rewards)
    assert half.pipe.vae.dtype == torch.bfloat16


class OnceNotFinite(Brightness):
    """Fails the first time."""

    num_calls = 0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        self.num_calls += 1
        return (
            [math.nan] * len(images) if self.num_calls == 1 else super().__call__(images, prompts)
        )


class ShortOfMemory(Brightness):
    """Runs out of memory for more pictures than `at_most`; notes the sizes tried."""

    def __init__(self, at_most: int, error: Exception) -> None:
        self.at_most, self.error = at_most, error
        self.tried: list[int] = []

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        self.tried.append(len(images))
        if len(images) > self.at_most:
            raise self.error
        return super().__call__(images, prompts)


def wrapped() -> RewardError:
    error = RewardError("the weights do not load")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    return error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), wrapped()])
def test_too_little_memory_for_the_reward_scores_fewer_and_draws_nothing_again(replica, error):
    expected = evaluate(replica, RATIOS, PROMPTS, Brightness())
    reward = ShortOfMemory(1, error)
    drawn = []
    handle = replica.pipe.vae.decoder.register_forward_hook(
        lambda _, __, images: drawn.append(len(images))
    )
    measured = evaluate(replica, RATIOS, PROMPTS, reward)
    handle.remove()
    assert reward.tried == [3, 1, 1, 1]
    assert drawn == [3]
    assert (measured.rewards, measured.batch_size) == (expected.rewards, 3)
    # Digits may differ, so the ledger marks it; what comes later has the memory again.
    assert (expected.redrawn, measured.redrawn) == (False, True)
    assert not evaluate(replica, RATIOS, PROMPTS, Brightness()).redrawn


def test_a_picture_that_cannot_be_scored_alone_is_an_error_in_one_line(replica):
    reward = ShortOfMemory(0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RewardError, match="cannot score even one picture in the memory that the"):
        evaluate(replica, RATIOS, PROMPTS, reward)


def test_another_error_of_the_reward_is_not_taken_for_a_lack_of_memory(replica):
    reward = ShortOfMemory(0, ValueError("nonsense"))
    with pytest.raises(ValueError, match="nonsense"):
        evaluate(replica, RATIOS, PROMPTS, reward)
    assert reward.tried == [3]


def test_a_reward_that_is_not_finite_once_is_measured_again(replica):
    reward = OnceNotFinite()
    rewards = evaluate(replica, RATIOS, PROMPTS, reward).rewards

    assert rewards == pytest.approx(
        evaluate(replica, RATIOS, PROMPTS, Brightness()).rewards, abs=1e-5
    )
    assert reward.num_calls == 2


def test_the_pictures_of_a_try_that_failed_are_gone_before_the_next(replica):
    class Watching(OnceNotFinite):
        first: weakref.ref[Tensor]

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
            if self.num_calls == 0:
                self.first = weakref.ref(images)
            else:
                assert self.first() is None
            return super().__call__(images, prompts)

    reward = Watching()
    evaluate(replica, RATIOS, PROMPTS, reward)
    assert reward.num_calls == 2


def test_the_time_of_a_try_that_failed_counts(replica):
    class Slow(OnceNotFinite):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
            time.sleep(0.2)
            return super().__call__(images, prompts)

    assert sum(evaluate(replica, RATIOS, PROMPTS, Slow()).seconds.values()) >= 0.4


def test_an_unknown_reward_is_refused():
    with pytest.raises(RewardError, match="reward 'beauty' is unknown: choose one of"):
        load_reward("beauty")
