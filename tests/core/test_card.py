"""python -m crdiff_core.card: a folder to publish, whose card says what the ratios are worth."""

import shlex
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from crdiff_core import card
from crdiff_core.ratios import BlockRatios, RatiosFile, Resolution

VALIDATION = {
    "verdict": "no difference shown",
    "summary": "-0.0152, 95% interval [-0.0325, +0.0021], on 256 fresh prompts",
    "note": "",
}
PROVENANCE = {
    "recipe": {
        "dtype": "float16",
        "scheduler": "EulerDiscreteScheduler",
        "num_steps": 30,
        "guidance_scale": 7.5,
        "reward": "image_reward",
        "reward_version": "1",
        "size_conditioning": "1024x1024",
    },
    "source": {"hub_id": "owner/name", "hub_revision": "0123abc"},
    "sparsity": {"down": 0.4301, "mid": 0.5002, "up": 0.3603},
    "searcher": {"name": "annealing"},
    "seed": 3,
    "prompts": {"search": {"digest": "0123456789abcdef0123", "num_prompts": 32}},
    "num_evaluations": 60,
    "dense_score": 0.825,
    "validation": VALIDATION,
}


def ratios_file(model="sdxl", **changes):
    provenance = {**PROVENANCE, **changes}
    ratios = BlockRatios(0.43, 0.5, 0.36)
    return RatiosFile(model, Resolution(480, 360), 0.85, ratios, 1.5, provenance)


def call(capsys, *arguments):
    """Run the command; its exit code and what it wrote."""
    code = card.main([str(argument) for argument in arguments])
    written = capsys.readouterr()
    return code, written.out, written.err


@pytest.fixture
def file(tmp_path):
    ratios_file().write(tmp_path / "best.json")
    return tmp_path / "best.json"


def test_the_folder_holds_the_file_as_it_is_and_a_card(capsys, file, tmp_path):
    out = tmp_path / "my ratios"
    code, said, error = call(capsys, "--ratios", file, "--out", out)

    assert (code, error) == (0, "")
    assert (out / "best_ratios.json").read_bytes() == file.read_bytes()
    assert {each.name for each in out.iterdir()} == {"README.md", "best_ratios.json"}
    folder, publishing = said.splitlines()
    assert folder == str(out)
    assert shlex.split(publishing)[-4:] == ["hf", "upload", "OWNER/NAME", str(out)]


def test_the_front_matter_is_what_the_hub_reads():
    data = ModelCard(card.model_card(ratios_file())).data

    assert data.to_dict() == {
        "base_model": "owner/name",
        "library_name": "diffusers",
        "license": "other",
        "pipeline_tag": "text-to-image",
        "tags": ["cr-diff", "pruning", "text-to-image"],
    }


def test_base_model_and_licence_are_the_users_to_say(capsys, file, tmp_path):
    options = ["--base-model", "me/mine", "--license", "mit"]
    call(capsys, "--ratios", file, "--out", tmp_path / "new", *options)
    made = ModelCard.load(tmp_path / "new" / "README.md")

    assert (made.data.base_model, made.data.license) == ("me/mine", "mit")
    assert 'from_pretrained("me/mine", dtype=torch.float16)' in made.text


@pytest.mark.parametrize(
    "source",
    [{}, {"hub_id": "", "hub_revision": ""}, {"hub_id": "owner/name", "file": "mine.safetensors"}],
    ids=["none", "embedded", "checkpoint"],
)
def test_a_model_that_is_not_on_the_hub_is_no_base_model(source):
    made = ModelCard(card.model_card(ratios_file(source=source)))

    assert made.data.base_model is None
    assert 'from_pretrained("MODEL"' in made.text


@pytest.mark.parametrize(
    ("validation", "start"),
    [
        (
            VALIDATION,
            "**No difference shown** between these ratios and the dense model in mean reward: "
            "-0.0152, 95% interval \\[-0.0325, +0.0021\\], on 256 fresh prompts.",
        ),
        (
            {**VALIDATION, "verdict": "better", "note": "A note."},
            "**Better than the dense model** in mean reward: -0.0152, 95% interval "
            "\\[-0.0325, +0.0021\\], on 256 fresh prompts. A note.",
        ),
        (
            {**VALIDATION, "verdict": "worse"},
            "**Worse than the dense model** in mean reward: -0.0152,",
        ),
        (
            {"verdict": "no verdict", "summary": "+0.1, on *[x](y)*", "note": "Too few."},
            "**No verdict** on these ratios against the dense model in mean reward: +0.1, on "
            "\\*\\[x\\]\\(y\\)\\*. Too few.",
        ),
        (None, "**Not validated**: these ratios were not compared"),
        ({"verdict": "better"}, "**Not validated**"),
        ({**VALIDATION, "verdict": "wonderful"}, "**Not validated**"),
    ],
    ids=["no difference", "better", "worse", "no verdict", "failed", "no numbers", "unknown"],
)
def test_the_verdict_comes_first(validation, start):
    paragraphs = ModelCard(card.model_card(ratios_file(validation=validation))).text.split("\n\n")

    assert paragraphs[0].strip() == "# CR-Diff ratios for sdxl at 480x360"
    assert paragraphs[1].startswith(start)


def test_ratios_and_how_they_were_found_are_told():
    text = card.model_card(ratios_file())
    for line in (
        "| down | 0.43 | 0.4301 |",
        "| mid | 0.5 | 0.5002 |",
        "| up | 0.36 | 0.3603 |",
        "| model | owner/name |",
        "| its revision | 0123abc |",
        "| searcher | annealing |",
        "| seed | 3 |",
        "| evaluations | 60 |",
        r"| reward | image\_reward |",
        "| search prompts | 32, digest 0123456789abcdef |",
        "| dense model on the same | 0.8250 |",
        "with k = 1.5",
        "eprint={2604.05524}",
    ):
        assert line in text, line


def test_the_code_to_use_them_draws_as_the_search_did():
    text = card.model_card(ratios_file())
    call = "height=480, width=360, num_inference_steps=30, guidance_scale=7.5, "
    call += "original_size=(1024, 1024), target_size=(1024, 1024)"

    assert call in text
    assert 'from_pretrained("owner/name", dtype=torch.float16)' in text


@pytest.mark.parametrize(
    ("text", "said"), [(None, False), ("", True)], ids=["the pipeline's own", "empty"]
)
def test_the_code_says_the_negative_prompt_unless_it_is_the_pipelines_own(text, said):
    recipe = {**PROVENANCE["recipe"], "negative_prompt": text}

    assert ("negative_prompt=''" in card.model_card(ratios_file(recipe=recipe))) == said


def test_a_file_of_the_reference_has_a_card_too():
    reference = RatiosFile("sdxl", Resolution(480, 360), 0.71, BlockRatios(0.43, 0.5, 0.36))
    text = ModelCard(card.model_card(reference)).text

    assert "**Not validated**" in text
    assert "| down | 0.43 | not recorded |" in text
    assert "seed" not in text


def test_a_picture_is_shown(capsys, file, tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "mine.PNG")
    out = tmp_path / "new"
    call(capsys, "--ratios", file, "--out", out, "--picture", tmp_path / "mine.PNG")

    assert "](picture.png)" in (out / "README.md").read_text()
    assert (out / "picture.png").read_bytes() == (tmp_path / "mine.PNG").read_bytes()


HOSTILE = "x\n---\n# <script>alert(1)</script> | [a](http://b) `c` *d*"


def test_what_a_file_says_is_text_and_no_markup():
    source = {"hub_id": "", "file": HOSTILE}
    file = ratios_file(
        HOSTILE.replace("\n", " "),
        source=source,
        searcher={"name": HOSTILE},
        seed=[{}],
        recipe=dict.fromkeys(PROVENANCE["recipe"], HOSTILE),
        prompts={"search": HOSTILE},
        num_evaluations=10**400,
    )
    made = card.model_card(file)

    assert "<script>" not in made
    assert "[a](" not in made
    assert (
        ModelCard(made).data.to_dict()
        == ModelCard(card.model_card(ratios_file(source={}))).data.to_dict()
    )
    # Of the table that says how they were found, each row has two cells still.
    rows = [line for line in made.splitlines() if line.startswith("| searcher")]
    assert [row.replace(r"\|", "").count("|") for row in rows] == [3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out TMP/a", "the following arguments are required: --ratios"),
        ("--ratios /no/such.json --out TMP/a", "No such file or directory: give the path"),
        ("--ratios FILE --out TMP", "is there already: give a new name"),
        ("--ratios FILE --out TMP/no/a", "is not a folder you may write to"),
        ("--ratios FILE --out TMP/a --base-model mine", "base model 'mine' is not OWNER/NAME"),
        ("--ratios FILE --out TMP/a --picture FILE", "not a readable picture"),
        ("--ratios FILE --out TMP/a --picture /no/such.png", "not a readable picture"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    capsys, file, tmp_path_factory, arguments, message
):
    folder = tmp_path_factory.mktemp("new")
    places = {"FILE": file, "TMP": folder}
    for name, place in places.items():
        arguments = arguments.replace(name, str(place))
    code, said, error = call(capsys, *arguments.split(" "))

    assert (code, said) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(folder.iterdir()) == []


def test_no_network_and_no_torch_is_needed(file, tmp_path):
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise AssertionError('a connection')\n"
        "socket.socket.connect = refuse\n"
        "from crdiff_core import card\n"
        "assert card.main(sys.argv[1:]) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, "--ratios", str(file), "--out", str(tmp_path / "new")]
    subprocess.run(command, check=True, capture_output=True)
