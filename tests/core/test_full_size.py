"""Full-size UNets with random weights: memory, and latents that do not halve evenly."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import nn

from crdiff_core.poa import POADenoiser
from crdiff_core.pruning import PrunedReplica
from crdiff_core.ratios import BlockRatios
from tests.benchmarks.architectures import SD15_UNET, SDXL_UNET, meta_unet

pytestmark = pytest.mark.slow


def num_bytes(*modules: nn.Module) -> int:
    """Memory of the modules' weights and buffers, what they share counted once."""
    tensors = chain.from_iterable(
        chain(module.parameters(), module.buffers()) for module in modules
    )
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors
    }
    return sum(storage.nbytes() for storage in storages.values())


def test_sdxl_and_its_replica_take_at_most_1_65_of_the_dense_unet():
    # Tens of seconds to fill with numbers, of which this test needs none.
    unet = meta_unet(SDXL_UNET).to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    alone = num_bytes(unet)
    replica = PrunedReplica(unet)
    together = num_bytes(replica.dense, replica.pruned)
    print(f"dense {alone / 2**30:.2f} GiB, with the replica {together / 2**30:.2f} GiB")
    assert together / alone <= 1.65


def test_sd15_draws_latents_of_60x45():
    unet = meta_unet(SD15_UNET).to(torch.float32).to_empty(device="cpu").requires_grad_(False)
    for name, weight in unet.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        else:
            nn.init.constant_(weight, float(name.endswith("weight")))
    denoiser = POADenoiser(unet, BlockRatios(0.467, 0.363, 0.196))
    with torch.no_grad():
        drawn = denoiser(torch.randn(1, 4, 60, 45), 500, torch.randn(1, 77, 768)).sample
    assert drawn.shape == (1, 4, 60, 45)
    assert drawn.isfinite().all()
