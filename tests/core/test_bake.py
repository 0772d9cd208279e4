"""python -m crdiff_core.bake: the pruned model as a folder that plain diffusers draws with."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

import crdiff_core
from crdiff_core import bake, commands
from crdiff_core.errors import CRDiffError
from crdiff_core.models import Model
from crdiff_core.ratios import BlockRatios, RatiosFile, Resolution
from tests.core.conftest import CPU

RATIOS = BlockRatios(0.6, 0.5, 0.7)
BY_HAND = ("--down", "0.6", "--mid", "0.5", "--up", "0.7")
# Diffusers' scheduler calls np.array on a tensor, which torch has not yet adapted to numpy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def call(capsys, *arguments):
    """Run the command; its exit code and what it wrote."""
    code = bake.main([str(argument) for argument in arguments])
    written = capsys.readouterr()
    return code, written.out, written.err


def written(path, model="small", poa_weight=1.0, **provenance):
    """A ratios file with that provenance."""
    RatiosFile(model, Resolution(16, 24), 0.5, RATIOS, poa_weight, provenance).write(path)
    return path


@torch.no_grad()
def draw(pipe, resolution=(16, 24)):
    pipe.set_progress_bar_config(disable=True)
    height, width = resolution
    return pipe(
        "two red squares stacked on a white background",
        height=height,
        width=width,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images


def applied(model, ratios=RATIOS):
    return crdiff_core.apply(model.load(CPU), ratios, poa_weight=1.0)


def test_plain_diffusers_draws_what_apply_with_weight_1_draws(capsys, folder, tmp_path):
    file, out = written(tmp_path / "best.json"), tmp_path / "a new folder"
    code, said, warned = call(capsys, "--model", folder, "--ratios", file, "--out", out)

    assert (code, said, warned) == (0, f"{out}\n", "")
    baked = DiffusionPipeline.from_pretrained(out)
    assert type(baked.unet) is UNet2DConditionModel
    assert torch.equal(draw(baked), draw(applied(Model("small", str(folder)))))
    assert not torch.equal(draw(baked), draw(Model("small", str(folder)).load(CPU)))
    Model("baked", str(out)).check()  # We draw with it, too.


def test_the_embedded_model_bakes_by_its_ratios_file_alone(capsys, tmp_path):
    source = {"hub_id": "", "hub_revision": ""}
    file = written(tmp_path / "best.json", "shapes", source=source)
    code, _, _ = call(capsys, "--ratios", file, "--out", tmp_path / "baked")

    assert code == 0
    baked = DiffusionPipeline.from_pretrained(tmp_path / "baked")
    assert torch.equal(draw(baked, (24, 40)), draw(applied(Model("shapes")), (24, 40)))


def test_the_unet_alone_is_a_folder_of_its_own(capsys, sd_folder, tmp_path):
    out = tmp_path / "unet"
    code, _, _ = call(capsys, "--model", sd_folder, *BY_HAND, "--out", out, "--unet-only")

    assert code == 0
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    baked = UNet2DConditionModel.from_pretrained(out).state_dict()
    for name, weight in applied(Model("small", str(sd_folder))).unet.pruned.state_dict().items():
        assert torch.equal(baked[name], weight), name


@pytest.mark.parametrize("by_file", [True, False], ids=["the file's", "an option's"])
def test_the_dtype_is_that_of_the_search_or_the_options(capsys, sd_folder, tmp_path, by_file):
    recipe = {"dtype": "bfloat16" if by_file else "float16"}
    file = written(tmp_path / "best.json", recipe=recipe)
    dtype = [] if by_file else ["--dtype", "bfloat16"]
    call(capsys, "--model", sd_folder, "--ratios", file, "--out", tmp_path / "baked", *dtype)

    baked = DiffusionPipeline.from_pretrained(tmp_path / "baked", dtype=torch.bfloat16)
    expected = applied(Model("small", str(sd_folder), dtype="bfloat16")).unet.pruned.state_dict()
    for name, weight in baked.unet.state_dict().items():
        assert weight.dtype == torch.bfloat16, name
        assert torch.equal(weight, expected[name]), name


def test_a_vae_kept_in_float32_for_drawing_is_saved_in_the_models_dtype(
    capsys, sdxl_folder, tmp_path
):
    out, options = tmp_path / "baked", ["--dtype", "float16"]
    call(capsys, "--model", sdxl_folder, *BY_HAND, "--out", out, *options)
    model = Model("small", str(sdxl_folder), dtype="float16")

    assert model.load(CPU).vae.dtype == torch.float32
    sizes = [
        sum(file.stat().st_size for file in place.glob("vae/*.safetensors"))
        for place in (sdxl_folder, out)
    ]
    assert sizes[1] < 0.7 * sizes[0]


def test_nothing_of_this_machine_is_written_down(capsys, sd_folder, tmp_path):
    call(capsys, "--model", sd_folder, *BY_HAND, "--out", tmp_path / "baked")
    for file in (tmp_path / "baked").rglob("*.json"):
        assert str(sd_folder) not in file.read_text(), file


@pytest.mark.parametrize(("poa_weight", "warns"), [(1.5, True), (0.0, True), (None, False)])
def test_a_weight_that_is_lost_is_one_line_of_warning(
    capsys, sd_folder, tmp_path, poa_weight, warns
):
    file = written(tmp_path / "best.json")
    raw = {**json.loads(file.read_text()), "poa_weight": poa_weight}
    if poa_weight is None:  # As in the reference's files, whose search draws with 1.
        del raw["poa_weight"]
    file.write_text(json.dumps(raw))
    options = ["--model", sd_folder, "--ratios", file, "--out", tmp_path / "baked"]
    bake._baking(bake._parser().parse_args([str(option) for option in options]))
    error = capsys.readouterr().err

    assert error.count("\n") == warns
    if warns:
        assert f"were searched with poa_weight {poa_weight:g}" in error
        assert "use crdiff_core.apply" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model MODEL --ratios FILE", "the following arguments are required: --out"),
        ("--model MODEL --out TMP/a", "no --down --mid --up: give --ratios FILE"),
        ("--ratios FILE --out TMP/a", "no --model, and no ratios file"),
        ("--model MODEL --ratios FILE --out TMP", "is there already: give a new name"),
        ("--model MODEL --ratios FILE --out TMP/no/a", "is not a folder you may write to"),
        ("--model MODEL --ratios OTHER --out TMP/a", "prunable weights"),
        ("--model MODEL --ratios SDXL --out TMP/a", "attends to text of 16"),
        ("--model MODEL --ratios FILE --out TMP/a --dtype int8", "invalid choice: 'int8'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    capsys, sd_folder, tmp_path_factory, tmp_path, arguments, message
):
    files = tmp_path_factory.mktemp("files")
    places = {
        "MODEL": sd_folder,
        "FILE": written(files / "best.json"),
        "OTHER": written(files / "other.json", num_prunable={"down": 1, "mid": 2, "up": 3}),
        "SDXL": written(files / "sdxl.json", "sdxl"),
        "TMP": tmp_path,
    }
    for name, place in places.items():
        arguments = arguments.replace(name, str(place))
    code, said, error = call(capsys, *arguments.split(" "))

    assert (code, said) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_filled_is_not_made(tmp_path):
    def fill():
        with commands.new_folder(tmp_path / "new") as draft:
            (draft / "half").write_text("")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_made_meanwhile_is_not_replaced(tmp_path):
    with (
        pytest.raises(CRDiffError, match="is there already"),
        commands.new_folder(tmp_path / "new"),
    ):
        (tmp_path / "new").mkdir()
    assert [each.name for each in tmp_path.iterdir()] == ["new"]


def test_a_folder_without_a_parent_is_made_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with commands.new_folder(Path("new")) as draft:
        (draft / "file").write_text("")
    assert (tmp_path / "new" / "file").exists()
