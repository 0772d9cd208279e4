"""Exact magnitude pruning of block groups, from pristine dense weights into a replica UNet."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
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


# Weights of a group that are looked at for changes: of the paper's models, dozens of each layer.
_NUM_SAMPLED = 1 << 16
# Of a module's attributes: those by name, those that are hooks, and one that changes no picture.
_MEMBERS = {"_parameters", "_buffers", "_modules"}
_HOOKS = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict)} - _MEMBERS
_COMPILED = "_compiled_call_impl"
_ABSENT = object()
# Of a class that does not say when two are equal.
_IDENTITY: Any = object.__eq__


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Make tensors that may be rewritten later, although the caller is in inference mode."""
    # Leaving inference mode would turn gradients on.
    with torch.inference_mode(False), torch.no_grad():
        yield


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

    @_ordinary_tensors()
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
            own = self.dense[part].view(shape)
            if dense.weight.is_inference():  # Made in inference mode: its data cannot be replaced.
                dense.weight = nn.Parameter(own, dense.weight.requires_grad)
            else:
                dense.weight.data = own
            # A parameter of its own: the replica was made sharing every parameter.
            pruned.weight = nn.Parameter(self.pruned[part].view(shape), requires_grad=False)
            offset += size
        self._histogram = _MagnitudeHistogram(self.dense)
        self._sample = self._sampled().clone()
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

    def is_intact(self) -> bool:
        """Whether the dense layers' weights are where, and as far as sampled what, pack left."""
        address = self.dense.data_ptr()
        for layer in self._dense_layers:
            if layer.weight.data_ptr() != address:
                return False
            address += layer.weight.nbytes
        return torch.equal(self._sampled(), self._sample)

    def _sampled(self) -> Tensor:
        # As integers: NaN is not equal to itself.
        weights = self.dense.view(_MAGNITUDE_BITS[self.dense.dtype][0])
        return weights[:: math.ceil(len(weights) / _NUM_SAMPLED)]

    def owns(self) -> set[int]:
        """Return the ids of the pruned weights."""
        return {id(layer.weight) for layer in self._pruned_layers}

    @_ordinary_tensors()
    def release(self) -> None:
        """Give each dense layer a weight of its own again, with the same bits."""
        for layer in self._dense_layers:
            layer.weight.data = layer.weight.data.clone()


class PrunedReplica:
    """A dense UNet and its pruned replica, which shares every unpruned tensor with it."""

    def __init__(self, dense: nn.Module) -> None:
        self.dense = dense
        for name, module in dense.named_modules():
            if isinstance(vars(module).get("forward"), FunctionType):
                raise PruningError(
                    f"the forward of the UNet's {name or 'own'} was replaced by a function, which "
                    "knows no pruned copy: assign types.MethodType(function, module)"
                )
        # Deep-copies the module tree but no tensor: those count as copied already.
        self.pruned = copy.deepcopy(dense, {id(tensor): tensor for tensor in _tensors(dense)})
        self.groups = {group: PrunedGroup(dense, self.pruned, group) for group in GROUPS}

    @_ordinary_tensors()
    def set_ratios(self, ratios: BlockRatios) -> None:
        """Prune each group whose ratio changed, from the dense weights.

        Source: CR-Diff (arXiv:2604.05524), section 3.3.
        """
        for name, group in self.groups.items():
            group.prune(ratios[name])

    @torch.no_grad()
    def change(self) -> str | None:
        """Name what differs between the UNets beside the pruned weights; None: nothing does.

        Modules, settings, hooks and tensors are compared one by one, and a sample of the dense
        weights with what they were when they were packed.
        """
        own = {key for group in self.groups.values() for key in group.owns()}
        changed = _difference(self.dense, self.pruned, own)
        for name, group in self.groups.items():
            if changed is None and not group.is_intact():
                changed = f"the weights of its {name} blocks"
        return changed

    def sparsity(self) -> dict[Group, float]:
        """Return the measured sparsity of each group."""
        return {name: group.sparsity() for name, group in self.groups.items()}

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


def _difference(dense: nn.Module, pruned: nn.Module, own: set[int], name: str = "") -> str | None:
    """Name the first setting, tensor or module in which two trees differ.

    own: ids of the tensors that the pruned tree has to itself.
    """
    if type(dense) is not type(pruned):
        return f"{name} ({type(dense).__name__})"
    prefix = f"{name}." if name else ""
    ours, theirs = vars(dense), vars(pruned)
    for key in theirs.keys() - ours.keys() - {_COMPILED}:
        return f"{prefix}{key}"
    for key, value in ours.items():
        other = theirs.get(key, _ABSENT)
        if value is other or key == _COMPILED:
            continue
        if key in _MEMBERS:
            for member in value.keys() ^ other.keys():
                return f"{prefix}{member}"
        elif key in _HOOKS:
            # One on a whole UNet can only have been meant for that.
            if name and (value or other) and not _is_alike([*value.values()], [*other.values()]):
                return f"{prefix}{key}"
        elif not _is_alike(value, other):
            return f"{prefix}{key}"
    for kind in ("_parameters", "_buffers"):
        for key, tensor in ours[kind].items():
            if theirs[kind][key] is not tensor and id(theirs[kind][key]) not in own:
                return f"{prefix}{key}"
    copies = theirs["_modules"]
    for key, child in ours["_modules"].items():
        if child is None or copies[key] is None:
            if child is not copies[key]:
                return f"{prefix}{key}"
        elif found := _difference(child, copies[key], own, f"{prefix}{key}"):
            return found
    return None


def _is_alike(ours: Any, theirs: Any, within: frozenset[int] = frozenset()) -> bool:
    """Whether a value is what a deep copy of the other would be.

    within: ids of the objects that hold the value, which may hold one another.
    """
    if ours is theirs:
        return True
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, nn.Module) or id(ours) in within:
        return True  # Compared by whoever came here.
    within |= {id(ours)}
    if isinstance(ours, float):
        return math.isclose(ours, theirs)  # A LoRA's scale is multiplied and divided again.
    if isinstance(ours, Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, np.ndarray):
        return np.array_equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(
            _is_alike(value, theirs[key], within) for key, value in ours.items()
        )
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(
            _is_alike(*pair, within) for pair in zip(ours, theirs, strict=True)
        )
    if isinstance(ours, MethodType):
        return ours.__func__ is theirs.__func__
    if isinstance(ours, partial):
        return _is_alike((ours.func, ours.args), (theirs.func, theirs.args), within)
    if isinstance(ours, FunctionType | type):
        return False  # No copy is ever made of them.
    if type(ours).__eq__ is not _IDENTITY:
        return bool(ours == theirs)
    return _is_alike(getattr(ours, "__dict__", None), getattr(theirs, "__dict__", None), within)
