"""A replica: what a picture depends on, what is cached, and what is refused."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crdiff_core.errors import ModelError, RenderError, RewardError
from crdiff_core.models import Model
from crdiff_core.prompts import Prompt
from crdiff_core.ratios import GROUPS, BlockRatios, Resolution
from crdiff_core.replica import Replica, choose_device, is_out_of_memory
from tests.core.conftest import CPU

# Diffusers' scheduler calls np.array on a tensor, which torch has not yet adapted to numpy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

CAT, DOG, FOX = Prompt("a cat", "t0", 11), Prompt("a dog", "t1", 12), Prompt("a fox", "t2", 13)
RATIOS = BlockRatios(0.4, 0.6, 0.5)


def load(
    folder: Path, resolution: str = "16x24", dtype: str = "float32", **changes: Any
) -> Replica:
    settings = {"num_steps": 2, "guidance_scale": 3.0, "poa_weight": 1.5, **changes}
    pipe = Model("small", str(folder), dtype).load(CPU)
    return Replica(pipe, Resolution.parse(resolution), **settings)


@pytest.fixture
def replica(folder: Path) -> Replica:
    """A replica of each kind of pipeline in turn."""
    return load(folder)


@pytest.fixture
def sd_replica(sd_folder: Path) -> Replica:
    return load(sd_folder)


@contextmanager
def first_samples(replica: Replica) -> Iterator[list[Tensor]]:
    """What each rendering gives the UNet at its first step, without its copy for guidance."""
    samples: list[Tensor] = []
    steps = 0

    def record(_: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal steps
        if steps % replica.num_steps == 0:
            samples.append(args[0].chunk(2)[0])
        steps += 1

    handle = replica.denoiser.register_forward_pre_hook(record)
    yield samples
    handle.remove()


# Pictures


def test_pictures_have_the_size_asked_for_and_lie_in_the_unit_range(replica):
    images = replica.render([CAT, DOG])
    assert images.shape == (2, 3, 16, 24)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_pictures_of_a_half_precision_model_are_float32(sd_folder, dtype):
    images = load(sd_folder, dtype=dtype).render([CAT])
    assert images.dtype == torch.float32


def test_pictures_are_those_that_the_pipeline_itself_draws(replica):
    replica.set_ratios(RATIOS)
    noise = torch.stack(
        [
            torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(prompt.seed))
            for prompt in (CAT, DOG)
        ]
    )
    with torch.no_grad():
        expected = replica.pipe(
            [CAT.text, DOG.text],
            latents=noise,
            height=16,
            width=24,
            num_inference_steps=2,
            guidance_scale=3.0,
            output_type="pt",
        ).images
    torch.testing.assert_close(replica.render([CAT, DOG]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("resolution", ["24x40", "8x8", "40x24"])
def test_latents_that_do_not_halve_evenly_are_drawn(deep_vae_folder, resolution):
    size = Resolution.parse(resolution)
    replica = load(deep_vae_folder, resolution)
    replica.set_ratios(RATIOS)
    assert replica.render([CAT]).shape == (1, 3, size.height, size.width)


def test_a_picture_does_not_change_when_it_is_drawn_again(replica):
    replica.set_ratios(RATIOS)
    first = replica.render([CAT, DOG])
    assert torch.equal(replica.render([CAT, DOG]), first)


def test_a_picture_does_not_depend_on_the_ratios_tried_before(replica):
    replica.set_ratios(RATIOS)
    first = replica.render([CAT])
    replica.set_ratios(BlockRatios(0.9, 0.0, 0.1))
    assert not torch.equal(replica.render([CAT]), first)
    replica.set_ratios(RATIOS)
    assert torch.equal(replica.render([CAT]), first)


def test_a_new_replica_draws_dense(replica):
    first = replica.render([CAT])
    replica.set_ratios(BlockRatios())
    assert torch.equal(replica.render([CAT]), first)


def test_drawing_without_guidance_needs_no_negative_embedding(folder):
    replica = load(folder, guidance_scale=1.0)
    assert replica.render([CAT, DOG]).shape[0] == 2


def test_the_poa_weight_is_the_replicas(sd_folder):
    replica = load(sd_folder, poa_weight=1.0)
    replica.set_ratios(RATIOS)
    assert replica.denoiser.poa_weight == 1


def test_sparsity_is_measured_for_each_group(sd_replica):
    sd_replica.set_ratios(RATIOS)
    sparsity = sd_replica.sparsity()
    assert sparsity == pytest.approx({group: RATIOS[group] for group in GROUPS}, abs=1e-3)


# Noise and batches


def test_a_prompts_noise_does_not_depend_on_its_batch(replica):
    with first_samples(replica) as samples:
        replica.render([CAT, DOG, FOX])
        replica.render([DOG])
    together, alone = samples
    assert torch.equal(together[1:2], alone)


def test_a_prompts_picture_does_not_depend_on_its_batch(replica):
    replica.set_ratios(RATIOS)
    together = replica.render([CAT, DOG, FOX])
    torch.testing.assert_close(replica.render([DOG]), together[1:2], atol=1e-4, rtol=0)


def test_a_prompts_noise_is_that_of_its_seed(sd_replica):
    with first_samples(sd_replica) as samples:
        sd_replica.render([CAT, Prompt("another", "t9", CAT.seed)])
    expected = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(CAT.seed))
    assert torch.equal(samples[0], torch.stack([expected, expected]))


def test_a_prompts_noise_is_the_same_in_every_dtype(sd_replica, sd_folder):
    half = load(sd_folder, dtype="bfloat16")
    with first_samples(sd_replica) as full_samples, first_samples(half) as half_samples:
        sd_replica.render([CAT])
        half.render([CAT])
    assert torch.equal(full_samples[0].bfloat16(), half_samples[0])


# Caches


def test_each_text_is_encoded_once(replica):
    calls = []
    replica.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    replica.render([CAT])
    num_for_one = len(calls)
    replica.render([CAT, CAT])
    assert len(calls) == num_for_one


def test_a_prompt_of_its_own_text_is_encoded_by_itself(sd_replica):
    sizes = []
    sd_replica.pipe.text_encoder.register_forward_pre_hook(
        lambda _, args: sizes.append(len(args[0]))
    )
    sd_replica.render([CAT, DOG])
    assert set(sizes) == {1}


def test_no_more_embeddings_and_noises_are_kept_than_a_search_needs(folder, monkeypatch):
    encoded = []
    embed = Replica._embed

    def counted(self: Replica, text: str) -> dict[str, Tensor]:
        encoded.append(text)
        return embed(self, text)

    monkeypatch.setattr(Replica, "_embed", counted)
    monkeypatch.setattr("crdiff_core.replica._NUM_CACHED", 2)
    replica = load(folder)
    first = replica.render([CAT])
    replica.render([DOG])
    replica.render([CAT])
    replica.render([FOX])  # The dog was looked at longest ago.
    assert encoded == [CAT.text, DOG.text, FOX.text]
    assert torch.equal(replica.render([CAT]), first)
    assert encoded == [CAT.text, DOG.text, FOX.text]
    replica.render([DOG])
    assert encoded == [CAT.text, DOG.text, FOX.text, DOG.text]
    assert replica._embedding.cache_info().currsize == 2
    assert replica._noise.cache_info().currsize == 2


def test_what_is_no_longer_cached_is_freed(sd_folder, monkeypatch):
    monkeypatch.setattr("crdiff_core.replica._NUM_CACHED", 1)
    replica = load(sd_folder)
    held = [
        weakref.ref(replica._embedding(CAT.text)["prompt_embeds"]),
        weakref.ref(replica._noise(replica.resolution, CAT.seed)),
    ]
    assert None not in [each() for each in held]
    replica.render([DOG])
    assert [each() for each in held] == [None, None]


def test_close_frees_the_model_and_the_buffers(replica):
    replica.render([CAT])
    denoiser = replica.denoiser
    held = [
        weakref.ref(each)
        for each in (denoiser.dense, denoiser.pruned, denoiser.replica.groups["up"].dense)
    ]
    del denoiser
    replica.close()
    gc.collect()
    assert [each() for each in held] == [None] * 3


# Broken pictures


def spoil(replica: Replica, change: Callable[[Tensor], object]) -> None:
    """Change in place what the VAE draws, on a scale of -1 to 1."""

    def hook(_: Any, __: Any, images: Tensor) -> None:
        change(images)

    replica.pipe.vae.decoder.register_forward_hook(hook)


def test_nan_pictures_are_refused(replica):
    spoil(replica, lambda images: images.fill_(math.nan))
    with pytest.raises(RenderError, match=r"^2 of 2 pictures are NaN or of one colour"):
        replica.render([CAT, DOG])


def test_black_pictures_are_refused(sd_replica):
    spoil(sd_replica, lambda images: images.fill_(-1))
    with pytest.raises(RenderError, match="are NaN or of one colour"):
        sd_replica.render([CAT])


def test_the_broken_picture_is_named_with_its_ratios(sd_replica):
    def blank_second(images: Tensor) -> None:
        images[1] = 0

    spoil(sd_replica, blank_second)
    sd_replica.set_ratios(RATIOS)
    with pytest.raises(RenderError) as caught:
        sd_replica.render([CAT, DOG])
    assert str(caught.value) == (
        "1 of 2 pictures are NaN or of one colour, the first for 'a dog' at ratios "
        "0.400 / 0.600 / 0.500: try model.dtype=float32"
    )


def test_one_nan_pixel_is_enough(sd_replica):
    def spoil_one(images: Tensor) -> None:
        images[0, 0, 0, 0] = math.nan

    spoil(sd_replica, spoil_one)
    with pytest.raises(RenderError):
        sd_replica.render([CAT])


# What is refused


def test_a_resolution_that_cannot_be_drawn_is_refused(sd_folder):
    with pytest.raises(ModelError, match="resolution 16x20 is not divisible by 8"):
        load(sd_folder, "16x20")


# Devices


@pytest.mark.parametrize(("available", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_the_gpu_if_there_is_one(monkeypatch, available, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device("auto") == torch.device(chosen)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"device cuda is not there: set cluster.device"):
        choose_device("cuda:1")


def test_an_unknown_device_is_refused_in_one_line():
    with pytest.raises(
        ModelError, match=r"^device 'tpu9000x' is unknown: set cluster.device=auto"
    ):
        choose_device("tpu9000x")


# Memory


def short_of_memory(replica: Replica, at_most: int) -> list[int]:
    """Let the dense UNet run out of memory for more pictures; return the batch sizes tried."""
    tried: list[int] = []

    def refuse(_: Any, args: tuple[Tensor, ...]) -> None:
        size = len(args[0]) // 2  # Guidance doubles the batch.
        if not tried or tried[-1] != size:
            tried.append(size)
        if size > at_most:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    replica.denoiser.dense.register_forward_pre_hook(refuse)
    return tried


def test_too_little_memory_halves_the_batch_and_draws_the_same(replica):
    prompts = [Prompt(f"a cat {word}", f"t{i}", i) for i, word in enumerate("a b c d e".split())]
    replica.set_ratios(RATIOS)
    expected = replica.render(prompts)
    tried = short_of_memory(replica, at_most=1)
    torch.testing.assert_close(replica.render(prompts), expected, atol=1e-5, rtol=0)
    assert tried[:3] == [5, 2, 1]
    assert replica.batch_limit == 1


def test_a_batch_that_did_not_fit_is_not_tried_again(sd_replica):
    tried = short_of_memory(sd_replica, at_most=2)
    sd_replica.render([CAT, DOG, FOX])
    del tried[:]
    sd_replica.render([CAT, DOG, FOX])
    assert max(tried) <= 2


class Decoder:
    """Lets the VAE's decoder run out of memory for more pictures; notes the sizes tried."""

    def __init__(self, replica: Replica, at_most: int) -> None:
        self.tried: list[int] = []
        self.at_most = at_most
        replica.pipe.vae.decoder.register_forward_pre_hook(self)

    def __call__(self, _: Any, args: tuple[Tensor, ...]) -> None:
        self.tried.append(len(args[0]))
        if len(args[0]) > self.at_most:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")


def test_too_little_memory_for_the_decoder_decodes_fewer_and_draws_no_step_again(replica):
    prompts = [Prompt(f"a cat {word}", f"t{i}", i) for i, word in enumerate("a b c d e".split())]
    replica.set_ratios(RATIOS)
    expected = replica.render(prompts)
    decoder = Decoder(replica, at_most=2)
    with first_samples(replica) as samples:
        torch.testing.assert_close(replica.render(prompts), expected, atol=1e-5, rtol=0)
    assert decoder.tried == [5, 2, 2, 1]
    assert [len(each) for each in samples] == [5]
    assert replica.num_shortages == 1
    # Memory may be there again, and how many are decoded at once moves digits.
    decoder.at_most = 5
    replica.render(prompts)
    assert decoder.tried[4:] == [5]


def test_a_picture_that_cannot_be_decoded_alone_is_refused_in_one_line(sd_replica):
    decoder = Decoder(sd_replica, at_most=0)
    with pytest.raises(RenderError, match=r"^one 16x24 picture does not fit into the memory of"):
        sd_replica.render([CAT, DOG])
    assert decoder.tried == [2, 1]


def raised(work: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # Of any class.
        work()
    return caught.value


def injected(kind: type[Exception], message: str) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise kind(message)

    return fail


def wrapped() -> None:
    try:
        injected(torch.OutOfMemoryError, "CUDA out of memory")()
    except RuntimeError as error:
        raise RewardError("the weights do not load") from error


def compiled(backend: Callable[..., Any]) -> Callable[[], object]:
    torch._dynamo.reset()
    double = torch.compile(lambda x: 2 * x, backend=backend)
    return lambda: double(torch.ones(2))


@pytest.mark.parametrize(
    "work",
    [
        injected(torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        injected(RuntimeError, "CUDA error: out of memory"),
        injected(RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."),
        injected(RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        injected(MemoryError, ""),
        lambda: torch.empty(1 << 60, dtype=torch.uint8),  # The CPU's allocator itself.
        wrapped,
        compiled(injected(torch.OutOfMemoryError, "CUDA out of memory")),
    ],
    ids=["cuda", "driver", "cublas", "cudnn", "python", "cpu", "wrapped", "compiler"],
)
def test_any_way_to_be_out_of_memory_is_recognised(work):
    assert is_out_of_memory(raised(work))


@pytest.mark.parametrize(
    "work",
    [
        injected(RuntimeError, "CUDA error: an illegal memory access was encountered"),
        injected(ValueError, "a sign that says out of memory"),
        compiled(injected(KeyError, "an operator")),
    ],
    ids=["illegal access", "prompt", "compiler"],
)
def test_another_error_is_not_taken_for_it(work):
    assert not is_out_of_memory(raised(work))


def test_a_picture_that_does_not_fit_alone_is_refused_in_one_line(sd_replica):
    short_of_memory(sd_replica, at_most=0)
    with pytest.raises(RenderError, match=r"^one 16x24 picture does not fit into the memory of"):
        sd_replica.render([CAT, DOG])


# The negative prompt


def negative_embedding(folder: Path, **changes: Any) -> Tensor:
    return load(folder, **changes)._embed("a cat")["negative_prompt_embeds"]


def test_sdxl_is_led_away_from_zeros_unless_the_empty_text_is_asked_for(sdxl_folder):
    assert not negative_embedding(sdxl_folder).any()
    empty = negative_embedding(sdxl_folder, negative_prompt="")
    pipe = Model("small", str(sdxl_folder), "float32").load(CPU)
    encoded = pipe.encode_prompt("", device=CPU, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(empty, encoded, rtol=0, atol=0)


def test_others_are_led_away_from_the_empty_text_either_way(sd_folder):
    own, empty = (negative_embedding(sd_folder, negative_prompt=text) for text in (None, ""))
    assert own.any()
    assert torch.equal(own, empty)


def test_the_negative_prompt_changes_the_pictures(replica, folder):
    blurry = load(folder, negative_prompt="blurry").render([CAT])
    assert not torch.equal(blurry, replica.render([CAT]))


# SDXL's size conditioning


@contextmanager
def time_ids(replica: Replica) -> Iterator[list[list[float]]]:
    """The six numbers that SDXL's UNet is told of a picture's size, for each picture."""
    seen: list[list[float]] = []
    handle = replica.denoiser.register_forward_pre_hook(
        lambda _, __, kwargs: seen.extend(kwargs["added_cond_kwargs"]["time_ids"].tolist()),
        with_kwargs=True,
    )
    yield seen
    handle.remove()


@pytest.mark.parametrize(
    ("conditioning", "told"),
    [(None, [16, 24, 0, 0, 16, 24]), (Resolution(64, 64), [64, 64, 0, 0, 64, 64])],
    ids=["requested", "native"],
)
def test_sdxl_is_told_the_size_asked_for(sdxl_folder, conditioning, told):
    replica = load(sdxl_folder, size_conditioning=conditioning)
    with time_ids(replica) as seen:
        replica.render([CAT])
    assert seen
    assert all(each == told for each in seen)


def test_the_size_that_sdxl_is_told_changes_its_pictures(sdxl_folder):
    requested = load(sdxl_folder).render([CAT])
    native = load(sdxl_folder, size_conditioning=Resolution(1024, 1024)).render([CAT])
    assert not torch.equal(native, requested)


def test_a_model_without_size_conditioning_refuses_one(sd_folder):
    with pytest.raises(ModelError, match="is not told a picture's size"):
        load(sd_folder, size_conditioning=Resolution(64, 64))


# Compilation


def test_an_unknown_way_to_compile_is_refused(sd_folder):
    with pytest.raises(ModelError, match=r"compile 'max' is unknown: give none, blocks, graphs"):
        load(sd_folder, compile="max")


@pytest.mark.parametrize("how", ["blocks", pytest.param("graphs", marks=pytest.mark.slow)])
def test_new_ratios_compile_nothing_anew(folder, how, monkeypatch):
    # The tracing is what decides over recompilation; the backend only takes time.
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **options: compile_module(
            module, backend="eager", fullgraph=options["fullgraph"], dynamic=options["dynamic"]
        ),
    )
    torch._dynamo.reset()
    plain, compiled = load(folder), load(folder, compile=how)
    compiled.set_ratios(RATIOS)
    compiled.render([CAT, DOG])
    with torch.compiler.set_stance("fail_on_recompile"):
        for ratios in (BlockRatios(0.1, 0.2, 0.3), BlockRatios(), RATIOS):
            for replica in (plain, compiled):
                replica.set_ratios(ratios)
            torch.testing.assert_close(
                compiled.render([CAT, DOG]), plain.render([CAT, DOG]), atol=1e-4, rtol=0
            )
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "graphs"])
def test_inductors_pictures_are_the_plain_ones(folder, how):
    torch._dynamo.reset()
    plain, compiled = load(folder), load(folder, compile=how)
    for ratios in (RATIOS, BlockRatios(0.1, 0.2, 0.3)):
        for replica in (plain, compiled):
            replica.set_ratios(ratios)
        torch.testing.assert_close(
            compiled.render([CAT, DOG]), plain.render([CAT, DOG]), atol=1e-4, rtol=0
        )
    torch._dynamo.reset()


# Attention


def test_attention_runs_by_sdpa(replica):
    for unet in (replica.denoiser.dense, replica.denoiser.pruned):
        kinds = {type(processor).__name__ for processor in unet.attn_processors.values()}
        assert kinds == {"AttnProcessor2_0"}
