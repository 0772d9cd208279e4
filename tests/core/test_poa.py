"""POA around two UNets, and apply / remove on real pipelines."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
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
