"""POA around two UNets, and apply / remove on real pipelines."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import accelerate
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

import crdiff_core
from crdiff_core import BlockRatios, RatiosFile, Resolution
from crdiff_core.errors import ModelError, PruningError, RatiosError
from crdiff_core.models import Model
from crdiff_core.poa import POADenoiser, bake
from crdiff_core.pruning import num_prunable
from crdiff_core.ratios import GROUPS, group_of
from tests.core.conftest import CPU
from tests.pipelines import HIDDEN, small_unet

# Diffusers' scheduler calls np.array on a tensor, which torch has not yet adapted to numpy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

RATIOS = BlockRatios(down=0.4, mid=0.6, up=0.5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def prune(unet: nn.Module, ratios: BlockRatios = RATIOS) -> nn.Module:
    """The reference implementation's way, in place."""
    for group in GROUPS:
        layers = [
            layer
            for name, layer in unet.named_modules()
            if group_of(name) == group and isinstance(layer, nn.Linear | nn.Conv2d)
        ]
        magnitudes = torch.cat([layer.weight.detach().abs().flatten() for layer in layers])
        threshold = magnitudes.kthvalue(int(ratios[group] * len(magnitudes))).values
        for layer in layers:
            layer.weight.data.mul_(layer.weight.abs() > threshold)
    return unet


def unet_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    sample = torch.randn(2, 4, 6, 10, generator=generator)
    text = torch.randn(2, 5, HIDDEN, generator=generator)
    return sample.to(dtype), torch.tensor(7), text.to(dtype)


@torch.no_grad()
def call(unet: nn.Module) -> Tensor:
    output: Tensor = unet(*unet_inputs(unet.dtype), return_dict=False)[0]
    return output


def unet_of(dtype: torch.dtype = torch.float32) -> Any:
    return small_unet().eval().to(dtype)


@torch.no_grad()
def draw(pipe: Any, resolution: str = "16x24", **settings: Any) -> Tensor:
    size = Resolution.parse(resolution)
    images: Tensor = pipe(
        "a cat",
        height=size.height,
        width=size.width,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
        **settings,
    ).images
    return images


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(module: nn.Module, before: dict[str, Tensor]) -> None:
    now = module.state_dict()
    assert list(now) == list(before)
    for name, tensor in before.items():
        # As bytes: -0.0 is not 0.0 here.
        ours, theirs = now[name].contiguous(), tensor.contiguous()
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name


def count_calls(denoiser: POADenoiser) -> dict[str, int]:
    calls = {"dense": 0, "pruned": 0}

    def count(name: str) -> None:
        def hook(*_: Any) -> None:
            calls[name] += 1

        getattr(denoiser, name).register_forward_hook(hook)

    for name in calls:
        count(name)
    return calls


# The formula


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_one_equals_the_pruned_unet(dtype):
    expected = call(prune(unet_of(dtype)))
    assert torch.equal(call(POADenoiser(unet_of(dtype), RATIOS, 1.0)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_zero_equals_the_dense_unet(dtype):
    assert torch.equal(call(POADenoiser(unet_of(dtype), RATIOS, 0.0)), call(unet_of(dtype)))


@pytest.mark.parametrize("poa_weight", [0.0, 1.0, 1.5])
def test_ratios_of_zero_equal_the_dense_unet(poa_weight):
    denoiser = POADenoiser(unet_of(), RATIOS, poa_weight)
    denoiser.configure(BlockRatios(), poa_weight)
    assert torch.equal(call(denoiser), call(unet_of()))


@pytest.mark.parametrize("poa_weight", [-0.5, 0.3, 1.5, 4.0])
def test_any_weight_combines_the_two_by_equation_2(poa_weight):
    dense, pruned = call(unet_of()), call(prune(unet_of()))
    expected = poa_weight * pruned + (1 - poa_weight) * dense
    torch.testing.assert_close(call(POADenoiser(unet_of(), RATIOS, poa_weight)), expected)


def test_pruning_changes_what_the_unet_says():
    assert not torch.allclose(call(prune(unet_of())), call(unet_of()), atol=1e-3)


@pytest.mark.parametrize(
    ("poa_weight", "ratios", "expected"),
    [
        (1.0, RATIOS, {"dense": 0, "pruned": 1}),
        (0.0, RATIOS, {"dense": 1, "pruned": 0}),
        (1.5, RATIOS, {"dense": 1, "pruned": 1}),
        (1.5, BlockRatios(), {"dense": 1, "pruned": 0}),
    ],
)
def test_only_the_passes_that_count_are_made(poa_weight, ratios, expected):
    denoiser = POADenoiser(unet_of(), ratios, poa_weight)
    calls = count_calls(denoiser)
    call(denoiser)
    assert calls == expected


def test_the_output_is_what_a_pipeline_expects_with_and_without_return_dict():
    denoiser = POADenoiser(unet_of(), RATIOS)
    with torch.no_grad():
        assert torch.equal(denoiser(*unet_inputs()).sample, call(denoiser))


def test_it_answers_as_the_dense_unet():
    unet = unet_of()
    denoiser = POADenoiser(unet, RATIOS)
    assert denoiser.config is unet.config
    assert denoiser.dtype == unet.dtype
    assert denoiser.time_embedding is unet.time_embedding


def test_an_attribute_that_the_dense_unet_lacks_is_missing():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = POADenoiser(unet_of(), RATIOS).nonsense


# Offloading


def test_a_unet_offloaded_as_a_whole_is_refused():
    unet, _ = accelerate.cpu_offload_with_hook(unet_of(), CPU)
    with pytest.raises(PruningError, match=r"the UNet is offloaded, .* without enable_model_cpu"):
        POADenoiser(unet, RATIOS)


def test_a_unet_offloaded_layer_by_layer_is_refused():
    with pytest.raises(PruningError, match="the UNet is offloaded"):
        POADenoiser(accelerate.cpu_offload(unet_of(), CPU), RATIOS)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_a_unet_offloaded_in_groups_is_refused(kind):
    unet = unet_of()
    num_blocks = 1 if kind == "block_level" else None
    unet.enable_group_offload(CPU, CPU, offload_type=kind, num_blocks_per_group=num_blocks)
    with pytest.raises(PruningError, match="the UNet is offloaded"):
        POADenoiser(unet, RATIOS)


# Apply with ratios


def test_pictures_at_weight_one_are_those_of_the_pruned_pipeline(pipe):
    pruned = copy.deepcopy(pipe.unet)
    ours = draw(crdiff_core.apply(pipe, RATIOS, poa_weight=1.0))
    pipe.unet = prune(pruned)
    assert torch.equal(ours, draw(pipe))


def test_pictures_at_weight_zero_are_those_of_the_dense_pipeline(pipe):
    expected = draw(pipe)
    assert torch.equal(draw(crdiff_core.apply(pipe, RATIOS, poa_weight=0.0)), expected)


def test_pictures_at_the_default_weight_are_others(pipe):
    before = draw(pipe)
    assert not torch.allclose(draw(crdiff_core.apply(pipe, RATIOS)), before, atol=1e-3)


def test_the_default_weight_is_the_papers(sd_pipe):
    assert crdiff_core.apply(sd_pipe, RATIOS).unet.poa_weight == 1.5


def test_apply_returns_the_pipeline_it_changed(pipe):
    assert crdiff_core.apply(pipe, RATIOS) is pipe


def test_applying_twice_is_the_second_alone(pipe):
    once = crdiff_core.apply(copy.deepcopy(pipe), RATIOS)
    crdiff_core.apply(pipe, BlockRatios(0.9, 0.0, 0.2), poa_weight=1.2)
    assert torch.equal(draw(crdiff_core.apply(pipe, RATIOS)), draw(once))


def test_applying_twice_does_not_nest(sd_pipe):
    denoiser = crdiff_core.apply(sd_pipe, RATIOS).unet
    assert crdiff_core.apply(sd_pipe, BlockRatios(up=0.2)).unet is denoiser
    assert not isinstance(denoiser.dense, POADenoiser)


def test_a_pipeline_without_a_unet_is_refused():
    with pytest.raises(ModelError, match="object has no UNet2DConditionModel: CR-Diff prunes"):
        crdiff_core.apply(object(), RATIOS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_moving_to_a_dtype_after_apply_equals_moving_before(sd_folder, dtype):
    after = crdiff_core.apply(Model("small", str(sd_folder)).load(CPU), RATIOS).unet.to(dtype)
    before = crdiff_core.apply(Model("small", str(sd_folder)).load(CPU).to(dtype=dtype), RATIOS)
    assert torch.equal(call(after), call(before.unet))
    assert_same_bits(after.pruned, snapshot(before.unet.pruned))


def test_ratios_can_be_changed_after_moving_to_a_dtype(sd_pipe):
    denoiser = crdiff_core.apply(sd_pipe, BlockRatios(0.1, 0.1, 0.1), poa_weight=1.0).unet
    denoiser.to(torch.bfloat16)
    crdiff_core.apply(sd_pipe, RATIOS, poa_weight=1.0)
    expected = prune(copy.deepcopy(denoiser.dense))
    assert torch.equal(call(denoiser), call(expected))


# Apply with a file


def ratios_file(path: Path, pipe: Any, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "model": "small",
        "resolution": Resolution(16, 24),
        "score": 0.5,
        "ratios": RATIOS,
        "poa_weight": 1.25,
        "provenance": {"num_prunable": num_prunable(pipe.unet)},
    }
    RatiosFile(**{**settings, **changes}).write(path)
    return path


def reference_file(path: Path, model: str) -> Path:
    """A file with the reference implementation's keys alone."""
    path.write_text(
        json.dumps(
            {
                "model_config": {"name": model, "width": 24, "height": 16},
                "best_avg_score": 0.5,
                "best_global_params_ratio": {
                    "down_ratio": RATIOS.down,
                    "up_ratio": RATIOS.up,
                    "mid_ratio": RATIOS.mid,
                },
            }
        )
    )
    return path


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_file_gives_ratios_and_weight(sd_pipe, tmp_path, as_type):
    path = as_type(ratios_file(tmp_path / "best_ratios.json", sd_pipe))
    denoiser = crdiff_core.apply(sd_pipe, path).unet
    assert (denoiser.ratios, denoiser.poa_weight) == (RATIOS, 1.25)


def test_an_own_weight_wins_over_the_files(sd_pipe, tmp_path):
    path = ratios_file(tmp_path / "file", sd_pipe)
    assert crdiff_core.apply(sd_pipe, path, poa_weight=0.0).unet.poa_weight == 0


def test_a_reference_file_applies_with_the_papers_weight(pipe, tmp_path):
    denoiser = crdiff_core.apply(pipe, reference_file(tmp_path / "file", "mine")).unet
    assert (denoiser.ratios, denoiser.poa_weight) == (RATIOS, 1.5)


def test_a_file_draws_what_its_ratios_draw(pipe, tmp_path):
    path = ratios_file(tmp_path / "file", pipe)
    from_file = draw(crdiff_core.apply(pipe, path))
    assert torch.equal(from_file, draw(crdiff_core.apply(pipe, RATIOS, poa_weight=1.25)))


def test_a_file_of_another_models_weights_is_refused(sd_pipe, tmp_path):
    provenance = {"num_prunable": {"down": 1, "mid": 2, "up": 3}}
    path = ratios_file(tmp_path / "file", sd_pipe, model="other", provenance=provenance)
    with pytest.raises(RatiosError, match=r"ratios are of other, .* have \{'down': 1.*: search"):
        crdiff_core.apply(sd_pipe, path)


@pytest.mark.parametrize(
    ("spelling", "model"), [("sdxl", "sdxl"), ("SD1.5", "sd15"), ("sd2.1", "sd21")]
)
def test_a_reference_file_of_another_of_the_papers_models_is_refused(
    sd_pipe, tmp_path, spelling, model
):
    path = reference_file(tmp_path / "file", spelling)
    with pytest.raises(RatiosError, match=f"ratios are of {model}, and this UNet attends to"):
        crdiff_core.apply(sd_pipe, path)


@pytest.mark.parametrize(("width", "is_of"), [(768, "sd15"), (1024, "sd21")])
def test_a_file_of_the_other_sd_model_is_refused_although_the_counts_are_equal(
    sd_pipe, tmp_path, width, is_of
):
    sd_pipe.unet = small_unet(cross_attention_dim=width)
    other = {"sd15": "sd21", "sd21": "sd15"}[is_of]
    with pytest.raises(RatiosError, match=f"are of {other}, .* {width} channels, as {is_of} does"):
        crdiff_core.apply(sd_pipe, ratios_file(tmp_path / "other", sd_pipe, model=other))
    crdiff_core.apply(sd_pipe, ratios_file(tmp_path / "own", sd_pipe, model=is_of))


def test_a_refused_file_leaves_the_pipeline_as_it_was(sd_pipe, tmp_path):
    unet = sd_pipe.unet
    with pytest.raises(RatiosError):
        crdiff_core.apply(sd_pipe, reference_file(tmp_path / "file", "sdxl"))
    assert sd_pipe.unet is unet


def test_a_file_is_checked_when_applied_again_too(sd_pipe, tmp_path):
    crdiff_core.apply(sd_pipe, RATIOS)
    with pytest.raises(RatiosError, match="ratios are of sdxl"):
        crdiff_core.apply(sd_pipe, reference_file(tmp_path / "file", "sdxl"))


def test_drawing_the_files_resolution_warns_of_nothing(pipe, tmp_path):
    draw(crdiff_core.apply(pipe, ratios_file(tmp_path / "file", pipe)), "16x24")


@pytest.mark.parametrize("resolution", ["24x16", "32x32"])
def test_drawing_another_resolution_warns_exactly_once(pipe, tmp_path, resolution):
    crdiff_core.apply(pipe, ratios_file(tmp_path / "file", pipe))
    with pytest.warns(UserWarning, match="ratios searched for latents of 8x12 are") as caught:
        [draw(pipe, resolution) for _ in range(2)]
    assert len([each for each in caught if each.category is UserWarning]) == 1


def test_ratios_after_a_file_know_no_resolution(sd_pipe, tmp_path):
    crdiff_core.apply(sd_pipe, ratios_file(tmp_path / "file", sd_pipe))
    draw(crdiff_core.apply(sd_pipe, RATIOS), "32x32")


# Remove


def test_remove_restores_the_unet_bit_for_bit(pipe):
    unet, before = pipe.unet, snapshot(pipe.unet)
    crdiff_core.apply(pipe, RATIOS)
    draw(pipe)
    crdiff_core.remove(pipe)
    assert pipe.unet is unet
    assert_same_bits(pipe.unet, before)


def test_remove_restores_the_pictures(pipe):
    before = draw(pipe)
    draw(crdiff_core.apply(pipe, RATIOS))
    assert torch.equal(draw(crdiff_core.remove(pipe)), before)


def test_remove_leaves_no_weight_tied_to_a_buffer(sd_pipe):
    crdiff_core.remove(crdiff_core.apply(sd_pipe, RATIOS))
    for name, weight in sd_pipe.unet.named_parameters():
        assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size(), name


def test_remove_keeps_what_is_trainable(sd_pipe):
    sd_pipe.unet.requires_grad_(True)
    crdiff_core.remove(crdiff_core.apply(sd_pipe, RATIOS))
    assert all(weight.requires_grad for weight in sd_pipe.unet.parameters())


def test_removing_from_an_untouched_pipeline_does_nothing(sd_pipe):
    unet = sd_pipe.unet
    assert crdiff_core.remove(sd_pipe) is sd_pipe
    assert sd_pipe.unet is unet


def test_applying_after_remove_draws_as_at_first(sd_pipe):
    first = draw(crdiff_core.apply(sd_pipe, RATIOS))
    crdiff_core.remove(sd_pipe)
    assert torch.equal(draw(crdiff_core.apply(sd_pipe, RATIOS)), first)


def test_a_pipeline_saved_after_remove_is_the_one_that_was_loaded(pipe, folder, tmp_path):
    crdiff_core.remove(crdiff_core.apply(pipe, RATIOS)).save_pretrained(tmp_path / "saved")
    saved = Model("small", str(tmp_path / "saved")).load(CPU)
    assert_same_bits(saved.unet, snapshot(Model("small", str(folder)).load(CPU).unet))


def test_saving_while_applied_does_not_spoil_saving_after_remove(sd_pipe, tmp_path):
    crdiff_core.apply(sd_pipe, RATIOS).save_pretrained(tmp_path / "applied")
    shutil.rmtree(tmp_path / "applied")
    crdiff_core.remove(sd_pipe).save_pretrained(tmp_path / "saved")
    assert Model("small", str(tmp_path / "saved")).load(CPU).unet is not None


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -0.1, 10.1])
def test_a_poa_weight_out_of_range_is_refused(sd_pipe, weight):
    with pytest.raises(RatiosError, match=r"poa_weight .* is outside \[0, 10\]: give 1 for"):
        crdiff_core.apply(sd_pipe, RATIOS, poa_weight=weight)
    assert not isinstance(sd_pipe.unet, POADenoiser)


# Applied, for a block


def test_within_the_block_cr_diff_is_applied_and_after_it_nothing_is_left(pipe):
    unet, before = pipe.unet, snapshot(pipe.unet)
    expected = draw(crdiff_core.apply(copy.deepcopy(pipe), RATIOS, poa_weight=1.2))
    with crdiff_core.applied(pipe, RATIOS, poa_weight=1.2) as within:
        assert within is pipe
        assert torch.equal(draw(pipe), expected)
    assert pipe.unet is unet
    assert_same_bits(pipe.unet, before)


def test_an_exception_ends_the_block_and_leaves_nothing_either(sd_pipe, tmp_path):
    unet = sd_pipe.unet
    with (
        pytest.raises(ZeroDivisionError),
        crdiff_core.applied(sd_pipe, ratios_file(tmp_path / "file", sd_pipe)),
    ):
        _ = 1 / 0
    assert sd_pipe.unet is unet


def test_after_the_block_earlier_ratios_are_back(sd_pipe, tmp_path):
    file = ratios_file(tmp_path / "file", sd_pipe)
    denoiser = crdiff_core.apply(sd_pipe, file).unet
    expected = draw(sd_pipe)
    with crdiff_core.applied(sd_pipe, BlockRatios(0.9, 0.0, 0.2), poa_weight=1.0):
        assert sd_pipe.unet.ratios == BlockRatios(0.9, 0.0, 0.2)
        draw(sd_pipe, "32x32")  # These ratios know no resolution to warn of.
    assert sd_pipe.unet is denoiser
    assert (denoiser.ratios, denoiser.poa_weight) == (RATIOS, 1.25)
    assert torch.equal(draw(sd_pipe), expected)
    with pytest.warns(UserWarning, match="ratios searched for latents of 8x12"):
        draw(sd_pipe, "32x32")


def test_blocks_nest(sd_pipe):
    unet = sd_pipe.unet
    with crdiff_core.applied(sd_pipe, RATIOS):
        with crdiff_core.applied(sd_pipe, BlockRatios(up=0.2)):
            pass
        assert sd_pipe.unet.ratios == RATIOS
        crdiff_core.remove(sd_pipe)  # By hand: leaving the block then has nothing to do.
    assert sd_pipe.unet is unet


def test_a_refused_file_opens_no_block(sd_pipe, tmp_path):
    unet = sd_pipe.unet
    with (
        pytest.raises(RatiosError, match="ratios are of sdxl"),
        crdiff_core.applied(sd_pipe, reference_file(tmp_path / "file", "sdxl")),
    ):
        pytest.fail("the block ran")
    assert sd_pipe.unet is unet


# Bake


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_baked_unet_is_the_pruned_one(sd_pipe, dtype):
    sd_pipe.to(dtype=dtype)
    expected = prune(copy.deepcopy(sd_pipe.unet))
    unet = sd_pipe.unet
    assert bake(sd_pipe, RATIOS) is sd_pipe
    assert sd_pipe.unet is unet
    assert torch.equal(call(unet), call(expected))
    for name, weight in unet.named_parameters():
        assert torch.equal(weight, expected.get_parameter(name)), name
        assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size(), name


def test_baking_ratios_of_zero_changes_nothing(sd_pipe):
    before = snapshot(sd_pipe.unet)
    bake(sd_pipe, BlockRatios())
    assert_same_bits(sd_pipe.unet, before)


# What is done to a pipeline after apply


def assert_alike(found: Tensor, expected: Tensor) -> None:
    """Equal but for the last digits, which on some CPUs depend on where the weights lie."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def in_a_block(pipe: Any) -> Any:
    """A transformer block of the UNet, in its middle."""
    return pipe.unet.mid_block.attentions[0].transformer_blocks[0]


def ip_adapter(pipe: Any) -> None:
    """Load an IP-Adapter of random weights into the UNet."""
    generator = torch.Generator().manual_seed(6)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    image = {"proj.weight": random(4 * HIDDEN, 8), "proj.bias": random(4 * HIDDEN)}
    image |= {"norm.weight": torch.ones(HIDDEN), "norm.bias": torch.zeros(HIDDEN)}
    keys = {}
    crossed = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for place, name in enumerate(crossed):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for kind in "kv":
            keys[f"{2 * place + 1}.to_{kind}_ip.weight"] = random(width, HIDDEN)
    pipe.unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": keys}])


def lora(pipe: Any, name: str = "style") -> None:
    """Load a LoRA of random weights, for some attention and feed-forward layers."""
    generator = torch.Generator().manual_seed(7)
    unet = pipe.unet.dense if isinstance(pipe.unet, POADenoiser) else pipe.unet
    weights = {}
    for layer, module in unet.named_modules():
        layer = layer.removesuffix(".base_layer")  # Of another LoRA.
        if isinstance(module, nn.Linear) and layer.endswith(("to_q", "ff.net.0.proj")):
            rows, columns = module.weight.shape
            for side, shape in {"A": (2, columns), "B": (rows, 2)}.items():
                key = f"unet.{layer}.lora_{side}.weight"
                weights[key] = 0.3 * torch.randn(*shape, generator=generator)
    pipe.load_lora_weights(weights, adapter_name=name)


def set_weight(pipe: Any) -> None:
    in_a_block(pipe).attn1.to_q.weight.data.add_(0.1)


def replace_weight(pipe: Any) -> None:
    layer = in_a_block(pipe).attn1.to_q
    layer.weight = nn.Parameter(layer.weight + 0.1)


def replace_shared_weight(pipe: Any) -> None:
    layer = in_a_block(pipe).attn2.to_q
    layer.weight = nn.Parameter(layer.weight + 0.1)


def load_weights(pipe: Any) -> None:
    other = {name: tensor * 0.9 for name, tensor in pipe.unet.up_blocks.state_dict().items()}
    pipe.unet.up_blocks.load_state_dict(other)


def replace_module(pipe: Any) -> None:
    pipe.unet.mid_block.resnets[0].nonlinearity = nn.ReLU()


def replace_forward(pipe: Any) -> None:
    layer = in_a_block(pipe).ff
    layer.forward = MethodType(lambda self, x: 0.5 * type(self).forward(self, x), layer)


def hook(pipe: Any) -> None:
    in_a_block(pipe).ff.register_forward_hook(lambda _, __, output: 0.5 * output)


CHANGES: dict[str, Callable[[Any], object]] = {
    "freeu": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "processors": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
    "one processor": lambda pipe: in_a_block(pipe).attn1.set_processor(AttnProcessor()),
    "attention slices": lambda pipe: pipe.enable_attention_slicing(1),
    "fused projections": lambda pipe: pipe.unet.fuse_qkv_projections(),
    "a setting": lambda pipe: setattr(in_a_block(pipe).attn1, "scale", 0.1),
    "a module": replace_module,
    "a forward": replace_forward,
    "a hook": hook,
    "a weight in place": set_weight,
    "a weight": replace_weight,
    "a weight that is not pruned": replace_shared_weight,
    "a state dict": load_weights,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_after_apply_is_an_error_at_the_next_drawing(sd_pipe, change):
    draw(crdiff_core.apply(sd_pipe, RATIOS))
    change(sd_pipe)
    with pytest.raises(PruningError, match=r"the UNet changed after .*: call .*remove") as caught:
        draw(sd_pipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_applying_anew_takes_the_change_into_both_passes(sd_pipe, change):
    changed = copy.deepcopy(sd_pipe)
    change(changed)
    change(crdiff_core.apply(sd_pipe, RATIOS))
    crdiff_core.apply(crdiff_core.remove(sd_pipe), RATIOS)
    expected = draw(crdiff_core.apply(changed, RATIOS))
    assert_alike(draw(sd_pipe), expected)


def test_the_error_names_what_was_changed(sd_pipe):
    crdiff_core.apply(sd_pipe, RATIOS).enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(PruningError, match=r"was applied \(up_blocks\.0\.(s1|s2|b1|b2)\)"):
        draw(sd_pipe)


def test_a_change_that_is_taken_back_is_none(sd_pipe):
    expected = draw(crdiff_core.apply(sd_pipe, RATIOS))
    sd_pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    for block in sd_pipe.unet.up_blocks:
        for name in ("s1", "s2", "b1", "b2"):
            delattr(block, name)
    assert_alike(draw(sd_pipe), expected)


def test_a_change_between_two_steps_is_an_error_at_the_second(sd_pipe):
    steps = []

    def change(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        steps.append(step)
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        return {}

    crdiff_core.apply(sd_pipe, RATIOS)
    with pytest.raises(PruningError, match="the UNet changed after"):
        draw(sd_pipe, callback_on_step_end=change)
    assert steps == [0]


@pytest.mark.parametrize("poa_weight", [0.0, 1.0, 1.5])
def test_the_unets_are_compared_once_for_each_drawing(pipe, poa_weight):
    denoiser = crdiff_core.apply(pipe, RATIOS, poa_weight).unet
    compare, comparisons = denoiser.replica.change, []
    denoiser.replica.change = lambda: comparisons.append(compare())
    for num in (1, 2):
        draw(pipe)
        assert len(comparisons) == num


def test_a_whole_unet_offloaded_after_apply_is_an_error_at_the_next_drawing(sd_pipe):
    crdiff_core.apply(sd_pipe, RATIOS)
    sd_pipe.unet.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    with pytest.raises(PruningError, match="the UNet changed after"):
        draw(sd_pipe)


def test_a_method_in_place_of_a_forward_before_apply_is_in_both_passes(sd_pipe):
    replace_forward(sd_pipe)
    expected = prune(copy.deepcopy(sd_pipe.unet))
    assert_alike(call(crdiff_core.apply(sd_pipe, RATIOS, 1.0).unet), call(expected))


def test_a_function_in_place_of_a_forward_is_refused(sd_pipe):
    layer = in_a_block(sd_pipe).ff
    own = layer.forward
    layer.forward = lambda x: 0.5 * own(x)
    with pytest.raises(PruningError, match=r"forward of .*\.ff was replaced by a f") as caught:
        crdiff_core.apply(sd_pipe, RATIOS)
    assert "\n" not in str(caught.value)


def test_an_ip_adapter_from_before_apply_is_in_both_passes(sd_pipe):
    ip_adapter(sd_pipe)
    image = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(8))
    pruned = prune(copy.deepcopy(sd_pipe.unet))
    own = {"added_cond_kwargs": {"image_embeds": [image]}}
    with torch.no_grad():
        expected = pruned(*unet_inputs(), **own).sample
        assert not torch.allclose(expected, pruned(*unet_inputs(), **swapped(own)).sample)
        denoiser = crdiff_core.apply(sd_pipe, RATIOS, poa_weight=1.0).unet
        assert_alike(denoiser(*unet_inputs(), **own).sample, expected)


def swapped(own: dict[str, Any]) -> dict[str, Any]:
    (image,) = own["added_cond_kwargs"]["image_embeds"]
    return {"added_cond_kwargs": {"image_embeds": [image.flip(0)]}}


def test_an_ip_adapter_after_apply_is_an_error(sd_pipe):
    ip_adapter(crdiff_core.apply(sd_pipe, RATIOS))
    with pytest.raises(PruningError, match="the UNet changed after"):
        draw(sd_pipe)


def test_an_ip_adapters_scale_after_apply_is_an_error(sd_pipe):
    ip_adapter(sd_pipe)
    crdiff_core.apply(sd_pipe, RATIOS).set_ip_adapter_scale(0.3)
    with pytest.raises(PruningError, match=r"the UNet changed after .*attn2\.processor\.scale\)"):
        call(sd_pipe.unet)


def test_a_t2i_adapters_residuals_reach_both_passes():
    # The UNet empties their list.
    def residuals() -> list[Tensor]:
        generator = torch.Generator().manual_seed(9)
        shapes = ((2, 16, 6, 10), (2, 32, 3, 5))
        return [torch.randn(*shape, generator=generator) for shape in shapes]

    def adapted(unet: nn.Module) -> Tensor:
        given = residuals()
        with torch.no_grad():
            output: Tensor = unet(
                *unet_inputs(), down_intrablock_additional_residuals=given, return_dict=False
            )[0]
        return output

    dense, pruned = adapted(unet_of()), adapted(prune(unet_of()))
    assert not torch.allclose(pruned, call(prune(unet_of())), atol=1e-3)
    expected = 1.5 * pruned - 0.5 * dense
    torch.testing.assert_close(adapted(POADenoiser(unet_of(), RATIOS, 1.5)), expected)


def test_a_pipeline_saved_while_applied_is_the_dense_one(sd_pipe, sd_folder, tmp_path):
    crdiff_core.apply(sd_pipe, RATIOS).save_pretrained(tmp_path / "saved")
    saved = Model("small", str(tmp_path / "saved")).load(CPU)
    assert_same_bits(saved.unet, snapshot(Model("small", str(sd_folder)).load(CPU).unet))


# LoRA, where peft is installed


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


@pytest.mark.usefixtures("peft")
def test_a_lora_from_before_apply_is_whole_in_both_passes_and_not_prunable(pipe):
    bare, num_bare = copy.deepcopy(pipe), num_prunable(pipe.unet)
    lora(pipe)
    assert num_prunable(pipe.unet) == num_bare
    # Pruned by hand before the LoRA comes, by which its layers have other names.
    expected = copy.deepcopy(bare)
    prune(expected.unet)
    lora(expected)
    assert_alike(draw(crdiff_core.apply(pipe, RATIOS, poa_weight=1.0)), draw(expected))
    lora(bare)
    assert_alike(draw(crdiff_core.apply(pipe, RATIOS, poa_weight=0.0)), draw(bare))


@pytest.mark.usefixtures("peft")
def test_a_lora_changes_the_pictures(pipe):
    before = draw(crdiff_core.apply(copy.deepcopy(pipe), RATIOS))
    lora(pipe)
    assert not torch.allclose(draw(crdiff_core.apply(pipe, RATIOS)), before, atol=1e-2)


@pytest.mark.usefixtures("peft")
def test_removing_leaves_the_lora_as_it_was(sd_pipe):
    lora(sd_pipe)
    expected = draw(sd_pipe)
    draw(crdiff_core.apply(sd_pipe, RATIOS))
    assert_alike(draw(crdiff_core.remove(sd_pipe)), expected)


@pytest.mark.usefixtures("peft")
def test_a_lora_after_apply_is_an_error(pipe):
    lora(crdiff_core.apply(pipe, RATIOS))
    with pytest.raises(PruningError, match="the UNet changed after"):
        draw(pipe)
    fresh = copy.deepcopy(crdiff_core.remove(pipe))
    assert_alike(draw(crdiff_core.apply(pipe, RATIOS)), draw(crdiff_core.apply(fresh, RATIOS)))


LORA_CHANGES: dict[str, Callable[[Any], object]] = {
    "unloaded": lambda pipe: pipe.unload_lora_weights(),
    "weaker": lambda pipe: pipe.set_adapters("style", 0.5),
    "disabled": lambda pipe: pipe.disable_lora(),
    "deleted": lambda pipe: pipe.delete_adapters("style"),
    "fused": lambda pipe: pipe.fuse_lora(components=["unet"]),
    "another": lambda pipe: lora(pipe, "another"),
}


# Of a second LoRA, to whom it may concern.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.usefixtures("peft")
@pytest.mark.parametrize("change", LORA_CHANGES.values(), ids=LORA_CHANGES.keys())
def test_what_is_done_to_a_lora_after_apply_is_an_error_until_it_is_applied_anew(sd_pipe, change):
    lora(sd_pipe)
    changed = copy.deepcopy(sd_pipe)
    change(changed)
    change(crdiff_core.apply(sd_pipe, RATIOS))
    with pytest.raises(PruningError, match="the UNet changed after"):
        draw(sd_pipe)
    crdiff_core.apply(crdiff_core.remove(sd_pipe), RATIOS)
    assert_alike(draw(sd_pipe), draw(crdiff_core.apply(changed, RATIOS)))


@pytest.mark.usefixtures("peft")
@pytest.mark.parametrize("poa_weight", [0.0, 1.0, 1.5])
def test_a_loras_scale_for_one_call_reaches_both_passes(sd_pipe, poa_weight):
    lora(sd_pipe)
    half = copy.deepcopy(sd_pipe)
    half.set_adapters("style", 0.3)
    expected = draw(crdiff_core.apply(half, RATIOS, poa_weight))
    crdiff_core.apply(sd_pipe, RATIOS, poa_weight)
    for _ in range(2):  # The first leaves the scale changed by rounding.
        found = draw(sd_pipe, cross_attention_kwargs={"scale": 0.3})
        assert_alike(found, expected)


# Inference mode


@pytest.mark.parametrize("loads_within", [True, False])
def test_what_was_applied_in_inference_mode_is_changed_and_removed_outside(folder, loads_within):
    with torch.inference_mode(loads_within):
        pipe = Model("small", str(folder)).load(CPU)
    expected = draw(crdiff_core.apply(copy.deepcopy(pipe), RATIOS))
    before = snapshot(pipe.unet)
    with torch.inference_mode():
        draw(crdiff_core.apply(pipe, BlockRatios(0.1, 0.2, 0.3)))
    assert_alike(draw(crdiff_core.apply(pipe, RATIOS)), expected)
    with torch.inference_mode():
        assert_alike(draw(pipe), expected)
        crdiff_core.remove(pipe)
    assert_same_bits(pipe.unet, before)


def test_what_was_removed_in_inference_mode_can_be_trained(sd_pipe):
    sd_pipe.unet.requires_grad_(True)
    with torch.inference_mode():
        crdiff_core.remove(crdiff_core.apply(sd_pipe, RATIOS))
    sd_pipe.unet(*unet_inputs()).sample.sum().backward()
    torch.optim.SGD(sd_pipe.unet.parameters(), lr=0.1).step()
