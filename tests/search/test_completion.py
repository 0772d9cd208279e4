"""Completion of settings, in a real bash."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from search import completion, run

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@pytest.fixture
def candidates(monkeypatch):
    """What a command line may go on with; what it leaves behind in this process is put back."""
    monkeypatch.setattr(sys, "argv", [""])
    for name in ("COMP_LINE", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "")
    return completion.candidates


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("crdiff-search mod", ["model.", "model="]),
        (
            "python -m search.run model=s",
            ["model=sd15", "model=sd21", "model=sdxl", "model=shapes"],
        ),
        ("/venv/bin/crdiff-search  seed=1   racing=", ["racing=off", "racing=on"]),
        # What is given before counts.
        ("crdiff-search model=sdxl res=", ["res=480x360"]),
        ("crdiff-search searcher=gp searcher.", ["searcher.name=", "searcher.warm_start="]),
        ("crdiff-search model=nope racing=", ["racing=off", "racing=on"]),
        ("crdiff-search --h", ["--help"]),
        # Files are the shell's to complete, and other commands' words are not ours.
        ("crdiff-search prompts.path=./", []),
        ("python other.py mod", []),
        ("python -m search.runs mod", []),
        # Hydra's own settings can run code.
        ("crdiff-search hydra", []),
        ("crdiff-search hydra.searchpath=", []),
        ('crdiff-search "unbalanced mod', ["model.", "model="]),
    ],
)
def test_a_line_goes_on_with_groups_names_and_settings(candidates, line, found):
    assert sorted(candidates(line)) == sorted(found)


def test_only_plain_settings_are_passed_on(candidates, monkeypatch):
    asked = []
    monkeypatch.setattr(completion, "_asked", lambda settings, word: asked.append(settings) or [])
    candidates(
        "crdiff-search seed=1 hydra.searchpath=[file:///tmp] seed=${oc.env:HOME} model=../x "
        "+hydra/launcher=x --config-dir=/tmp hydra=x model=sdxl mod"
    )

    assert asked[0] == ["seed=1", "model=sdxl"]


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """A bash at a prompt, in a folder whose own `search` nobody asked to run."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "search").mkdir()
    for name in ("search/__init__.py", "hydra.py", "sitecustomize.py"):
        (folder / name).write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PS1": "> ", "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(follower)
    script = folder / "completion.bash"
    script.write_text(completion.script())
    os.write(leader, f"bind 'set enable-bracketed-paste off'; . {script}\n".encode())

    def press(keys, expected):
        """Type, and return what the terminal shows once it shows what is expected."""
        os.write(leader, keys.encode())
        shown, until = "", time.monotonic() + 30
        while not re.search(expected, shown) and time.monotonic() < until:
            if select.select([leader], [], [], 0.2)[0]:
                shown += os.read(leader, 4096).decode()
        os.write(leader, b"\x15")  # Take the line back.
        return shown

    yield press
    assert not (folder / "ran").exists()
    os.write(leader, b"\nexit\n")
    process.wait(30)
    os.close(leader)


def test_tab_completes_the_name_of_a_model(bash):
    assert "model=shapes " in bash("python -m search.run model=sh\t", "model=shapes ")


def test_tab_twice_lists_what_there_is(bash):
    shown = bash("crdiff-search model=s\t\t", "shapes")
    assert {"sd15", "sd21", "sdxl", "shapes"} <= set(shown.split())


def test_tab_completes_a_group_without_a_space_after_it(bash):
    assert "experiment=no" in bash("crdiff-search exp\tno", "experiment=no")


def test_other_programs_of_python_are_completed_as_before(bash):
    assert "completion.bash" in bash("python compl\t", r"completion\.bash")


def test_the_help_says_how_to_switch_it_on(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["search.run", "--help"])
    with pytest.raises(SystemExit):
        run.main()
    assert 'eval "$(python -m search.completion bash)"' in capsys.readouterr().out


def test_the_installed_command_is_this_one():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'crdiff-search = "search.run:main"' in pyproject
