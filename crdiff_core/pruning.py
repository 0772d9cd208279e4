"""Exact magnitude pruning of block groups, from pristine dense weights into a replica UNet."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from crdiff_core.errors import PruningError
from crdiff_core.ratios import GROUPS, BlockRatios, Group, group_of

# Clearing the sign bit leaves an integer that orders like the magnitude, NaN last.
_MAGNITUDE_BITS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float16: (torch.int16, 0x7FFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float32: (torch.int32, 0x7FFF_FFFF),
}


def target_layers(unet: nn.Module, group: Group) -> list[nn.Linear | nn.Conv2d]:
    """Return the nn.Linear and nn.Conv2d of one block group, in the order of the modules.

    Raises PruningError if there are none. `group_of` says which names count.
    """
    layers = [
        layer
        for name, layer in unet.named_modules()
        if group_of(name) == group and isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    if not layers:
        raise PruningError(
            f"{type(unet).__name__} has no self-attention or feed-forward layer in its {group} "
            "blocks: use a UNet with down, mid and up transformer blocks"
        )
    return layers


def num_prunable(unet: nn.Module) -> dict[Group, int]:
    """Return the number of weights that each group's ratio is a fraction of."""
    return {
        group: sum(layer.weight.numel() for layer in target_layers(unet, group))
        for group in GROUPS
    }


def block_threshold(weights: Tensor, ratio: float) -> float:
    """Magnitude at or below which one block group is pruned.

    weights: flat, float32, float16 or bfloat16.
    ratio:   fraction to prune, in [0, 1); int(ratio * n) must be at least 1.
    Returns the int(ratio * n)-th smallest |w|; ties are pruned too, so measure the sparsity.
    Source: CR-Diff (arXiv:2604.05524), section 3.3.
    """
    return _MagnitudeHistogram(weights).threshold(int(ratio * weights.numel()))


class _MagnitudeHistogram:
    """Order statistics of a flat tensor's magnitudes, without sorting it.

    A half-precision magnitude has 32,768 values, so a cumulative histogram over its 15 bits holds
    every order statistic. float32 uses its upper 15 bits and then looks inside one bin.
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self._integer, self._mask = _MAGNITUDE_BITS[weights.dtype]
        self._shift = 8 * weights.element_size() - 16
        counts = torch.zeros(1 << 15, dtype=torch.int64, device=weights.device)
        # In slices: bincount wants int32 indices, and a whole group of them would not be small.
        for piece in torch.split(weights, 1 << 24):
            counts += torch.bincount(self._magnitude(piece) >> self._shift, minlength=1 << 15)
        self._cumulative = counts.cumsum(0).cpu()

    def _magnitude(self, weights: Tensor) -> Tensor:
        return (weights.view(self._integer) & self._mask).to(torch.int32)

    def threshold(self, rank: int) -> float:
        """Return the rank-th smallest magnitude, rank counted from 1."""
        bin_index = int(torch.searchsorted(self._cumulative, rank))
        magnitude = bin_index
        if self._shift:
            candidates = self._magnitude(self._weights)
            candidates = candidates[candidates >> self._shift == bin_index]
            below = int(self._cumulative[bin_index - 1]) if bin_index else 0
            magnitude = int(candidates.kthvalue(rank - below).values)
        bits = torch.tensor([magnitude], dtype=self._integer)
        return float(bits.view(self._weights.dtype).item())


class PrunedGroup:
    """One block group's weights, dense and pruned, each in one flat buffer.

    The layers' weights are views of the buffers, so a new ratio rewrites one buffer in one pass
    and no weight's address ever changes (compiled graphs stay valid).
    """

    def __init__(self, dense: nn.Module, pruned: nn.Module, group: Group) -> None:
        self.group = group
        self._dense_layers = target_layers(dense, group)
        self._pruned_layers = target_layers(pruned, group)
        self.ratio = 0.0
        self.pack()

    def pack(self) -> None:
        """Gather the dense layers' weights into the buffers and prune again at the same ratio."""
        weights = [layer.weight for layer in self._dense_layers]
        kinds = {(weight.dtype, weight.device) for weight in weights}
        if len(kinds) > 1 or weights[0].dtype not in _MAGNITUDE_BITS or weights[0].is_meta:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise PruningError(
                f"the {self.group} blocks hold {found}: load the UNet in one of float32, float16, "
                "bfloat16 on one device, without offloading or quantisation"
            )
        self.dense = torch.cat([weight.detach().reshape(-1) for weight in weights])
        self.pruned = self.dense.clone()
        offset = 0
        for dense, pruned in zip(self._dense_layers, self._pruned_layers, strict=True):
            shape, size = dense.weight.shape, dense.weight.numel()
            part = slice(offset, offset + size)
            dense.weight.data = self.dense[part].view(shape)
            # A parameter of its own: the replica was made sharing every parameter.
            pruned.weight = nn.Parameter(self.pruned[part].view(shape), requires_grad=False)
            offset += size
        self._histogram = _MagnitudeHistogram(self.dense)
        ratio, self.ratio = self.ratio, 0.0
        self.prune(ratio)

    def prune(self, ratio: float) -> None:
        """Write the dense weights, without the smallest `ratio` of them, into the replica.

        Pruning starts from the dense weights each time; ratio 0 restores them bit for bit.
        """
        if ratio == self.ratio:
            return
        rank = int(ratio * self.dense.numel())
        if rank == 0:
            self.pruned.copy_(self.dense)
        else:
            threshold = self._histogram.threshold(rank)
            torch.ops.aten.hardshrink.out(self.dense, threshold, out=self.pruned)
        self.ratio = ratio

    def sparsity(self) -> float:
        """Return the measured fraction of zeros among the replica's weights of this group."""
        return 1 - int(torch.count_nonzero(self.pruned)) / self.pruned.numel()

    def release(self) -> None:
        """Give each dense layer a weight of its own again, with the same bits."""
        for layer in self._dense_layers:
            layer.weight.data = layer.weight.data.clone()


class PrunedReplica:
    """A dense UNet and its pruned replica, which shares every unpruned tensor with it."""

    def __init__(self, dense: nn.Module) -> None:
        self.dense = dense
        # Deep-copies the module tree but no tensor: those count as copied already.
        self.pruned = copy.deepcopy(dense, {id(tensor): tensor for tensor in _tensors(dense)})
        self.groups = {group: PrunedGroup(dense, self.pruned, group) for group in GROUPS}

    @torch.no_grad()
    def set_ratios(self, ratios: BlockRatios) -> None:
        """Prune each group whose ratio changed, from the dense weights.

        Source: CR-Diff (arXiv:2604.05524), section 3.3.
        """
        for name, group in self.groups.items():
            group.prune(ratios[name])

    def sparsity(self) -> dict[Group, float]:
        """Return the measured sparsity of each group."""
        return {name: group.sparsity() for name, group in self.groups.items()}

    @torch.no_grad()
    def pack(self) -> None:
        """Rebuild the buffers after the dense weights moved to another device or dtype."""
        for group in self.groups.values():
            group.pack()

    @torch.no_grad()
    def keep_pruned(self) -> None:
        """Write the pruned weights into the dense UNet, whose own are then lost."""
        for group in self.groups.values():
            group.dense.copy_(group.pruned)

    def release(self) -> None:
        """Let go of the buffers; the dense UNet keeps the same bits in weights of its own."""
        for group in self.groups.values():
            group.release()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
