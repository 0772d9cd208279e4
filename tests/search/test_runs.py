"""The list of searches: what each file or its absence makes of a search's state."""

import json
import re
import subprocess
import sys

import pytest
from rich.console import Console

from search import runs
from search.comparison import Comparison
from search.lease import Lease
from search.runs import Run, main
from search.storage import Storage, StorageError

STANDING = {
    "is_finished": False,
    "failure": None,
    "num_steps": 7,
    "num_pictures": 300,
    "ratios": [0.1, 0.2, 0.3],
    "poa_weight": 1.5,
}
COMPARISON = Comparison(0.02, 0.01, 0.03, num_prompts=256, num_texts=256)
VALIDATION = COMPARISON.as_dict()


def record(standing, model="shapes", res="24x40"):
    config = {"model": {"name": model}, "searcher": {"name": "annealing"}, "res": res}
    return {"key": "1", "standing": standing, "config": {**config, "budget": {"steps": 60}}}


def best(validation=VALIDATION):
    return {
        "best_global_params_ratio": {"down_ratio": 0.4, "mid_ratio": 0.5, "up_ratio": 0.6},
        "poa_weight": 1.5,
        "provenance": {"num_steps": 60, "use": {"pictures": 2752.0}, "validation": validation},
    }


@pytest.fixture
def add(tmp_path):
    """Make a search's folder with these files."""

    def call(cell="shapes_24x40", name="annealing-seed0", **files):
        folder = tmp_path / cell / name
        folder.mkdir(parents=True)
        for stem, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / f"{stem}.json").write_text(text)
        return Storage.at(folder)

    return call


@pytest.mark.parametrize(
    ("standing", "ratios_file", "state", "num_steps", "ratios"),
    [
        (STANDING, None, "stopped", 7, (0.1, 0.2, 0.3)),
        (STANDING | {"is_finished": True}, best(), "finished", 7, (0.4, 0.5, 0.6)),
        (STANDING | {"failure": "no memory"}, None, "failed", 7, (0.1, 0.2, 0.3)),
        # It was finished, and goes on with a larger budget.
        (STANDING, best(), "stopped", 7, (0.1, 0.2, 0.3)),
        # Killed between its end and its results.
        (STANDING | {"is_finished": True}, None, "stopped", 7, (0.1, 0.2, 0.3)),
        # By earlier versions.
        (None, best(), "finished", 60, (0.4, 0.5, 0.6)),
        (None, None, "stopped", None, None),
    ],
)
def test_a_state_is_what_the_files_say(add, standing, ratios_file, state, num_steps, ratios):
    files = {"run": record(standing)} | ({"best_ratios": ratios_file} if ratios_file else {})
    run = Run.read(add(**files))

    assert (run.state, run.num_steps, run.max_steps, run.ratios) == (state, num_steps, 60, ratios)
    assert (run.comparison is not None) == (state == "finished")


def test_a_search_whose_lease_is_held_is_running(add):
    folder = add(run=record(STANDING | {"failure": "of the session before"}))
    with Lease(folder):
        run = Run.read(folder)

    assert (run.state, run.failure) == ("running", None)


def test_they_are_sorted_by_model_and_size_in_numbers(add, tmp_path, capsys):
    for model, res in (("shapes", "24x40"), ("sd15", "1024x512"), ("sd15", "480x360")):
        add(f"{model}_{res}", run=record(STANDING, model, res))

    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    folders = [re.search(r"\w+_\d+x\d+", line)[0] for line in lines]
    assert folders == ["sd15_480x360", "sd15_1024x512", "shapes_24x40"]
    assert all("so far, not validated" in line for line in lines)


def test_programs_get_json(add, tmp_path, capsys):
    add(run=record(STANDING | {"is_finished": True}), best_ratios=best())

    assert main([str(tmp_path), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert run["state"] == "finished"
    assert run["comparison"] == VALIDATION
    assert run["comparison"]["verdict"] == "better"
    assert run["folder"] == str(tmp_path / "shapes_24x40" / "annealing-seed0")


@pytest.mark.parametrize(
    "files",
    [
        {"run": ""},
        {"run": "[" * 10_000},
        {"run": {"key": "1"}},
        {"run": record({"num_steps": "many"})},
        {"run": record(STANDING), "best_ratios": "\x1b[2J{"},
        {"run": record(STANDING), "best_ratios": best({"difference": None})},
    ],
)
def test_what_is_broken_is_one_line_and_the_others_are_listed(add, tmp_path, capsys, files):
    add(name="broken", **files)
    add(name="sound", run=record(STANDING))

    assert main([str(tmp_path)]) == 2
    written = capsys.readouterr()
    assert written.out.count("\n") == 1
    assert "sound" in written.out
    assert written.err.startswith(f"error: {tmp_path}/shapes_24x40/broken/")
    assert written.err.count("\n") == 1
    assert "\x1b" not in written.err


def test_where_there_is_none_a_line_says_how_to_start_one(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: no search is there: start one with python -m search.run, or give the "
        "output of another\n"
    )


@pytest.mark.parametrize("width", [80, 60])
def test_a_terminal_gets_a_table_that_fits(add, tmp_path, capsys, monkeypatch, width):
    finished = {"run": record(STANDING | {"is_finished": True}), "best_ratios": best()}
    add(**finished)
    add(name="failed", run=record(STANDING | {"failure": 9 * "a long [red]reason " + "\x1b[2J"}))
    monkeypatch.setattr(
        runs, "Console", lambda **_: Console(force_terminal=True, color_system=None, width=width)
    )

    assert main([str(tmp_path)]) == 0
    out = re.sub("\x1b\\[1m|\x1b\\[0m", "", capsys.readouterr().out)
    assert max(map(len, out.splitlines())) <= width
    for part in ("shapes 24x40", "finished", "just now", "7/60", "300", "[red]"):
        assert part in out
    assert "0.400 / 0.500 / 0.600" in out
    assert "+0.0200 [+0.0100, +0.0300]" in out
    assert "\x1b" not in out


def test_it_lists_without_what_takes_seconds_to_import():
    heavy = "{'torch', 'ray', 'diffusers', 'transformers', 'mlflow', 'optuna', 'hydra'}"
    code = f"import sys, search.runs; sys.exit(str({heavy} & sys.modules.keys() or ''))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )

    assert done.stderr.strip() == ""


def test_storage_that_fails_is_one_line(add, tmp_path, capsys, monkeypatch):
    add(run=record(STANDING))

    def fail(*_):
        raise StorageError("bucket: forbidden: ask who may")

    monkeypatch.setattr(Lease, "is_free", property(fail))
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: bucket: forbidden: ask who may\n"
