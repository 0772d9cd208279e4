"""On CUDA: the CPU's thresholds, bits, formula and scores; compiled; short of memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import crdiff_core
from crdiff_core import BlockRatios
from crdiff_core.models import Model
from crdiff_core.poa import POADenoiser
from crdiff_core.prompts import Prompt
from crdiff_core.pruning import PrunedReplica, block_threshold, num_prunable
from crdiff_core.ratios import GROUPS, Resolution
from crdiff_core.replica import Replica, if_it_fits
from crdiff_core.rewards.image_reward import Architecture, ImageReward, Network
from tests.benchmarks.architectures import randomise
from tests.pipelines import HIDDEN, save_sd, save_sdxl, small_unet

pytestmark = [
    pytest.mark.gpu,
    # Diffusers' scheduler calls np.array on a tensor, which torch has not yet adapted to numpy 2.
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    ),
]

RATIOS = BlockRatios(down=0.4, mid=0.6, up=0.5)
HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32]
# About four times what rounding alone does to this UNet on the CPU.
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 1e-3}


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # Convolutions in full float32, as on the CPU.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device("cuda")


def tied_weights(dtype: torch.dtype, num: int = 100_003) -> Tensor:
    """Normal weights with zeros of both signs, subnormals and many ties."""
    weights = torch.randn(num, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights[::7] = 0.0
    weights[1::7] = -0.0
    weights[2::7] = torch.finfo(dtype).smallest_normal / 4
    weights[3::7] = -0.5
    return weights


def call(unet: nn.Module, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    sample = torch.randn(2, 4, 6, 10, generator=generator).to(device, dtype)
    text = torch.randn(2, 5, HIDDEN, generator=generator).to(device, dtype)
    with torch.no_grad():
        output: Tensor = unet(sample, torch.tensor(7, device=device), text).sample
    return output.float().cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.45, 0.6, 0.9, 0.999])
def test_the_threshold_is_the_cpus_kthvalue(cuda, dtype, ratio):
    weights = tied_weights(dtype)
    expected = float(weights.abs().kthvalue(int(ratio * len(weights))).values)
    assert block_threshold(weights.to(cuda), ratio) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_pruned_weights_are_the_cpus_bit_for_bit(cuda, dtype):
    here, there = (PrunedReplica(small_unet().to(device, dtype)) for device in ("cpu", cuda))
    for ratios in (RATIOS, BlockRatios(0.9, 0.1, 0.3)):
        for replica in (here, there):
            replica.set_ratios(ratios)
        for group in GROUPS:
            ours, theirs = there.groups[group].pruned.cpu(), here.groups[group].pruned
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), group


def test_addresses_never_change_as_the_ratios_do(cuda):
    replica = PrunedReplica(small_unet().to(cuda, torch.float16))
    before = [weight.data_ptr() for weight in replica.pruned.parameters()]
    replica.set_ratios(RATIOS)
    assert [weight.data_ptr() for weight in replica.pruned.parameters()] == before


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("poa_weight", [0.0, 1.0, 1.5])
def test_poa_is_the_cpus(cuda, dtype, poa_weight):
    unet = small_unet().eval().to(dtype)
    there = POADenoiser(copy.deepcopy(unet).to(cuda), RATIOS, poa_weight)
    expected = call(POADenoiser(unet, RATIOS, poa_weight), torch.device("cpu"), dtype)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(call(there, cuda, dtype), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moving_to_the_gpu_after_apply_equals_moving_before(cuda, dtype, tmp_path):
    model = Model("small", str(save_sd(tmp_path)))
    pipes: list[Any] = [model.load(torch.device("cpu")) for _ in range(2)]
    after = crdiff_core.apply(pipes[0], RATIOS).unet.to(cuda, dtype)
    before = crdiff_core.apply(pipes[1].to(cuda, dtype), RATIOS).unet
    assert torch.equal(call(after, cuda, dtype), call(before, cuda, dtype))


def test_a_replica_on_the_gpu_draws_what_the_cpu_draws(cuda, tmp_path):
    model = Model("small", str(save_sd(tmp_path)))
    pictures = []
    for device in (torch.device("cpu"), cuda):
        replica = Replica(
            model.load(device),
            Resolution(16, 24),
            num_steps=2,
            guidance_scale=3.0,
            poa_weight=1.5,
        )
        replica.set_ratios(RATIOS)
        pictures.append(replica.render([Prompt("a cat", "t", 1), Prompt("a dog", "t", 2)]).cpu())
        replica.close()
    torch.testing.assert_close(pictures[1], pictures[0], atol=2e-2, rtol=0)


# Compilation

SAVE = {"sd": save_sd, "sdxl": save_sdxl}
PROMPTS = [Prompt("a cat", "t0", 1), Prompt("a dog", "t1", 2)]


def load(folder: Path, device: torch.device, dtype: str = "float32", **options: Any) -> Replica:
    pipe = Model("small", str(folder), dtype).load(device)
    settings = {"num_steps": 3, "guidance_scale": 3.0, "poa_weight": 1.5, **options}
    return Replica(pipe, Resolution(16, 24), **settings)


@pytest.fixture
def compiler() -> Iterator[None]:
    """Nothing compiled before or after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.cuda.empty_cache()


@pytest.mark.timeout(900)
# Inductor asks for TF32, which these tests must not use.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.filterwarnings(r"ignore::UserWarning:torch\._(inductor|dynamo)")
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kind", SAVE)
@pytest.mark.parametrize("how", ["blocks", "graphs"])
def test_compiled_pictures_are_the_plain_ones_under_any_ratios(cuda, how, kind, tmp_path):
    folder = SAVE[kind](tmp_path)
    plain, compiled = load(folder, cuda), load(folder, cuda, compile=how)
    compiled.set_ratios(RATIOS)
    # Compiles, warms up and records; a graph is replayed from the third step on.
    compiled.render(PROMPTS)
    compiled.render(PROMPTS)
    with torch.compiler.set_stance("fail_on_recompile"):
        for ratios in (BlockRatios(0.1, 0.2, 0.3), BlockRatios(0.9, 0.8, 0.7), RATIOS):
            for replica in (plain, compiled):
                replica.set_ratios(ratios)
            expected = plain.render(PROMPTS)
            torch.testing.assert_close(compiled.render(PROMPTS), expected, atol=2e-2, rtol=0)


# Memory


@pytest.fixture
def all_memory() -> Iterator[None]:
    """The whole GPU again after the test."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def most_reserved(replica: Replica, prompts: list[Prompt]) -> tuple[int, Tensor]:
    """Bytes that the process takes from the GPU while it draws; the pictures."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pictures = replica.render(prompts).cpu()
    return torch.cuda.max_memory_reserved(), pictures


@pytest.mark.usefixtures("all_memory")
def test_too_little_memory_halves_the_batch_and_draws_the_same(cuda, tmp_path):
    pipe = Model("small", str(save_sd(tmp_path))).load(cuda)
    # Heads of 8 channels, not 2: attention then needs no matrix of all pairs of pixels.
    unet = small_unet(attention_head_dim=2).requires_grad_(False).eval()
    pipe.register_modules(unet=unet.to(cuda))
    size = Resolution(128, 128)
    replica = Replica(pipe, size, num_steps=2, guidance_scale=3.0, poa_weight=1.5)
    replica.set_ratios(RATIOS)
    # So many that their memory is far above what the allocator takes at once and cuBLAS keeps.
    prompts = [Prompt("a cat", f"t{i}", i) for i in range(48)]
    few_bytes, _ = most_reserved(replica, prompts[:2])
    all_bytes, expected = most_reserved(replica, prompts)
    assert all_bytes > 2 * few_bytes, "a batch is too small for this test to say anything"
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.set_per_process_memory_fraction((few_bytes + all_bytes) / 2 / total)
    pictures = replica.render(prompts).cpu()
    assert 1 <= replica.batch_limit < len(prompts)
    torch.testing.assert_close(pictures, expected, atol=2e-2, rtol=0)


def test_a_lack_of_memory_is_recognised_as_cuda_and_the_compiler_report_it(cuda, compiler):
    def huge() -> Tensor:
        return torch.empty(1 << 45, device=cuda)

    assert if_it_fits(huge) is None
    ones = torch.ones(1 << 20, 1, device=cuda)
    outer = torch.compile(lambda x: (x + x.T).cos())  # 4 TiB
    assert if_it_fits(lambda: outer(ones)) is None


def test_a_replica_takes_the_memory_of_its_prunable_weights(cuda):
    unet = small_unet(block_out_channels=(128, 256)).to(cuda, torch.float16)
    prunable_bytes = 2 * sum(num_prunable(unet).values())
    gc.collect()
    before = torch.cuda.memory_allocated()
    replica = PrunedReplica(unet)
    replica.set_ratios(RATIOS)
    gc.collect()
    added = torch.cuda.memory_allocated() - before
    # Many small tensors, each rounded up to 512 bytes, become two large ones a group.
    assert added == pytest.approx(prunable_bytes, rel=0.05)


# Half precision


def test_a_vae_that_overflows_in_float16_decodes_in_float32(cuda, tmp_path):
    replica = load(save_sdxl(tmp_path), cuda, dtype="float16")
    assert replica.pipe.vae.config.force_upcast
    assert replica.denoiser.dense.dtype == torch.float16
    seen = []
    replica.pipe.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    replica.set_ratios(RATIOS)
    pictures = replica.render(PROMPTS)
    assert set(seen) == {torch.float32}
    assert pictures.dtype == torch.float32
    assert pictures.device.type == "cuda"
    assert pictures.isfinite().all()


# Rewards

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue cat dog".split()


class SmallImageReward(ImageReward):
    _architecture = Architecture(
        image_size=32,
        patch_size=8,
        vision_width=32,
        vision_mlp_width=64,
        num_vision_layers=2,
        num_vision_heads=2,
        vocab_size=len(WORDS) + 2,
        text_width=32,
        text_mlp_width=64,
        num_text_layers=2,
        num_text_heads=2,
        head_widths=(16, 8),
    )


def test_image_reward_is_the_cpus(cuda, tmp_path):
    network = Network(SmallImageReward._architecture)
    randomise(network, torch.Generator().manual_seed(0))
    save_file(network.state_dict(), tmp_path / "reward.safetensors")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    reward = SmallImageReward(path=str(tmp_path / "reward.safetensors"), tokenizer=str(tmp_path))
    pictures = torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    texts = ["a red cat", "a blue dog", "a cat a dog"]
    expected = reward(pictures, texts)
    assert len(set(expected)) == 3
    # A pixel that rounds the other way is worth far less.
    assert reward(pictures.to(cuda), texts) == pytest.approx(expected, abs=5e-3)
