"""What the commands share: which ratios, which model, errors in one line, a folder made whole."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from crdiff_core.errors import CRDiffError, RatiosError
from crdiff_core.models import EMBEDDED, Model
from crdiff_core.numerics import make_reproducible
from crdiff_core.ratios import GROUPS, BlockRatios, RatiosFile


class UsageError(CRDiffError, ValueError):
    """An option is missing or wrong."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError; argparse would print its usage, many lines, above the message."""
        raise UsageError(f"{message} (--help lists the options)")

    def add_ratios_and_model(self) -> None:
        """Add the options that `chosen_ratios` and `chosen_model` read."""
        self.add_argument(
            "--model",
            metavar="MODEL",
            help="shapes, a diffusers folder, a .safetensors checkpoint or a hub id in the local "
            "cache; default: that of the ratios file",
        )
        self.add_argument(
            "--ratios", type=Path, metavar="JSON", help="an exported best_ratios.json, or:"
        )
        for group in GROUPS:
            self.add_argument(
                f"--{group}", type=float, metavar="R", help=f"the ratio of the {group} blocks"
            )


def warn(message: object) -> None:
    """Say a warning in one line, without the code that gave it."""
    print(f"warning: {message}", file=sys.stderr)


def run(command: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None) -> int:
    """Run a command and return its exit code; errors and warnings become one line each."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    make_reproducible()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: warn(message)
            command(arguments)
    except (CRDiffError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def chosen_ratios(options: argparse.Namespace) -> tuple[BlockRatios, RatiosFile | None]:
    """Return the ratios, and the file that they are from; None: given by hand."""
    by_hand = {group: getattr(options, group) for group in GROUPS}
    if options.ratios is not None:
        if any(ratio is not None for ratio in by_hand.values()):
            raise UsageError("--ratios and --down/--mid/--up: give either the file or the three")
        file = RatiosFile.read(options.ratios)
        return file.ratios, file
    missing = [f"--{group}" for group, ratio in by_hand.items() if ratio is None]
    if missing:
        raise UsageError(f"no {' '.join(missing)}: give --ratios FILE, or all three ratios")
    return BlockRatios(**by_hand), None


def recipe_of(file: RatiosFile | None) -> Mapping[str, Any]:
    """Return how the search that the file is from drew its pictures, as far as it says so."""
    recipe = file.provenance.get("recipe") if file else None
    return recipe if isinstance(recipe, dict) else {}


def chosen_model(source: str | None, dtype: str | None, file: RatiosFile | None) -> Model:
    """Return the model, complete and of the kind that the file is for.

    source, dtype: by default the file's; a dtype that it does not name is float32.
    """
    if dtype is None:
        dtype = str(recipe_of(file).get("dtype", "float32"))
    found = file.provenance.get("source") if file else None
    known = found if isinstance(found, dict) else {}
    hub_id, revision = str(known.get("hub_id", "")), str(known.get("hub_revision", "main"))
    if source is None and file is not None and "file" not in known:
        source = hub_id or (file.model if file.model in EMBEDDED else None)
    if source is None:
        raise UsageError(
            "no --model, and no ratios file that names one on the hub: give shapes, a folder, a "
            ".safetensors checkpoint or a hub id (OWNER/NAME)"
        )
    model = Model.find(source, dtype, hub_id, revision)
    model.check()
    # `apply` says so too, but only once the model is loaded.
    searched = file.provenance.get("num_prunable") if file else None
    if file is not None and searched is not None and searched != model.num_prunable():
        raise RatiosError(
            f"these ratios are of {file.model}, whose groups have {searched} prunable weights, "
            f"and those of {model.folder} have {model.num_prunable()}: search this model, or give "
            "the ratios by --down, --mid and --up"
        )
    return model


def check_new(folder: Path) -> None:
    """Raise UsageError unless a folder of this name can be made."""
    if os.path.lexists(folder):
        raise UsageError(f"--out {folder}: is there already: give a new name, or delete it")
    if not os.access(folder.parent, os.W_OK):
        raise UsageError(f"--out {folder}: {folder.parent} is not a folder you may write to")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which takes its name only once the block has ended well.

    Raises UsageError if the name is taken.
    """
    check_new(folder)
    draft = folder.absolute().with_name(f".{folder.absolute().name}.{os.getpid()}")
    draft.mkdir()
    try:
        yield draft
        check_new(folder)  # Or an empty folder that was made meanwhile would be replaced.
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
