"""On CUDA: the same thresholds, the same pruned bits and the same formula as on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import crdiff_core
from crdiff_core import BlockRatios
from crdiff_core.models import Model
from crdiff_core.poa import POADenoiser
from crdiff_core.prompts import Prompt
from crdiff_core.pruning import PrunedReplica, block_threshold
from crdiff_core.ratios import GROUPS, Resolution
from crdiff_core.replica import Replica
from tests.pipelines import HIDDEN, save_sd, small_unet

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
            model,
            Resolution(16, 24),
            num_steps=2,
            guidance_scale=3.0,
            poa_weight=1.5,
            device=device,
        )
        replica.set_ratios(RATIOS)
        pictures.append(replica.render([Prompt("a cat", "t", 1), Prompt("a dog", "t", 2)]).cpu())
        replica.close()
    torch.testing.assert_close(pictures[1], pictures[0], atol=2e-2, rtol=0)
