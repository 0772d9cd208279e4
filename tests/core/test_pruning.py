"""Pruning: exact thresholds, one pass from dense, everything else shared and untouched."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from crdiff_core.errors import PruningError
from crdiff_core.pruning import PrunedReplica, block_threshold, num_prunable, target_layers
from crdiff_core.ratios import GROUPS, BlockRatios
from tests.pipelines import small_unet

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INTEGER = {2: torch.int16, 4: torch.int32}

ratios = st.floats(0, 0.999)


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers: -0.0 differs from 0.0 and NaN equals itself."""
    return tensor.detach().contiguous().view(INTEGER[tensor.element_size()])


def reference_prune(weights: list[Tensor], ratio: float) -> list[Tensor]:
    """The reference implementation's way: concatenate, kthvalue, mask, multiply."""
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    rank = int(ratio * magnitudes.numel())
    if rank == 0:
        return [weight.clone() for weight in weights]
    threshold = magnitudes.kthvalue(rank).values
    return [weight * (weight.abs() > threshold) for weight in weights]


@st.composite
def values(draw: st.DrawFn, dtype: torch.dtype, finite: bool) -> list[float]:
    """Weights rich in ties, signed zeros, subnormals and, unless finite, infinities."""
    info = torch.finfo(dtype)
    special = [0.0, info.smallest_normal / 4, info.tiny, 0.5, 1.0, 1.0 + info.eps, info.max]
    if not finite:
        special.append(math.inf)
    special += [-value for value in special]
    bound = float(info.max)
    anything = (
        st.floats(-bound, bound, width=32) if dtype != torch.float16 else st.floats(width=16)
    )
    anything = anything.filter(math.isfinite)
    return draw(st.lists(st.sampled_from(special) | anything, min_size=2, max_size=60))


class Blocks(nn.Module):
    """The least that has the three groups: two targets and one layer that is none, in each."""

    def __init__(self, dtype: torch.dtype = torch.float32, rows: int = 6, columns: int = 5):
        super().__init__()
        torch.manual_seed(3)

        def block() -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    "attn1": nn.Linear(columns, rows),
                    "ff": nn.Conv2d(columns, rows, 1),
                    "attn2": nn.Linear(columns, rows),
                }
            )

        self.down_blocks = nn.ModuleList([block(), block()])
        self.mid_block = block()
        self.up_blocks = nn.ModuleList([block()])
        self.register_buffer("timesteps", torch.arange(3))
        self.to(dtype)


def weights_of(model: nn.Module, group: str) -> list[Tensor]:
    return [layer.weight.detach() for layer in target_layers(model, group)]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Which layers


def test_targets_are_self_attention_and_feed_forward_but_not_cross_attention():
    unet = small_unet()
    found = {id(layer) for layer in target_layers(unet, "down")}
    expected = {
        id(layer)
        for name, layer in unet.named_modules()
        if name.startswith("down_blocks.")
        and (".attn1." in name or ".ff." in name)
        and isinstance(layer, nn.Linear | nn.Conv2d)
    }
    assert found == expected


def test_no_layer_belongs_to_two_groups():
    unet = small_unet()
    layers = [id(layer) for group in GROUPS for layer in target_layers(unet, group)]
    assert len(layers) == len(set(layers))


def test_a_convolution_named_feed_forward_is_a_target():
    assert [type(layer) for layer in target_layers(Blocks(), "mid")] == [nn.Linear, nn.Conv2d]


def test_a_group_without_transformer_blocks_is_refused():
    unet = small_unet(up_block_types=("UpBlock2D", "UpBlock2D"))
    with pytest.raises(PruningError, match=r"no self-attention .* in its up blocks: use"):
        target_layers(unet, "up")


@pytest.mark.parametrize(
    ("config", "millions", "num_tensors"),
    [
        pytest.param(
            {"cross_attention_dim": 768},
            {"down": 68.8, "mid": 26.2, "up": 103.2},
            96,
            id="sd15",
        ),
        pytest.param(
            {
                "block_out_channels": (320, 640, 1280),
                "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
                "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            {"down": 550.5, "mid": 262.1, "up": 825.8},
            420,
            id="sdxl",
        ),
    ],
)
def test_the_papers_architectures_have_their_known_prunable_weights(config, millions, num_tensors):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    counts = num_prunable(unet)
    assert {group: round(count / 1e6, 1) for group, count in counts.items()} == millions
    assert sum(len(target_layers(unet, group)) for group in GROUPS) == num_tensors


# Thresholds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data(), ratio=ratios)
def test_threshold_equals_kthvalue(dtype, data, ratio):
    weights = torch.tensor(data.draw(values(dtype, finite=False)), dtype=dtype)
    rank = int(ratio * len(weights))
    if rank:
        assert block_threshold(weights, ratio) == float(weights.abs().kthvalue(rank).values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_is_exact_at_every_rank(dtype):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(257, generator=generator).to(dtype)
    ordered = weights.abs().sort().values
    found = [block_threshold(weights, (rank + 0.5) / 257) for rank in range(1, 257)]
    assert found == ordered[: len(found)].tolist()


def test_threshold_of_more_weights_than_one_histogram_slice():
    num_zeros = (1 << 24) + 1
    weights = torch.zeros(num_zeros + 1000, dtype=torch.float16)
    weights[num_zeros:] = -1
    assert block_threshold(weights, num_zeros / len(weights)) == 0
    assert block_threshold(weights, (num_zeros + 2) / len(weights)) == 1


# Pruned weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data(), ratio=ratios, rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_pruned_weights_equal_the_references(dtype, data, ratio, rows, columns):
    model = Blocks(dtype, rows, columns)
    pool = torch.tensor(data.draw(values(dtype, finite=True)), dtype=dtype)
    for group in GROUPS:
        for layer in target_layers(model, group):
            chosen = torch.randint(len(pool), layer.weight.shape)
            layer.weight.data = pool[chosen]
    expected = {group: reference_prune(weights_of(model, group), ratio) for group in GROUPS}
    replica = PrunedReplica(model)
    replica.set_ratios(BlockRatios(ratio, ratio, ratio))
    for group in GROUPS:
        for ours, theirs in zip(weights_of(replica.pruned, group), expected[group], strict=True):
            assert torch.equal(ours, theirs)


@given(group=st.sampled_from(GROUPS), ratio=ratios, scale=st.sampled_from([1e-3, 1.0, 4.0]))
def test_sparsity_is_what_was_asked_and_exceeds_it_only_by_ties(group, ratio, scale):
    model = Blocks()
    for layer in target_layers(model, group):
        # Rounded, so that there are ties at small scales.
        layer.weight.data = (torch.randn(layer.weight.shape) * scale * 8).round() / 8
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights_of(model, group)])
    replica = PrunedReplica(model)
    replica.set_ratios(BlockRatios(**{group: ratio}))
    asked = int(ratio * len(magnitudes))
    if asked:
        threshold = magnitudes.kthvalue(asked).values
        expected = int((magnitudes <= threshold).sum())
    else:
        expected = int((magnitudes == 0).sum())
    measured = round(replica.sparsity()[group] * len(magnitudes))
    assert measured == expected >= asked


def test_an_infinite_weight_above_the_threshold_stays():
    model = Blocks()
    model.mid_block.attn1.weight.data[0, 0] = math.inf
    replica = PrunedReplica(model)
    replica.set_ratios(BlockRatios(mid=0.5))
    assert replica.pruned.mid_block.attn1.weight[0, 0] == math.inf


def test_an_infinite_weight_at_the_threshold_becomes_zero_and_not_nan():
    model = Blocks()
    for layer in target_layers(model, "mid"):
        layer.weight.data.fill_(-math.inf)
    replica = PrunedReplica(model)
    replica.set_ratios(BlockRatios(mid=0.5))
    assert replica.sparsity()["mid"] == 1


# Ratio 0, repetition and which groups are written


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ratio_zero_is_bit_identical_signed_zeros_too(dtype):
    model = Blocks(dtype)
    for group in GROUPS:
        for layer in target_layers(model, group):
            layer.weight.data[0] = -0.0
            layer.weight.data[1] = 0.0
    dense = snapshot(model)
    replica = PrunedReplica(model)
    replica.set_ratios(BlockRatios(0.6, 0.6, 0.6))
    replica.set_ratios(BlockRatios())
    for name, tensor in replica.pruned.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(bits(tensor), bits(dense[name])), name


def test_a_ratio_that_prunes_no_whole_weight_restores_the_dense_weights():
    replica = PrunedReplica(Blocks())
    replica.set_ratios(BlockRatios(0.6, 0.6, 0.6))
    replica.set_ratios(BlockRatios(0.001, 0.001, 0.001))
    for group in replica.groups.values():
        assert torch.equal(bits(group.pruned), bits(group.dense))


@given(first=ratios, second=ratios)
def test_pruning_twice_equals_pruning_once(first, second):
    twice, once = PrunedReplica(Blocks()), PrunedReplica(Blocks())
    twice.set_ratios(BlockRatios(first, first, first))
    for replica in (twice, once):
        replica.set_ratios(BlockRatios(second, second, second))
    for group in GROUPS:
        assert torch.equal(bits(twice.groups[group].pruned), bits(once.groups[group].pruned))


def test_pruning_leaves_the_dense_weights_as_they_were():
    model = Blocks()
    before = snapshot(model)
    PrunedReplica(model).set_ratios(BlockRatios(0.3, 0.5, 0.9))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("changed", GROUPS)
def test_only_the_group_whose_ratio_changed_is_rewritten(changed):
    replica = PrunedReplica(Blocks())
    replica.set_ratios(BlockRatios(0.3, 0.3, 0.3))
    for group in replica.groups.values():
        group.pruned.fill_(7)
    replica.set_ratios(BlockRatios(**{**dict.fromkeys(GROUPS, 0.3), changed: 0.4}))
    untouched = {name for name, group in replica.groups.items() if bool((group.pruned == 7).all())}
    assert untouched == set(GROUPS) - {changed}


# Memory


def test_every_unpruned_tensor_is_shared_with_the_dense_unet():
    unet = small_unet()
    replica = PrunedReplica(unet)
    targets = {
        f"{name}.weight"
        for name, layer in unet.named_modules()
        if any(layer is target for group in GROUPS for target in target_layers(unet, group))
    }
    pruned = replica.pruned.state_dict()
    for name, tensor in unet.state_dict().items():
        shared = tensor.data_ptr() == pruned[name].data_ptr()
        assert shared == (name not in targets), name


def test_buffers_are_shared_too():
    model = Blocks()
    assert PrunedReplica(model).pruned.timesteps.data_ptr() == model.timesteps.data_ptr()


@pytest.mark.parametrize("side", ["dense", "pruned"])
def test_the_weights_of_a_group_are_views_of_one_flat_buffer(side):
    replica = PrunedReplica(small_unet())
    for name, group in replica.groups.items():
        flat = getattr(group, side)
        weights = weights_of(getattr(replica, side), name)
        starts = [
            (weight.data_ptr() - flat.data_ptr()) // flat.element_size() for weight in weights
        ]
        sizes = [weight.numel() for weight in weights]
        assert starts == [sum(sizes[:i]) for i in range(len(sizes))]
        assert sum(sizes) == flat.numel()


def test_addresses_never_change_as_the_ratios_do():
    replica = PrunedReplica(small_unet())
    before = [tensor.data_ptr() for tensor in replica.pruned.parameters()]
    for ratio in (0.3, 0.0, 0.9):
        replica.set_ratios(BlockRatios(ratio, ratio, ratio))
    assert [tensor.data_ptr() for tensor in replica.pruned.parameters()] == before


def test_pack_follows_the_dense_weights_to_another_dtype_at_the_same_ratios():
    moved, fresh = PrunedReplica(Blocks()), PrunedReplica(Blocks(torch.bfloat16))
    moved.set_ratios(BlockRatios(0.2, 0.4, 0.6))
    moved.dense.to(torch.bfloat16)
    moved.pack()
    fresh.set_ratios(BlockRatios(0.2, 0.4, 0.6))
    for group in GROUPS:
        assert torch.equal(bits(moved.groups[group].pruned), bits(fresh.groups[group].pruned))


def test_release_leaves_each_dense_layer_a_weight_of_its_own():
    model = Blocks()
    before = snapshot(model)
    PrunedReplica(model).release()
    for group in GROUPS:
        for weight in weights_of(model, group):
            assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# Changes that the pruned UNet did not see


class Ring:
    """Holds itself."""

    def __init__(self, number: int) -> None:
        self.number, self.ring = number, self


def twice(x: float) -> float:
    return 2 * x


SETTINGS: dict[str, tuple[object, object]] = {
    "int": (1, 2),
    "float": (0.1, 0.2),
    "none": (None, 1),
    "tuple": ((1, "a"), (1, "b")),
    "list": ([1], [1, 2]),
    "dict": ({"style": [0.5]}, {"style": [0.25]}),
    "tensor": (torch.ones(2), torch.zeros(2)),
    "array": (np.ones(2), np.zeros(2)),
    "object": (Ring(1), Ring(2)),
    "partial": (partial(twice, 1.0), partial(twice, 2.0)),
    "method": (Ring(1).__init__, Ring(1).__repr__),
    "function": (twice, lambda x: 3 * x),
    "class": (Ring, Blocks),
    "generator": (np.random.default_rng(0).random, None),
}


@pytest.mark.parametrize(("before", "after"), SETTINGS.values(), ids=SETTINGS.keys())
def test_a_setting_of_any_kind_is_alike_until_it_is_changed(before, after):
    model = Blocks()
    model.mid_block.setting = before
    replica = PrunedReplica(model)
    assert replica.change() is None
    model.mid_block.setting = after
    assert replica.change() == "mid_block.setting"


def test_a_new_setting_is_a_change_and_one_that_went_too():
    model = Blocks()
    model.old = 1
    replica = PrunedReplica(model)
    model.new = 1
    assert replica.change() == "new"
    del model.new, model.old
    assert replica.change() == "old"


def test_a_number_that_only_rounding_changed_is_no_change():
    model = Blocks()
    model.scale = 0.7
    replica = PrunedReplica(model)
    model.scale = math.nextafter(model.scale, 1)
    assert replica.change() is None


def test_hooks_on_both_are_no_change_and_one_on_the_dense_blocks_is():
    replica = PrunedReplica(Blocks())
    for unet in (replica.dense, replica.pruned):
        unet.mid_block.register_forward_hook(twice)
    assert replica.change() is None
    replica.dense.up_blocks.register_forward_pre_hook(twice)
    assert replica.change() == "up_blocks._forward_pre_hooks"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_weights_written_in_place_are_a_change_until_they_are_packed(dtype, group):
    replica = PrunedReplica(Blocks(dtype))
    replica.set_ratios(BlockRatios(0.2, 0.4, 0.6))
    weights_of(replica.dense, group)[-1].mul_(2)
    assert replica.change() == f"the weights of its {group} blocks"
    replica.pack()
    assert replica.change() is None


def test_a_change_is_seen_in_every_layer_of_a_group_too_large_to_read(monkeypatch):
    monkeypatch.setattr("crdiff_core.pruning._NUM_SAMPLED", 20)  # Of 120 weights, 30 a layer.
    replica = PrunedReplica(Blocks())
    for weights in weights_of(replica.dense, "down"):
        before = weights.clone()
        weights += 1
        assert replica.change() == "the weights of its down blocks"
        weights.copy_(before)
        assert replica.change() is None


def test_weights_that_are_not_numbers_are_no_change():
    model = Blocks()
    weights_of(model, "up")[0].fill_(math.nan)
    assert PrunedReplica(model).change() is None


# What cannot be pruned


def test_a_group_of_two_dtypes_is_refused():
    model = Blocks()
    model.up_blocks[0].ff.to(torch.float16)
    with pytest.raises(PruningError, match=r"up blocks hold torch.float16 on cpu, torch.float32"):
        PrunedReplica(model)


def test_double_precision_is_refused():
    with pytest.raises(PruningError, match=r"down blocks hold torch.float64 on cpu: load"):
        PrunedReplica(Blocks(torch.float64))


def test_weights_that_are_not_loaded_are_refused():
    with pytest.raises(PruningError, match=r"torch.float32 on meta: load"):
        PrunedReplica(Blocks().to("meta"))
