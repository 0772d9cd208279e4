"""Hostile and broken input, in one table: each ends in the right result or in one clear line."""

from __future__ import annotations

import csv
import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from crdiff_core import generate, prompts
from crdiff_core.errors import CRDiffError, PromptError, RatiosError
from crdiff_core.models import Model
from crdiff_core.prompts import read_texts
from crdiff_core.ratios import DEFAULT_POA_WEIGHT, BlockRatios, RatiosFile, Resolution
from crdiff_core.rewards.image_reward import ImageReward
from crdiff_core.shapes import WEIGHTS
from search import export, run
from search.config import Config
from search.plan import Plan

SECRET = "hunter2"
"""In the environment and in passwords; no message may repeat it."""

LONG_NAME = "n" * 5000


@dataclass
class Place:
    """Where a case happens: a folder whose name has a space, and the commands."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    @property
    def trap(self) -> Path:
        """What exists once a payload has run."""
        return self.folder / "ran"

    def write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def command(self, main: Callable[[], int], *arguments: str) -> str:
        """Run a command in this process; what it prints. Raises Refused with its one line."""
        here = [argument.replace("HERE", str(self.folder)) for argument in arguments]
        self.monkeypatch.setattr(sys, "argv", ["command", *here])
        self.monkeypatch.chdir(self.folder)
        try:
            code = main()
        except SystemExit as stopped:
            code = stopped.code or 0
        written = self.capsys.readouterr()
        if code == 0:
            return written.out
        assert code == 2
        assert written.out == ""
        assert written.err.startswith("error: ")
        assert written.err.endswith("\n")
        raise Refused(written.err.removeprefix("error: ").removesuffix("\n"))


class Refused(CRDiffError):
    """What a command printed and a function raised look alike to the table."""


@dataclass(frozen=True)
class Error:
    """Expected: an error that says this, in one line."""

    part: str


@pytest.fixture
def place(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.setenv("CRDIFF_SECRET", SECRET)
    # Else a cluster of our own would get a token, which this process would keep.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return Place(folder, monkeypatch, capsys)


# --- what a case does: functions of a place --------------------------------------------------

Action = Callable[[Place], Any]


def texts(name: str, content: bytes) -> Action:
    """The prompts of a file with this content."""
    return lambda place: read_texts(place.write(name, content))


def texts_at(path: str) -> Action:
    """The prompts of what is there already, or is not."""
    return lambda place: read_texts(path.replace("HERE", str(place.folder)))


def parquet(*columns: Any, names: tuple[str, ...] = ("prompt",)) -> bytes:
    data = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([*columns], names=[*names]), data)
    return data.getvalue()


def not_utf8() -> pa.Array:
    offsets = pa.array([0, 2], pa.int32()).buffers()[1]
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])


def coco(content: Any) -> Action:
    """The prompts of a COCO subset of one image, made by the command."""

    def do(place: Place) -> list[str]:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        place.write("captions.json", raw)
        place.command(prompts.main, "coco", "--captions", "captions.json", "--num", "1")
        return read_texts(place.folder / "coco5k.parquet")

    return do


def captions(caption: Any = "a cat", image_id: Any = 1, file_name: Any = "a.jpg") -> dict:
    return {
        "annotations": [{"image_id": image_id, "caption": caption}],
        "images": [{"id": image_id, "file_name": file_name}],
    }


REFERENCE = {
    "model_config": {"name": "shapes", "width": 40, "height": 24},
    "best_avg_score": 0.71,
    "best_global_params_ratio": {"down_ratio": 0.43, "up_ratio": 0.36, "mid_ratio": 0.5},
}
"""A ratios file as the reference implementation writes it."""
RATIOS = RatiosFile("shapes", Resolution(24, 40), 0.71, BlockRatios(0.43, 0.5, 0.36))


def ratios(content: Any = None, **changes: Any) -> Action:
    """What is read from a ratios file: the reference's with changes, or this content."""
    raw = json.dumps({**REFERENCE, **changes}).encode() if content is None else content
    return lambda place: RatiosFile.read(place.write("best_ratios.json", raw))


def ratios_at(path: str) -> Action:
    return lambda place: RatiosFile.read(path.replace("HERE", str(place.folder)))


def with_ratios(**changes: Any) -> Action:
    return ratios(best_global_params_ratio={**REFERENCE["best_global_params_ratio"], **changes})


def with_up(json_value: str) -> Action:
    """A ratio that json.dumps would not write."""
    return ratios(json.dumps(REFERENCE).replace("0.36", json_value).encode())


def with_size(**changes: Any) -> Action:
    return ratios(model_config={**REFERENCE["model_config"], **changes})


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trap,))


def bomb(place: Place) -> bytes:
    return pickle.dumps({"state_dict": Bomb(place.trap)})


def torch_bomb(place: Place) -> bytes:
    data = io.BytesIO()
    torch.save({"weight": Bomb(place.trap)}, data)
    return data.getvalue()


def checkpoint(name: str, content: Callable[[Place], bytes]) -> Action:
    """Check a single-file checkpoint."""

    def do(place: Place) -> None:
        Model("sd15", str(place.write(name, content(place)))).check()

    return do


def model_at(path: str) -> Action:
    return lambda place: Model("mine", path.replace("HERE", str(place.folder))).check()


def model_with(name: str, content: Callable[[Place], bytes] | None, **options: str) -> Action:
    """Check the embedded model with another file, in place of the weights that lie beside it."""

    def do(place: Place) -> dict[str, int]:
        folder = place.folder / "my model"
        shutil.copytree(WEIGHTS, folder)
        if name:
            for file in (folder / name).parent.glob("*.safetensors"):
                file.unlink()
        if content is not None:
            place.write(f"my model/{name}", content(place))
        model = Model("mine", str(folder), **options)
        model.check()
        return model.num_prunable()

    return do


def reward_weights(name: str, content: Callable[[Place], bytes]) -> Action:
    """Score a picture by ImageReward with these weights."""

    def do(place: Place) -> list[float]:
        reward = ImageReward(path=str(place.write(name, content(place))))
        return [len(reward._read(reward._weights_file()))]

    return do


def search(*arguments: str) -> Action:
    """Run the search's command line, up to its plan."""

    def do(place: Place) -> Plan:
        plans: list[Plan] = []

        def plan(config: Config, console: object) -> list[str]:
            plans.append(Plan.make(config))
            return []

        place.monkeypatch.setattr(run, "_search", plan)
        typed = (*arguments, *(() if any("output=" in a for a in arguments) else OUTPUT))
        place.command(run.main, *typed)
        return plans[0]

    return do


OUTPUT = ("output='HERE/runs'",)


def setting(name: str, *arguments: str) -> Action:
    """The value that a setting has by these arguments."""

    def do(place: Place) -> Any:
        found: list[Config] = []
        place.monkeypatch.setattr(run, "_search", lambda config, _: found.append(config) or [])
        place.command(run.main, *arguments)
        value: Any = found[0]
        for part in name.split("."):
            value = getattr(value, part)
        return value

    return do


def config_file(*arguments: str) -> Action:
    """The command line, beside a configuration that would run a payload."""

    def do(place: Place) -> Any:
        payload = f"{{_target_: pathlib.Path.touch, _args_: ['{place.trap}']}}"
        callbacks = f"hydra: {{callbacks: {{mine: {payload}}}}}\n"
        place.write("mine.yaml", f"# @package _global_\n{callbacks}".encode())
        up = "../" * 20
        return search(*(each.replace("UP", f"{up}{place.folder}") for each in arguments))(place)

    return do


def folder_of(*arguments: str) -> Action:
    """The folder in which the search would keep its results."""
    return lambda place: str(search(*arguments)(place).folder).replace(str(place.folder), "HERE")


def exported(content: bytes | None, argument: str = "HERE/runs/cell/search") -> Action:
    """Export a run whose run.json has this content."""

    def do(place: Place) -> str:
        if content is not None:
            place.write("runs/cell/search/run.json", content)
        return place.command(export.main, argument)

    return do


def planned_again() -> Action:
    """Whether the plan of a run in a folder with spaces is found again."""

    def do(place: Place) -> bool:
        plan = search("output='HERE/my runs'")(place)
        plan.folder.make()
        record = {"key": plan.key, "config": plan.config.model_dump(mode="json")}
        plan.folder.write("run.json", json.dumps(record).encode())
        return export.load_plan(str(plan.folder)).key == plan.key

    return do


BY_HAND = ("--down", ".3", "--mid", ".3", "--up", ".3", "--res", "24x40")


def drawn(*arguments: str, really: bool = False, recipe: Any = None) -> Action:
    """The width and height of the picture that the command makes."""

    def do(place: Place) -> tuple[int, int]:
        provenance = {"provenance": {"recipe": recipe}} if recipe is not None else {}
        place.write("ratios.json", json.dumps({**REFERENCE, **provenance}).encode())
        if not really:
            blank = torch.zeros(1, 3, 24, 40)
            place.monkeypatch.setattr(generate, "draw", lambda _: (blank, blank))
        typed = ("--model", "shapes", "--zoom", "4", "--prompt", "a cat", *arguments)
        place.command(generate.main, *typed)
        with Image.open(place.folder / "picture.png") as picture:
            return picture.size

    return do


SIZE = (2 * 160 + 3 * 8, 8 + 2 * 18 + 96 + 2 * 8)
"""Of a picture of one prompt of one line, in pixels."""
UNET = WEIGHTS / "unet" / "diffusion_pytorch_model.safetensors"

# --- the table -------------------------------------------------------------------------------

EMOJI = "a 👩‍👩‍👧 in 東京, été"
LONG = "cat " * 2499 + "cat!"
assert len(LONG) == 10_000
NOT_A_FILE = "set prompts.path to a readable file"
EXPORT_AGAIN = "export it again"
QUOTES = "not understood: put a value with spaces or signs into both kinds of quotes"
HYDRA = "a setting of Hydra's own can run code: leave it out"
ENVIRONMENT = "settings do not read the environment, because they are written down"
PASSWORD = "credentials do not belong into it"
NOT_TEXT = "give text in UTF-8, without control signs"

TABLE: dict[str, tuple[Action, Any]] = {
    # Prompts, one a line
    "txt: quotes of all kinds": (
        texts("p.txt", b'a "red" cat\'s `hat`'),
        ['a "red" cat\'s `hat`'],
    ),
    "txt: emoji and other scripts": (texts("p.txt", EMOJI.encode()), [EMOJI]),
    "txt: 10,000 characters": (texts("p.txt", LONG.encode()), [LONG]),
    "txt: a byte order mark": (texts("p.txt", b"\xef\xbb\xbfa cat"), ["a cat"]),
    "txt: line ends of all systems": (texts("p.txt", b"a\r\nb\rc\nd"), ["a", "b", "c", "d"]),
    "txt: empty and blank lines": (texts("p.txt", "\n \n\t\n\xa0\na\n\n".encode()), ["a"]),
    "txt: duplicates": (texts("p.txt", b"a\na\nb\na\n"), ["a", "a", "b", "a"]),
    "txt: form feed within a line": (texts("p.txt", b"a\x0bb\x0cc\x1cd"), ["a\x0bb\x0cc\x1cd"]),
    "txt: Unicode's line ends": (
        texts("p.txt", "a\u2028b\u2029c\x85d".encode()),
        ["a\u2028b\u2029c\x85d"],
    ),
    "txt: another ending is text": (texts("p.md", b"a,b\n"), ["a,b"]),
    "txt: a space in its name": (texts("my prompts.txt", b"a\n"), ["a"]),
    "txt: empty": (texts("p.txt", b""), Error("holds no prompt: write one prompt a line")),
    "txt: only a byte order mark": (texts("p.txt", b"\xef\xbb\xbf"), Error("holds no prompt")),
    "txt: Latin-1": (texts("p.txt", "été".encode("latin-1")), Error("not UTF-8 text")),
    "txt: UTF-16": (texts("p.txt", "a cat".encode("utf-16")), Error("save it as UTF-8")),
    "txt: UTF-16 without a mark": (texts("p.txt", "a cat".encode("utf-16-le")), Error("NULs")),
    "txt: half a character": (texts("p.txt", b"a \xed\xa0\x80 cat"), Error("not UTF-8 text")),
    "txt: a folder": (texts_at("HERE"), Error(f"Is a directory: {NOT_A_FILE}")),
    "txt: not there": (texts_at("HERE/p.txt"), Error(f"No such file or directory: {NOT_A_FILE}")),
    "txt: a file's child": (texts_at("/dev/null/p.txt"), Error(f"Not a directory: {NOT_A_FILE}")),
    "txt: an endless name": (texts_at(LONG_NAME), Error(f"File name too long: {NOT_A_FILE}")),
    "txt: NUL in its name": (texts_at("p\0.txt"), Error(f"embedded null byte: {NOT_A_FILE}")),
    # Prompts, CSV
    "csv: a byte order mark": (texts("p.csv", b"\xef\xbb\xbfprompt\na cat\n"), ["a cat"]),
    "csv: a comma, quotes, a line end": (
        texts("p.csv", b'id,prompt\n1,"a ""cat"", big"\n2,"two\nlines"\n'),
        ['a "cat", big', "two\nlines"],
    ),
    "csv: quotes within an unquoted field": (
        texts("p.csv", b'prompt\na "green" cat\n'),
        ['a "green" cat'],
    ),
    "csv: emoji": (texts("p.csv", f'prompt\n"{EMOJI}"\n'.encode()), [EMOJI]),
    "csv: 10,000 characters": (texts("p.csv", f"prompt\n{LONG}\n".encode()), [LONG]),
    "csv: empty lines and rows that end early": (
        texts("p.csv", b"id,prompt\n\n1\n2,a\n3,\n"),
        ["a"],
    ),
    "csv: empty fields at the end": (texts("p.csv", b"prompt\na cat,,\n"), ["a cat"]),
    "csv: a comma without quotes": (
        texts("p.csv", b"prompt\na cat, asleep\n"),
        Error("line 2 has 2 fields and the heading 1: put prompts with commas into quotes"),
    ),
    "csv: quotes that never end": (
        texts("p.csv", b'prompt\n"a cat\na dog\n'),
        Error("line 3: unexpected end of data: put prompts into quotes"),
    ),
    "csv: text after a quote": (
        texts("p.csv", b'prompt\n"a" cat\n'),
        Error("line 2: ',' expected after '\"': put prompts into quotes"),
    ),
    "csv: another column": (
        texts("p.csv", b"text\na cat\n"),
        Error("has the columns ['text']: name one of them prompt"),
    ),
    "csv: semicolons": (
        texts("p.csv", b"id;prompt\n1;a\n"),
        Error("has the columns ['id;prompt']"),
    ),
    "csv: two columns of prompts": (
        texts("p.csv", b"prompt,prompt\na,b\n"),
        Error("has 2 columns prompt: leave one"),
    ),
    "csv: no rows": (texts("p.csv", b"prompt\n"), Error("holds no prompt")),
    "csv: empty": (texts("p.csv", b""), Error("has the columns []: name one of them prompt")),
    "csv: NUL": (texts("p.csv", b"prompt\na\0cat\n"), Error("it holds NULs: save it as UTF-8")),
    "csv: Latin-1": (texts("p.csv", b"prompt\n\xe9t\xe9\n"), Error("not UTF-8 text")),
    "csv: an endless field": (
        texts("p.csv", b"prompt\n" + b"a" * 200_000),
        Error("line 2: field larger than field limit"),
    ),
    # Prompts, Parquet
    "parquet: quotes, line ends, emoji": (
        texts("p.parquet", parquet(pa.array(["'a'\n\"b\"", EMOJI, LONG]))),
        ["'a'\n\"b\"", EMOJI, LONG],
    ),
    "parquet: nulls and blanks": (
        texts("p.parquet", parquet(pa.array([None, "", " ", " a "]))),
        ["a"],
    ),
    "parquet: a dictionary of strings": (
        texts("p.parquet", parquet(pa.array(["a", "b", "a"]).dictionary_encode())),
        ["a", "b", "a"],
    ),
    "parquet: large strings": (
        texts("p.parquet", parquet(pa.array(["a"], pa.large_string()))),
        ["a"],
    ),
    "parquet: numbers": (
        texts("p.parquet", parquet(pa.array([1, 2]))),
        Error("its column prompt holds int, not text: write strings"),
    ),
    "parquet: bytes": (
        texts("p.parquet", parquet(pa.array([b"a"]))),
        Error("its column prompt holds bytes, not text"),
    ),
    "parquet: lists": (
        texts("p.parquet", parquet(pa.array([["a"]]))),
        Error("its column prompt holds list, not text"),
    ),
    "parquet: structs": (
        texts("p.parquet", parquet(pa.array([{"text": "a"}]))),
        Error("its column prompt holds dict, not text"),
    ),
    "parquet: nothing but nulls": (
        texts("p.parquet", parquet(pa.nulls(3))),
        Error("holds no prompt"),
    ),
    "parquet: strings that are not UTF-8": (
        texts("p.parquet", parquet(not_utf8())),
        Error("not UTF-8 text"),
    ),
    "parquet: two columns of prompts": (
        texts("p.parquet", parquet(pa.array(["a"]), pa.array(["b"]), names=("prompt", "prompt"))),
        Error("has 2 columns prompt: leave one"),
    ),
    "parquet: another column": (
        texts("p.parquet", parquet(pa.array(["a"]), names=("text",))),
        Error("has the columns ['text']: name one of them prompt"),
    ),
    "parquet: cut short": (
        texts("p.parquet", parquet(pa.array(["a"]))[:-5]),
        Error("p.parquet: not Parquet ("),
    ),
    "parquet: its end alone": (
        texts("p.parquet", parquet(pa.array(["a"]))[-60:]),
        Error("p.parquet: "),
    ),
    "parquet: text": (texts("p.parquet", b"prompt\na cat\n"), Error("not Parquet (")),
    "parquet: empty": (texts("p.parquet", b""), Error("not Parquet (")),
    "parquet: a folder": (texts_at("HERE"), Error("Is a directory")),
    # COCO captions
    "coco: quotes and emoji": (coco(captions(f' "{EMOJI}"\n')), [f'"{EMOJI}"']),
    "coco: half a character": (
        coco(captions("a \ud800 cat")),
        Error("annotations[0] has a caption that is no text (surrogates not allowed)"),
    ),
    "coco: half a character in a file's name": (
        coco(captions(file_name="\udfff.jpg")),
        Error("images[0] has a file_name that is no text"),
    ),
    "coco: a number for a caption": (coco(captions(7)), Error("has no image_id or no caption")),
    "coco: an id that is true": (coco(captions(image_id=True)), Error("has no image_id")),
    "coco: an id beyond 64 bits": (
        coco(captions(image_id=2**63)),
        Error("annotations[0] has no image_id"),
    ),
    "coco: nested without end": (coco(b"[" * 100_000), Error("captions.json: not JSON")),
    "coco: not UTF-8": (coco(b'{"annotations": "\xff"}'), Error("captions.json: not JSON")),
    # Prompts on the command line
    "text: quotes": (
        setting("prompts.text", """prompts.text="a dog's bone, (old)\""""),
        "a dog's bone, (old)",
    ),
    "text: emoji": (setting("prompts.text", f"prompts.text='{EMOJI}'"), EMOJI),
    "text: a line end": (setting("prompts.text", "prompts.text='two\nlines'"), "two\nlines"),
    "text: 10,000 characters": (setting("prompts.text", f"prompts.text='{LONG}'"), LONG),
    "text: empty": (setting("prompts.text", "prompts.text="), ""),
    "text: blank": (search("prompts.text='  '"), Error("text is blank: give a prompt")),
    "text: emoji without quotes": (search("prompts.text=😀"), Error(QUOTES)),
    "text: an open quote": (search("prompts.text='a"), Error(QUOTES)),
    "text: bytes that are not UTF-8": (
        search("prompts.text='a\udcff'"),
        Error(f"prompts.text: it holds '\\udcff': {NOT_TEXT}"),
    ),
    "text: NUL": (search("prompts.text='a\0'"), Error(f"it holds '\\x00': {NOT_TEXT}")),
    "text: outside the grammar of shapes": (
        search("prompts.text='a cat\n\"asleep\"'"),
        Error("is outside the shapes grammar"),
    ),
    "text: a list": (
        search("prompts.text=[a,b]"),
        Error("should be a valid string, got ['a', 'b']"),
    ),
    # The ratios file
    "ratios: the reference's": (ratios(), RATIOS),
    "ratios: a byte order mark": (
        ratios(b"\xef\xbb\xbf" + json.dumps(REFERENCE).encode()),
        RATIOS,
    ),
    "ratios: UTF-16": (ratios(json.dumps(REFERENCE).encode("utf-16")), RATIOS),
    "ratios: the last of equal keys counts": (
        ratios(
            json.dumps(REFERENCE).replace('"best_avg', '"best_avg_score": 0, "best_avg').encode()
        ),
        RATIOS,
    ),
    "ratios: a key that nobody knows": (ratios(other=[{}]), RATIOS),
    "ratios: half a character in provenance": (
        ratios(provenance={"a": "\ud800"}),
        replace(RATIOS, provenance={"a": "\ud800"}),
    ),
    "ratios: sizes as text": (with_size(width="40"), RATIOS),
    "ratios: missing": (
        ratios(best_global_params_ratio={"down_ratio": 0.4, "up_ratio": 0.4}),
        Error("has the keys ['down_ratio', 'up_ratio']: it needs exactly"),
    ),
    "ratios: extra": (with_ratios(text_ratio=0.1), Error("it needs exactly ['down_ratio', 'mid")),
    "ratios: negative": (
        with_ratios(up_ratio=-0.1),
        Error("up ratio -0.1 is outside [0, 1): give"),
    ),
    "ratios: one": (with_ratios(up_ratio=1), Error("up ratio 1 is outside [0, 1): give")),
    "ratios: NaN": (with_up("NaN"), Error("up ratio nan is outside [0, 1): give")),
    "ratios: infinite": (with_up("1e999"), Error("up ratio inf is outside [0, 1): give")),
    "ratios: huge": (with_up("9" * 4000), Error("up ratio 999999999999999999...9999999999")),
    "ratios: too huge to read": (with_up("9" * 5000), Error("not JSON (Exceeds the limit")),
    "ratios: text": (with_ratios(up_ratio="0.3"), Error("up ratio '0.3' is not a number: give")),
    "ratios: nested": (with_ratios(up_ratio=[0.3]), Error("up ratio [0.3] is not a number: give")),
    "ratios: null": (with_ratios(up_ratio=None), Error("up ratio None is not a number: give")),
    "ratios: true": (with_ratios(up_ratio=True), Error("up ratio True is not a number: give")),
    "ratios: a list": (ratios(b"[]"), Error("model_config is missing or not an object")),
    "ratios: null alone": (ratios(b"null"), Error("model_config is missing or not an object")),
    "ratios: no ratios": (
        ratios(best_global_params_ratio=[0.1, 0.2, 0.3]),
        Error("best_global_params_ratio is missing or not an object"),
    ),
    "ratios: a score of text": (ratios(best_avg_score="1"), Error("best_avg_score '1' is not a")),
    "ratios: a score of true": (
        ratios(best_avg_score=True),
        Error("best_avg_score True is not a"),
    ),
    "ratios: a score of NaN": (
        ratios(best_avg_score=float("nan")),
        Error("best_avg_score nan is"),
    ),
    "ratios: an endless score": (
        ratios(best_avg_score="x" * 100_000),
        Error("best_avg_score 'xxxxxxxxxxxx...xxxxxxxxxxxxx' is not a number"),
    ),
    "ratios: a weight of infinity": (
        ratios(poa_weight=float("inf")),
        Error("poa_weight inf is not a number: the paper's is 1.5"),
    ),
    "ratios: a negative size": (
        with_size(height=-24),
        Error("'-24x40' is not HEIGHTxWIDTH: write"),
    ),
    "ratios: half a pixel": (with_size(height=24.5), Error("'24.5x40' is not HEIGHTxWIDTH")),
    "ratios: digits of another script": (with_size(height="2٤"), Error("is not HEIGHTxWIDTH")),
    "ratios: a model without a name": (
        with_size(name=None),
        Error(f"model_config.name None is not text: {EXPORT_AGAIN}"),
    ),
    "ratios: NaN in provenance": (
        ratios(provenance={"a": [float("nan")]}),
        Error("provenance: Out of range float values are not JSON compliant"),
    ),
    "ratios: another method": (
        ratios(pruning_method=["mask"]),
        Error("pruning_method ['mask'] is"),
    ),
    "ratios: nested without end": (ratios(b"[" * 100_000), Error("not JSON (maximum recursion")),
    "ratios: nested a little less": (
        ratios(json.dumps(REFERENCE).replace('"shapes"', "[" * 900 + "]" * 900).encode()),
        Error("best_ratios.json: "),
    ),
    "ratios: cut short": (
        ratios(json.dumps(REFERENCE)[:-9].encode()),
        Error("not JSON (Unterminated"),
    ),
    "ratios: not UTF-8": (ratios(b'{"\xe9": 1}'), Error("not JSON ('utf-8' codec can't decode")),
    "ratios: empty": (
        ratios(b""),
        Error(f"not JSON (Expecting value: line 1 column 1 (char 0)): {EXPORT_AGAIN}"),
    ),
    "ratios: a folder": (ratios_at("HERE"), Error("Is a directory: give the path of an exported")),
    "ratios: not there": (
        ratios_at("HERE/none.json"),
        Error("No such file or directory: give the"),
    ),
    "ratios: an endless name": (ratios_at(LONG_NAME), Error("File name too long: give the path")),
    "ratios: NUL in its name": (ratios_at("a\0.json"), Error("embedded null byte: give the path")),
    # Checkpoints and rewards
    **{
        f"model: a pickle, {ending}": (
            checkpoint(f"m{ending}", bomb),
            Error("is a pickle, which can run code: convert it to .safetensors"),
        )
        for ending in (".bin", ".ckpt", ".pt", ".pth", ".CKPT")
    },
    "model: a pickle that says it is none": (
        checkpoint("m.safetensors", bomb),
        Error("is broken ("),
    ),
    "model: torch's pickle that says it is none": (
        checkpoint("m.safetensors", torch_bomb),
        Error("is broken ("),
    ),
    "model: a folder of pickles": (
        model_with("unet/diffusion_pytorch_model.bin", bomb),
        Error("holds only pickled weights (.bin), which can run code: save the model with safet"),
    ),
    "model: a checkpoint cut short": (
        checkpoint("m.safetensors", lambda _: UNET.read_bytes()[:5000]),
        Error("is broken (Error while deserializing header"),
    ),
    "model: an empty checkpoint": (
        checkpoint("m.safetensors", lambda _: b""),
        Error("is broken ("),
    ),
    "model: a checkpoint with an endless header": (
        checkpoint("m.safetensors", lambda _: b"\xff" * 100),
        Error("is broken (Error while deserializing header"),
    ),
    "model: a checkpoint of another kind": (
        checkpoint("m.safetensors", lambda _: UNET.read_bytes()),
        Error("has no self-attention or feed-forward weights in its down and mid and up blocks"),
    ),
    "model: weights cut short": (
        model_with("unet/diffusion_pytorch_model.safetensors", lambda _: UNET.read_bytes()[:-9]),
        Error("is broken (Error while deserializing header"),
    ),
    "model: an index that leaves the folder": (
        model_with(
            "unet/diffusion_pytorch_model.safetensors.index.json",
            lambda _: json.dumps({"weight_map": {"a": "/etc/passwd"}}).encode(),
        ),
        Error("lists no files: fetch the model again"),
    ),
    "model: an index of endless names": (
        model_with(
            "unet/diffusion_pytorch_model.safetensors.index.json",
            lambda _: json.dumps({"weight_map": {"a": LONG_NAME}}).encode(),
        ),
        Error("is missing: fetch the model again"),
    ),
    "model: a class of anybody's": (
        model_with(
            "model_index.json",
            lambda _: json.dumps({"_class_name": "../evil.py"}).encode(),
        ),
        Error("holds a ../evil.py: CR-Diff draws with StableDiffusionPipeline or"),
    ),
    "model: a configuration nested without end": (
        model_with("unet/config.json", lambda _: b"[" * 100_000),
        Error("config.json is broken: fetch the model again"),
    ),
    "model: a dtype that is none": (
        model_with("", None, dtype="load"),
        Error("dtype 'load' is unknown: choose float32, float16, bfloat16"),
    ),
    "model: a folder with a space": (
        model_with("", None),
        Model("shapes").num_prunable(),
    ),
    "model: an endless name": (model_at(LONG_NAME), Error("does not exist: set model.path to a")),
    "model: NUL in its name": (model_at("a\0b"), Error("does not exist: set model.path to a")),
    "model: a folder of something else": (model_at("HERE"), Error("is not a diffusers folder")),
    "model: a user who is not there": (model_at("~nobody-here/m"), Error("does not exist: set")),
    "reward: a pickle": (
        reward_weights("ImageReward.pt", bomb),
        Error("is not ImageReward-v1.0: "),
    ),
    "reward: torch's pickle": (
        reward_weights("ImageReward.pt", torch_bomb),
        Error("is not ImageReward-v1.0: Weights only load failed"),
    ),
    "reward: a pickle that says it is none": (
        reward_weights("ImageReward.safetensors", bomb),
        Error("is not ImageReward-v1.0: "),
    ),
    "reward: empty": (
        reward_weights("ImageReward.pt", lambda _: b""),
        Error("is not ImageReward"),
    ),
    "reward: an endless name": (
        search("reward=image_reward", f"reward.path={LONG_NAME}"),
        Error("is no file: set reward.path to ImageReward.pt"),
    ),
    # Arguments of the search that would run code or read what they should not
    "hydra: a callback": (
        search("+hydra.callbacks.a={_target_:os.system}"),
        Error(f"+hydra.callbacks.a={{_target_:os.system}}: {HYDRA}"),
    ),
    "hydra: a callback in parts": (search("++hydra.callbacks.a._target_=os.system"), Error(HYDRA)),
    "hydra: a target elsewhere": (search("model._target_=os.system"), Error(HYDRA)),
    "hydra: a target within a value": (search("+a={b:[{_target_:os.system}]}"), Error(HYDRA)),
    "hydra: the environment of a job": (search("hydra.job.env_set.A=1"), Error(HYDRA)),
    "hydra: a group": (search("+hydra/launcher=basic"), Error(HYDRA)),
    "hydra: a group put there": (search("+model@hydra.callbacks.a=shapes"), Error(HYDRA)),
    "hydra: all of it": (search("hydra={}"), Error(HYDRA)),
    "hydra: none of it": (search("~hydra"), Error(HYDRA)),
    "hydra: where it looks": (search("hydra.searchpath=[file://HERE]"), Error(HYDRA)),
    "hydra: a file for a choice": (
        config_file("experiment=UP/mine"),
        Error("experiment is chosen by name, not by a path: --help shows the names"),
    ),
    "hydra: a file among the choices": (
        config_file("+model=[shapes,UP/mine]"),
        Error("model is chosen by name, not by a path"),
    ),
    "hydra: a folder of one's own": (
        config_file("--config-dir=HERE", "+mine=a"),
        Error("--config-dir: no such option: write KEY=VALUE; --help shows them all"),
    ),
    "hydra: a file of one's own": (
        config_file("--config-dir", "HERE", "--config-name", "mine"),
        Error("--config-dir: no such option"),
    ),
    "hydra: an option cut short": (config_file("--config-d=HERE"), Error("--config-d: no such")),
    "hydra: a pickled job": (
        search("--experimental-rerun=HERE/job.pickle"),
        Error("--experimental-rerun: no such option"),
    ),
    "hydra: many at once": (search("-m", "hydra.launcher=a,b"), Error(HYDRA)),
    "hydra: a path among many": (
        search("-m", "model=shapes,UP/mine"),
        Error("model is chosen by name, not by a path"),
    ),
    "hydra: a class among many": (search("-m", "model=shapes,{_target_:a}"), Error(HYDRA)),
    "hydra: many without an end": (search("-m", "seed=interval(0,1)"), Error("it has no end")),
    "environment: among many": (
        search("-m", "seed=${oc.env:CRDIFF_SECRET},2"),
        Error(f"seed: {ENVIRONMENT}"),
    ),
    "environment: a number": (
        search("seed=${oc.env:CRDIFF_SECRET}"),
        Error(f"seed: {ENVIRONMENT}: give a value, or ${{KEY}} of another setting"),
    ),
    "environment: a text": (
        search("tracking.experiment='${oc.env:CRDIFF_SECRET}'"),
        Error(f"tracking.experiment: {ENVIRONMENT}"),
    ),
    "environment: with a default": (
        search("model.path=${oc.env:NOT_THERE,/tmp}"),
        Error(f"model.path: {ENVIRONMENT}"),
    ),
    "environment: by another resolver": (
        search("output=\"${oc.decode:'${oc.env:CRDIFF_SECRET}'}\""),
        Error(f"output: {ENVIRONMENT}"),
    ),
    "environment: shown": (
        search("--cfg", "job", "--resolve", "seed=${oc.env:CRDIFF_SECRET}"),
        Error(ENVIRONMENT),
    ),
    "interpolation: another setting": (
        setting("prompts.seed", "seed=7", "prompts.seed=${seed}"),
        7,
    ),
    "interpolation: itself": (search("seed=${seed}"), Error("seed: Recursive interpolation")),
    "interpolation: in a circle": (
        search("seed=${prompts.seed}", "prompts.seed=${seed}"),
        Error("Recursive"),
    ),
    "interpolation: nothing": (
        search("seed=${nope}"),
        Error("seed: Interpolation key 'nope' not"),
    ),
    "interpolation: a resolver that is none": (
        search("seed=${a:b}"),
        Error("Unsupported interpola"),
    ),
    "interpolation: never closed": (search("seed=${"), Error(f"seed=${{: {QUOTES}")),
    # Values
    "value: seed=-1": (
        search("seed=-1"),
        Error("seed: input should be greater than or equal to 0"),
    ),
    "value: seed=1e400": (search("seed=1e400"), Error("seed: input should be a finite number")),
    "value: seed=2**63": (search(f"seed={2**63}"), Error("seed: input should be less than")),
    "value: seed of 5,000 digits": (search("seed=" + "9" * 5000), Error("Exceeds the limit")),
    "value: seed=": (search("seed="), Error("seed: input should be a valid integer")),
    "value: seed=null": (
        search("seed=null"),
        Error("seed: input should be a valid integer, got None"),
    ),
    "value: a list for a number": (search("seed=[1,2]"), Error("valid integer, got [1, 2]")),
    "value: an object for a number": (search("seed={a:1}"), Error("valid integer, got {'a': 1}")),
    "value: a number for a list": (
        search("space.up=0.3"),
        Error("space.up: input should be a valid"),
    ),
    "value: lists without end": (search("seed=" + "[" * 2000 + "]" * 2000), Error("recursion")),
    "value: poa_weight=nan": (
        search("poa_weight=nan"),
        Error("poa_weight: input should be a finite"),
    ),
    "value: poa_weight=-inf": (
        search("poa_weight=-inf"),
        Error("poa_weight: input should be a fin"),
    ),
    "value: a NaN among bounds": (
        search("space.up=[nan,1]"),
        Error("space.up.0: input should be"),
    ),
    "value: res=0x0": (
        search("res=0x0"),
        Error("res: resolution '0x0' is not HEIGHTxWIDTH: write"),
    ),
    "value: res=480X360": (
        search("res=480X360"),
        Error("res: resolution '480X360' is not HEIGHTx"),
    ),
    "value: res=99999x99999": (
        search("res=99999x99999"),
        Error("resolution 99999x99999 is not divisible by 8, as shapes needs: the nearest is"),
    ),
    "value: res=100000x8": (search("res=100000x8"), Error("is not HEIGHTxWIDTH")),
    "value: res=-8x8": (search("res=-8x8"), Error("is not HEIGHTxWIDTH")),
    "value: res with spaces": (setting("res", "res=' 24x40 '"), Resolution(24, 40)),
    "value: the last of two counts": (setting("seed", "seed=1", "seed=2"), 2),
    "value: the last of two choices counts": (
        setting("space.name", "space=uniform", "space=blocks"),
        "blocks",
    ),
    "value: an unknown setting": (search("sede=1"), Error("sede: there is no such setting")),
    "value: an unknown setting, added": (
        search("+sede=1"),
        Error("sede: there is no such setting"),
    ),
    "value: a setting added twice": (search("+seed=1"), Error("already at 'seed'")),
    "value: a setting taken away": (
        search("~seed"),
        Error("seed: it is missing: give it a value"),
    ),
    "value: a searcher of another name": (
        search("searcher.name=nope"),
        Error("searcher: input tag 'nope' found using 'name' does not match any"),
    ),
    "value: a choice of none": (search("model=null"), Error("the name of one of its choices")),
    "value: a choice of numbers": (
        search("prompts=[1,2]"),
        Error("the name of one of its choices"),
    ),
    "value: an empty choice": (search("model="), Error("model= is unknown: choose one of sd15")),
    "value: an empty argument": (search(""), Error("not understood")),
    "value: no value": (search("seed"), Error(f"seed: {QUOTES}")),
    "value: no such option": (search("--nope"), Error("--nope: no such option: write KEY=VALUE")),
    "value: a name that is a path": (
        search("model.name=../../elsewhere"),
        Error("model.name: got '../../elsewhere': give a name that begins with a letter"),
    ),
    "value: a name that is the folder above": (search("model.name=.."), Error("model.name: got")),
    "value: an empty name": (search("model.name="), Error("model.name: got '': give a name")),
    # Places
    "output: spaces": (
        folder_of("output='HERE/my runs'"),
        "HERE/my runs/shapes_24x40/annealing-seed0",
    ),
    "output: the folder above": (
        folder_of("output='HERE/a/../b'"),
        "HERE/a/../b/shapes_24x40/annealing-seed0",
    ),
    "output: a line end": (
        folder_of("output='HERE/a\nb'"),
        "HERE/a\nb/shapes_24x40/annealing-seed0",
    ),
    "output: empty": (search("output="), Error("output: string should have at least 1 character")),
    "output: NUL": (search("output='a\0b'"), Error(f"output: it holds '\\x00': {NOT_TEXT}")),
    "output: not UTF-8": (
        search("output='a\udcff'"),
        Error("output: input should be a valid string"),
    ),
    "output: an endless name": (
        search(f"output={LONG_NAME}"),
        Error("File name too long: set output"),
    ),
    "output: a file": (
        search("output=/dev/null"),
        Error("Not a directory: set output to a place"),
    ),
    "output: a password": (search(f"output=s3://me:{SECRET}@bucket"), Error("credentials do not")),
    "output: a password, in capitals": (
        search(f"output=S3://me:{SECRET}@bucket"),
        Error("credentials do not"),
    ),
    "output: a key": (
        search(f"output='s3://bucket?secret_key={SECRET}'"),
        Error("credentials do not"),
    ),
    "output: a scheme that is none": (
        search("output=nope://bucket"),
        Error("give a path or s3://"),
    ),
    "prompts: an endless name": (
        search("prompts=coco", f"prompts.path={LONG_NAME}"),
        Error("is not there: make it with python -m crdiff_core.prompts coco"),
    ),
    "prompts: a folder": (search("prompts.path='HERE'"), Error(f"Is a directory: {NOT_A_FILE}")),
    "tracking: a password": (
        search(f"tracking.uri=http://me:{SECRET}@host:5000"),
        Error(
            f"tracking.uri: {PASSWORD}, since settings are written down: set MLFLOW_TRACKING_US"
        ),
    ),
    "tracking: a password with signs": (
        search(f"tracking.uri='postgresql://me:{SECRET}/(x@host/db'"),
        Error(f"tracking.uri: {PASSWORD}"),
    ),
    "tracking: a password behind the host": (
        search(f"tracking.uri='postgresql://host/db?user=me&password={SECRET}'"),
        Error(f"tracking.uri: {PASSWORD}"),
    ),
    "tracking: a password that is not understood": (
        search(f"tracking.uri=http://me:({SECRET}@host"),
        Error(QUOTES),
    ),
    "tracking: a list of passwords": (
        search(f"tracking.uri=['http://me:{SECRET}@host']"),
        Error("tracking.uri: input should be a valid string"),
    ),
    "tracking: a user": (
        setting("tracking.uri", "tracking.uri=postgresql://me@host:5432/db"),
        "postgresql://me@host:5432/db",
    ),
    "tracking: an at sign in a path": (
        setting("tracking.uri", "tracking.uri=sqlite:////home/me@work/a.db"),
        "sqlite:////home/me@work/a.db",
    ),
    # Exporting
    "export: spaces": (planned_again(), True),
    "export: a folder of nothing": (exported(None, "HERE"), Error("is not the folder of a run")),
    "export: a file": (exported(None, "/dev/null"), Error("Not a directory")),
    "export: an endless name": (exported(None, LONG_NAME), Error("File name too long")),
    "export: a line end in the name": (
        exported(None, "no\nsuch"),
        Error("is not the folder of a run"),
    ),
    "export: bytes": (exported(b"\xff\x00"), Error("is not the folder of a run (no readable run")),
    "export: a list": (exported(b"[1]"), Error("is not the folder of a run")),
    "export: a number for settings": (
        exported(b'{"config": 5, "key": ""}'),
        Error("is not the folder of a run"),
    ),
    "export: a text for settings": (
        exported(b'{"config": "a", "key": ""}'),
        Error("is not the fold"),
    ),
    "export: no settings": (
        exported(b'{"config": {}, "key": ""}'),
        Error("it is missing: give it"),
    ),
    "export: nested without end": (exported(b"[" * 100_000), Error("is not the folder of a run")),
    # Drawing
    "draw: a short prompt": (drawn("--ratios", "ratios.json"), SIZE),
    "draw: quotes, line ends, emoji, 10,000 characters": (
        drawn(
            "--prompt",
            EMOJI,
            "--prompt",
            "'\"\n\t\"'",
            "--prompt",
            LONG,
            *BY_HAND,
            "--steps",
            "1",
            really=True,
        ),
        (SIZE[0], ANY),
    ),
    "draw: a prompt that is not UTF-8": (
        drawn("--prompt", "a \udcff", "--ratios", "ratios.json"),
        Error("prompt 'a \\udcff' is no text (surrogates not allowed): write it in UTF-8"),
    ),
    "draw: a blank prompt": (
        drawn("--prompt", " ", "--ratios", "ratios.json"),
        Error("no prompt: give"),
    ),
    "draw: a ratio of NaN": (drawn(*BY_HAND, "--up", "nan"), Error("up ratio nan is outside")),
    "draw: a ratio of text": (drawn(*BY_HAND, "--up", "x"), Error("invalid float value: 'x'")),
    "draw: a weight of NaN": (
        drawn(*BY_HAND, "--poa-weight", "nan"),
        Error("poa_weight nan is outside [0, 10]"),
    ),
    "draw: endless guidance": (
        drawn(*BY_HAND, "--guidance", "inf"),
        Error("--guidance inf: give"),
    ),
    "draw: a negative seed": (
        drawn(*BY_HAND, "--seed", "-1"),
        Error("--seed -1: give at least 0"),
    ),
    "draw: a pickle": (
        drawn("--model", "HERE/m.ckpt", *BY_HAND),
        Error("is a pickle, which can run"),
    ),
    "draw: a recipe of text": (
        drawn("--ratios", "ratios.json", recipe={"num_steps": "many"}),
        Error("provenance.recipe is broken (invalid literal for int()"),
    ),
    "draw: a recipe without end": (
        drawn("--ratios", "ratios.json", recipe={"guidance_scale": 10**400}),
        Error("provenance.recipe is broken (int too large to convert to float)"),
    ),
    "draw: a recipe of another dtype": (
        drawn("--ratios", "ratios.json", recipe={"dtype": "save"}),
        Error("dtype 'save' is unknown: choose float32"),
    ),
    "draw: a recipe that is a list": (drawn("--ratios", "ratios.json", recipe=[1]), SIZE),
    "draw: into a folder": (
        drawn("--ratios", "ratios.json", "--out", "HERE"),
        Error("--out HERE"),
    ),
    "draw: an endless name": (
        drawn("--ratios", "ratios.json", "--out", f"{LONG_NAME}.png"),
        Error("File name too long"),
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_it_ends_in_the_right_result_or_in_one_clear_line(place, case):
    do, expected = TABLE[case]
    if isinstance(expected, Error):
        with pytest.raises(CRDiffError) as caught:
            do(place)
        message = str(caught.value)
        assert expected.part.replace("HERE", str(place.folder)) in message
        assert len(message.splitlines()) == 1
        assert SECRET not in message
    else:
        assert do(place) == expected
    assert not place.trap.exists(), "a payload has run"


def test_the_payloads_of_the_table_would_run(place):
    pickle.loads(bomb(place))
    assert place.trap.exists()


# --- anything at all ------------------------------------------------------------------------

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
RATIO = st.floats(0, 1, exclude_max=True) | ANY_JSON
SIDE = st.integers(1, 99_999) | ANY_JSON
NEARLY_A_RATIOS_FILE = st.fixed_dictionaries(
    {
        "model_config": st.fixed_dictionaries({"name": st.text(), "width": SIDE, "height": SIDE}),
        "best_avg_score": st.floats() | st.integers(),
        "best_global_params_ratio": st.fixed_dictionaries(
            {"down_ratio": RATIO, "mid_ratio": RATIO, "up_ratio": RATIO}
        ),
    },
    optional={
        "poa_weight": st.none() | st.floats() | ANY_JSON,
        "provenance": st.dictionaries(st.text(), ANY_JSON),
        "pruning_method": st.just("ratio") | ANY_JSON,
    },
)
ANY_BYTES = st.binary() | st.text().map(str.encode)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def result_of(read: Callable[[Path], Any], path: Path, error: type[CRDiffError]) -> Any:
    """What is read, or None after an error in one line."""
    try:
        return read(path)
    except error as refused:
        message = str(refused)
    assert len(message.splitlines()) == 1
    return None


@example(json.dumps(REFERENCE).encode())
@given(content=ANY_BYTES | (NEARLY_A_RATIOS_FILE | ANY_JSON).map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_a_ratios_file_that_survives_writing_or_one_clear_line(scratch, content):
    path = scratch / "best_ratios.json"
    path.write_bytes(content)
    file = result_of(RatiosFile.read, path, RatiosError)
    if file is not None:
        file.write(path)
        poa_weight = DEFAULT_POA_WEIGHT if file.poa_weight is None else file.poa_weight
        assert RatiosFile.read(path) == replace(file, poa_weight=poa_weight)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The content with some of its bytes changed."""
    changed = bytearray(content)
    for place in draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        changed[place] = draw(st.integers(0, 255))
    return bytes(changed)


SOME_CSV = st.text(st.sampled_from('prompt,"a \r\n;\0é')).map(
    lambda text: f"id,prompt\n{text}".encode()
)
SOME_PARQUET = damaged(parquet(pa.array(["a cat", None, " a dog"])))


@given(
    ending=st.sampled_from(["txt", "csv", "parquet"]), content=ANY_BYTES | SOME_CSV | SOME_PARQUET
)
def test_any_bytes_are_prompts_or_one_clear_line(scratch, ending, content):
    path = scratch / f"p.{ending}"
    path.write_bytes(content)
    found = result_of(read_texts, path, PromptError)
    if found is not None:
        assert found
        assert all(text and text == text.strip() for text in found)


def write_txt(path: Path, texts: list[str]) -> None:
    path.write_text("\n".join(texts), encoding="utf-8-sig", newline="")


def write_csv(path: Path, texts: list[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "prompt"], *enumerate(texts)])


def write_parquet(path: Path, texts: list[str]) -> None:
    path.write_bytes(parquet(pa.array(texts, pa.string())))


LINES = st.lists(st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8")))
TEXTS = st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")))


@pytest.mark.parametrize(
    ("write", "lists"),
    [(write_txt, LINES), (write_csv, TEXTS), (write_parquet, TEXTS)],
    ids=["txt", "csv", "parquet"],
)
@given(data=st.data())
def test_any_texts_are_read_as_they_were_written(scratch, write, lists, data):
    written = data.draw(lists)
    path = scratch / f"q.{write.__name__.removeprefix('write_')}"
    write(path, written)
    expected = [text.strip() for text in written if text.strip()]
    if expected:
        assert read_texts(path) == expected
    else:
        with pytest.raises(PromptError, match="holds no prompt"):
            read_texts(path)
