"""python -m crdiff_core.generate: dense and CR-Diff, side by side, from the same noise."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from crdiff_core import generate
from crdiff_core.errors import CRDiffError, ModelError
from crdiff_core.models import Model
from crdiff_core.prompts import Prompt, noise_seed
from crdiff_core.ratios import BlockRatios, RatiosFile, Resolution
from crdiff_core.replica import Replica
from crdiff_core.sheet import GAP, LINE

PROMPTS = ("a red cat", "a much longer text that does not fit into one line of so small a picture")
RATIOS = BlockRatios(0.6, 0.5, 0.7)
RECIPE = {"num_steps": 2, "guidance_scale": 3.0, "dtype": "float32"}
BY_HAND = ("--down", "0.6", "--mid", "0.5", "--up", "0.7")


@pytest.fixture(scope="module")
def ratios_file(sd_folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("ratios") / "best_ratios.json"
    provenance = {"recipe": RECIPE, "num_prunable": Model("small", str(sd_folder)).num_prunable()}
    RatiosFile("small", Resolution(16, 24), 0.5, RATIOS, 1.5, provenance).write(file)
    return file


@pytest.fixture(scope="module")
def expected(sd_folder):
    """What a replica of our own draws, dense and pruned: (2, N, 3, H, W)."""
    replica = Replica(
        Model("small", str(sd_folder)).load(torch.device("cpu")),
        Resolution(16, 24),
        num_steps=2,
        guidance_scale=3.0,
        poa_weight=1.5,
    )
    prompts = [Prompt(text, "", noise_seed(text, 0)) for text in PROMPTS]
    columns = []
    for ratios in (BlockRatios(), RATIOS):
        replica.set_ratios(ratios)
        columns.append(replica.render(prompts))
    return torch.stack(columns)


def call(capsys, *arguments):
    """Run the command; its exit code and what it wrote."""
    try:
        code = generate.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        code = stopped.code
    written = capsys.readouterr()
    return code, written.out, written.err


def pixels(images, zoom):
    """images: (3, H, W) in [0, 1]. Returns (H * zoom, W * zoom, 3), uint8."""
    array = (images * 255).round().byte().permute(1, 2, 0).numpy()
    return array.repeat(zoom, 0).repeat(zoom, 1)


def test_columns_are_what_a_replica_draws(capsys, sd_folder, ratios_file, expected, tmp_path):
    out = tmp_path / "picture.png"
    prompts = [argument for text in PROMPTS for argument in ("--prompt", text)]
    code, said, _ = call(
        *(capsys, "--model", sd_folder, "--ratios", ratios_file, *prompts),
        *("--zoom", "4", "--out", out),
    )

    assert code == 0
    assert said == f"{out}\n"
    height, width = 4 * 16, 4 * 24
    with Image.open(out) as sheet:
        array = np.asarray(sheet.convert("RGB"))
    assert array.shape[1] == 2 * width + 3 * GAP
    bottom = array.shape[0] - GAP
    for column in (0, 1):
        left = GAP + column * (width + GAP)
        last = array[bottom - height : bottom, left : left + width]
        np.testing.assert_array_equal(last, pixels(expected[column, 1], 4))
    assert not torch.equal(expected[0], expected[1])
    # The first row is the same height, somewhere above the second's caption.
    first = pixels(expected[0, 0], 4)
    tops = [
        top
        for top in range(bottom - 2 * height)
        if np.array_equal(array[top : top + height, GAP : GAP + width], first)
    ]
    assert len(tops) == 1


def test_the_sheet_has_room_for_titles_captions_and_pictures(sd_folder):
    drawing = generate._drawing(
        generate._parser().parse_args(
            ["--model", str(sd_folder), *BY_HAND, "--prompt", "a cat", "--res", "16x24"]
        )
    )
    assert drawing.zoom == 12
    assert drawing.poa_weight == 1.5
    assert (drawing.num_steps, drawing.guidance_scale) == (30, 7.5)
    blank = torch.zeros(1, 3, 16, 24)
    sheet = generate.arrange(drawing, blank, blank)
    assert sheet.size == (2 * 24 * 12 + 3 * GAP, GAP + LINE + GAP + LINE + 16 * 12 + GAP)


def parsed(*options):
    return generate._drawing(generate._parser().parse_args([*map(str, options)]))


def written(path, model="small", **provenance):
    """A ratios file with that provenance."""
    RatiosFile(model, Resolution(16, 24), 0.5, RATIOS, 1.5, provenance).write(path)
    return path


def test_the_model_of_the_search_is_the_default(tmp_path):
    file = written(tmp_path / "best.json", "shapes", source={"hub_id": "", "hub_revision": ""})
    drawing = parsed("--ratios", file, "--prompt", "a cat")

    assert drawing.model == Model("shapes")


def test_a_hub_model_of_the_search_is_the_default(tmp_path):
    source = {"hub_id": "owner/name", "hub_revision": "0123abc"}
    file = written(tmp_path / "best.json", source=source)
    with pytest.raises(ModelError, match="hf download owner/name --revision 0123abc"):
        parsed("--ratios", file, "--prompt", "a cat")


def test_a_local_model_of_the_search_must_be_given(tmp_path):
    file = written(tmp_path / "best.json", source={"file": "mine"})
    with pytest.raises(CRDiffError, match="no --model, and no ratios file"):
        parsed("--ratios", file, "--prompt", "a cat")


def test_sdxl_is_told_the_size_it_was_told_in_the_search(tmp_path, sd_folder, sdxl_folder):
    recipe = {"size_conditioning": "64x64"}
    file = written(tmp_path / "best.json", recipe=recipe)
    told = [
        parsed("--model", folder, "--ratios", file, "--prompt", "a cat").told_size
        for folder in (sdxl_folder, sd_folder)
    ]

    assert told == [Resolution(64, 64), None]


@pytest.mark.parametrize("text", [None, "", "blurry"])
def test_the_negative_prompt_is_that_of_the_search(tmp_path, sd_folder, text):
    file = written(tmp_path / "best.json", recipe={"negative_prompt": text})
    drawing = parsed("--model", sd_folder, "--ratios", file, "--prompt", "a cat")

    assert drawing.negative_prompt == text


def test_the_recipe_of_the_search_is_the_default_and_options_come_first(sd_folder, ratios_file):
    def drawing(*options):
        given = ["--model", str(sd_folder), "--ratios", str(ratios_file), "--prompt", "a cat"]
        return generate._drawing(generate._parser().parse_args([*given, *options]))

    default = drawing()
    assert (default.num_steps, default.guidance_scale) == (2, 3.0)
    assert default.resolution == Resolution(16, 24)
    assert default.ratios == RATIOS
    changed = drawing("--steps", "5", "--guidance", "1", "--res", "32x32", "--poa-weight", "1")
    assert (changed.num_steps, changed.guidance_scale, changed.poa_weight) == (5, 1.0, 1.0)
    assert changed.resolution == Resolution(32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--down .3 --mid .3 --up .3 --res 8x8 --prompt x",
            "no --model, and no ratios file that names one on the hub",
        ),
        ("--model MODEL --prompt x", "no --down --mid --up: give --ratios FILE"),
        ("--model MODEL --down .3 --prompt x", "no --mid --up: give --ratios FILE"),
        ("--model MODEL --ratios FILE --up .3 --prompt x", "give either the file or the three"),
        ("--model MODEL --ratios /no/such.json --prompt x", "No such file or directory: give"),
        ("--model MODEL --ratios FILE", "no prompt: give --prompt TEXT"),
        ("--model MODEL --ratios FILE --prompt=", "no prompt: give --prompt TEXT"),
        ("--model MODEL --ratios FILE --prompts-file /no/such.txt", "/no/such.txt: No such file"),
        ("--model MODEL --down .3 --mid .3 --up .3 --prompt x", "no resolution: give --res"),
        ("--model MODEL --down 1.3 --mid .3 --up .3 --prompt x", "down ratio 1.3 is outside"),
        ("--model MODEL --ratios FILE --prompt x --res 17x24", "17x24 is not divisible by"),
        ("--model MODEL --ratios FILE --prompt x --res big", "is not HEIGHTxWIDTH"),
        ("--model MODEL --ratios FILE --prompt x --steps 0", "--steps 0: give at least 1"),
        ("--model MODEL --ratios FILE --prompt x --zoom 0", "--zoom 0: give at least 1"),
        ("--model MODEL --ratios FILE --prompt x --guidance nan", "--guidance nan: give at"),
        ("--model MODEL --ratios FILE --prompt x --out TMP/a.txt", "not the name of a picture"),
        ("--model MODEL --ratios FILE --prompt x --out TMP/no/a.png", "not a folder you may"),
        ("--model TMP --ratios FILE --prompt x", "is not a diffusers folder"),
        ("--model MODEL --ratios OTHER --prompt x", "prunable"),
    ],
)
def test_a_mistake_is_one_line(capsys, sd_folder, ratios_file, tmp_path, arguments, message):
    other = json.loads(ratios_file.read_text())
    other["provenance"]["num_prunable"] = {"down": 1, "mid": 2, "up": 3}
    (tmp_path / "other.json").write_text(json.dumps(other))
    places = {"MODEL": sd_folder, "FILE": ratios_file, "OTHER": tmp_path / "other.json"}
    for name, place in {**places, "TMP": tmp_path}.items():
        arguments = arguments.replace(name, str(place))
    out = [] if "--out" in arguments else ["--out", tmp_path / "picture.png"]
    code, said, error = call(capsys, *arguments.split(" "), *out)

    assert code == 2
    assert said == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "picture.png").exists()


def test_it_imports_nothing_of_the_search():
    code = "import sys, crdiff_core.generate as g; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    roots = {name.partition(".")[0] for name in loaded}
    assert not roots & {"ray", "hydra", "omegaconf", "mlflow", "optuna", "search", "torch"}
