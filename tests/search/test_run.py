"""The command line: what it says when something is wrong, and that nothing is lost by it."""

import shlex
import sys
from pathlib import Path

import pytest

from search import run


@pytest.fixture
def search(monkeypatch, capsys):
    """Run `python -m search.run` with the arguments; its exit code and what it wrote."""

    # Else a cluster of our own would get a token, which this process would keep.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["search.run", *arguments])
        try:
            code = run.main()
        except SystemExit as stopped:
            code = stopped.code
        written = capsys.readouterr()
        return code, written.out, written.err

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("searcher=grid budget.steps=5", "budget.steps=5: a grid has 8 corners: raise it"),
        ("racing=true", "a group the name of one of its choices, as in racing=on"),
        ("searcher.initial_temperature=warm", "got 'warm': give auto or a number"),
        ("res.widht=3", "res.widht: there is no such setting"),
        ("modle=shapes", "modle: there is no such setting"),
        ("searcher=random searcher.cooling=.9", "searcher.cooling: there is no such setting"),
        ("model=nope", "model=nope is unknown: choose one of sd15, sd21, sdxl, shapes"),
        (
            "searcher=nope",
            "searcher=nope is unknown: choose one of annealing, annealing_paper, cmaes",
        ),
        (
            "res=25x40",
            "resolution 25x40 is not divisible by 8, as shapes needs: the nearest is res=24x40",
        ),
        ("space.up=[0.1,1.0]", "space.up.1: input should be less than 1"),
        ("prompts.path=EMPTY", "holds no prompt: write one prompt a line"),
        ("prompts.path=/no/such.txt", "No such file or directory: set prompts.path"),
        ("prompts.search=100000", "distinct prompts and 100000 search + 64 rerank"),
        ("budget.steps=0", "budget.steps: input should be greater"),
        ("model.path=/no/such", "/no/such does not exist: set model.path to a diffusers"),
        ("seed=${nope}", "Interpolation key 'nope' not found"),
        ("searcher.cooling=${oc.env:PATH}", "searcher.cooling: settings do not read the env"),
        ("model._target_=os.system", "a setting of Hydra's own can run code: leave it out"),
        ("=3", "write KEY=VALUE"),
        (
            "-m budget.steps=8,9",
            "shapes_24x40/annealing-seed0: two cells would keep their results",
        ),
        ("-m res=24x40,25x40", "shapes_25x40: resolution 25x40 is not divisible by 8, as shapes"),
        ("-m res=24x40,24", "res=24: res: resolution 24 is not HEIGHTxWIDTH"),
        ("-m seed=interval(0,3)", "seed=interval(0,3): it has no end: list the values"),
        ("-m cluster.device=cpu,auto", "cluster: a grid has one for all its cells"),
        ("-m res=paper", "res=paper: the paper has no sizes for shapes: give HEIGHTxWIDTH"),
        ("-m searcher=tpe,annealing searcher.lag=1", "searcher=tpe: searcher.lag: there is no"),
        ("-m model=shapes,nope", "model=nope is unknown: choose one of sd15"),
        ("seed=1,2", "seed=1,2: not understood: add -m for a search of each, or put a value"),
        ("experiment=paper_grid model=sdxl", "are a search for each of res=paper: add -m to run"),
        ("prompts=reference", 'caption "A '),
        ("prompts.text=a prompts.path=b", "prompts: text and path are both given: choose one"),
        (
            "prompts=coco",
            "coco5k.parquet is not there: make it with python -m crdiff_core.",
        ),
        ("render.size_conditioning=native", "shapes is not told a picture's size, only SDXL is"),
        (
            "reward=nope",
            "reward=nope is unknown: choose one of image_reward, image_r",
        ),
        (
            "model=sdxl res=480x360",
            "stabilityai/stable-diffusion-xl-base-1.0 at revision 462165984030 is not in this "
            "machine's Hugging Face cache: fetch it with: hf download stabilityai/",
        ),
        ("model=sd15 model.path=/no/such.safetensors", "/no/such.safetensors does not exist"),
        ("model=sd15 model.path=/no/such.ckpt", "/no/such.ckpt is a pickle, which can run code"),
        ("reward=image_reward", "hf download zai-org/ImageReward"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(search, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("\n \n")
    given = arguments.replace("EMPTY", str(tmp_path / "empty.txt")).split()
    code, out, err = search(*given, f"output={tmp_path / 'runs'}")

    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


@pytest.mark.parametrize("text", ["a dog's bone", "a cat, asleep", "a (b"])
def test_a_prompt_without_both_quotes_is_told_how_to_write_it(search, text):
    code, _, err = search(f"prompts.text={text}")

    assert code == 2
    assert err.startswith(f"error: prompts.text={text}: not understood: ")
    assert err.endswith("""'prompts.text="a cat, asleep"'\n""")
    assert err.count("\n") == 1


def test_a_prompt_in_both_quotes_is_read(search):
    code, _, err = search("""prompts.text="a dog's bone, (old)\"""", "dry_run=true")

    assert code == 2
    assert """caption "a dog's bone, (old)" is outside the shapes grammar""" in err


def test_the_readme_has_the_command_that_fetches_sdxl(search):
    _, _, err = search("model=sdxl", "res=480x360")
    command = err.partition("fetch it with: ")[2].partition(" (if it is gated")[0]
    readme = (Path(run.__file__).parents[1] / "README.md").read_text().replace("\\\n", " ")

    assert command.startswith("hf download")
    assert shlex.split(command) == shlex.split(
        readme[readme.index("    hf download stabilityai") :].partition("    hf download zai-org")[
            0
        ]
    )


def test_a_mistake_loses_nothing_that_was_paid_for(search, tmp_path):
    kept = tmp_path / "runs" / "shapes_24x40" / "annealing-seed0" / "best_ratios.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    search("prompts.search=100000", f"output={tmp_path / 'runs'}")

    assert kept.read_text() == "{}"


def test_help_names_models_resolutions_searchers_and_examples(search):
    code, out, _ = search("--help")

    assert code in {0, None}
    models, searchers = (
        "model: sd15, sd21, sdxl, shapes",
        "searcher: annealing, annealing_paper, cmaes",
    )
    for part in (models, searchers, "HEIGHTxWIDTH", "Examples:"):
        assert part in out


def test_an_output_that_cannot_be_written_is_one_clear_line(search, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = search(f"output={tmp_path / 'file'}")

    assert code == 2
    assert err.endswith("Not a directory: set output to a place you may read and write\n")
