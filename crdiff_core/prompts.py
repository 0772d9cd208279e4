"""Prompts: a text, a tag and the seed of its initial noise; from files, shipped lists and COCO.

`python -m crdiff_core.prompts coco --help` makes the paper's COCO subset.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from reprlib import repr as shown
from typing import NoReturn

from crdiff_core.coco import COCO_FILE, COCO_SEED, COCO_SIZE, CocoCaptions, write_subset
from crdiff_core.errors import PromptError

_LISTS = Path(__file__).parent / "prompt_lists"

PROMPT_LISTS = {
    # The two prompts that the reference implementation of CR-Diff searches with.
    "reference": _LISTS / "reference.txt",
    # 200 of our own, in mixed order, such as people ask of text-to-image models.
    "everyday": _LISTS / "everyday.txt",
}
"""The prompt lists that ship with the package, by name."""


@dataclass(frozen=True)
class Prompt:
    """One picture to draw.

    text: the prompt.
    tag:  a short name for tables and files.
    seed: of the initial noise, which so does not depend on the batch the prompt is in.
    """

    text: str
    tag: str
    seed: int


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order, in which they are drawn."""

    name: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def texts(self) -> list[str]:
        """The prompts' texts, in order."""
        return [prompt.text for prompt in self.prompts]

    @property
    def digest(self) -> str:
        """A SHA-256 of texts and seeds, in order."""
        lines = "\n".join(f"{prompt.seed} {prompt.text}" for prompt in self.prompts)
        return hashlib.sha256(lines.encode()).hexdigest()


def split_prompts(
    texts: Sequence[str],
    sizes: dict[str, int],
    seed: int,
    source: str,
    repeat: bool = False,
    shared_noise: bool = False,
) -> dict[str, PromptSet]:
    """Cut prompt sets, disjoint in text and noise together, from the start of a list of texts.

    texts:  duplicates count once.
    sizes:  number of prompts by the set's name, in the order in which they are cut.
    seed:   of the initial noise.
    source: where the texts came from, for the message.
    repeat: start again at the first text, with other noise, when the texts are used up; a set
            whose size is a multiple of their number then has each equally often. Without it the
            sets are disjoint in text too.
    shared_noise: give all texts the noise of `seed` itself, of seed + 1 when they are repeated,
            and so on, as the reference implementation of CR-Diff does with its two prompts.
            Without it a text's noise is its own.
    Raises PromptError when there are too few, or none to repeat.
    Source of repeat: CR-Diff (arXiv:2604.05524), section 4.3, one prompt with many seeds.
    """
    distinct = list(dict.fromkeys(texts))
    wanted = sum(sizes.values())
    if len(distinct) < wanted and not (repeat and distinct):
        need = " + ".join(f"{size} {name}" for name, size in sizes.items())
        raise PromptError(
            f"{source} has {len(distinct)} distinct prompts and {need} are needed, all disjoint: "
            "add prompts, lower prompts.search, prompts.rerank or prompts.validation, or set "
            "prompts.repeat=true"
        )
    endless = _with_noise(distinct, seed, shared_noise)
    sets: dict[str, PromptSet] = {}
    for name, size in sizes.items():
        prompts = (
            Prompt(text, f"{name}-{index:03d}", noise)
            for index, (text, noise) in enumerate(islice(endless, size))
        )
        sets[name] = PromptSet(name, tuple(prompts))
    return sets


def _with_noise(
    texts: Sequence[str], seed: int, shared_noise: bool = False
) -> Iterator[tuple[str, int]]:
    """Yield the texts, round after round without end, each with its noise seed of the round.

    texts: distinct, at least one. No pair is yielded twice.
    """
    used: set[tuple[str, int]] = set()
    for repetition in count():
        for text in texts:
            noise = noise_seed(text, seed, repetition)  # It refuses what is no text.
            if shared_noise:
                noise = (seed + repetition) % 2**31
            # Of 31-bit hashes of one text, two of some 50,000 are likely to be equal. The earlier
            # round keeps its seed, so that what has been drawn stays valid when more is asked for.
            while (text, noise) in used:
                noise = (noise + 1) % 2**31
            used.add((text, noise))
            yield text, noise


def noise_seed(text: str, seed: int, repetition: int = 0) -> int:
    """Return the noise seed of a prompt, in [0, 2**31): a hash of its text and the run's seed.

    repetition: how often a set, or another before it, has had the text already.
    Raises PromptError for what is no text, as a command line in another encoding gives it.
    """
    # No run's seed begins with a letter: no repetition shares its hash with another text's first.
    again = f"repetition {repetition} " if repetition else ""
    try:
        digest = hashlib.sha256(f"{again}{seed} {text}".encode()).digest()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"prompt {shown(text)} is no text ({error.reason}): write it in UTF-8"
        ) from error
    return int.from_bytes(digest[:4], "big") >> 1


def shipped_texts(name: str) -> list[str]:
    """Return the texts of a prompt list that ships with the package.

    name: a key of PROMPT_LISTS.
    Raises PromptError for any other.
    """
    if name not in PROMPT_LISTS:
        raise PromptError(f"prompt list {name!r} is unknown: choose {' or '.join(PROMPT_LISTS)}")
    return read_texts(PROMPT_LISTS[name])


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """Read prompt texts: one a line (.txt), or the column `prompt` or `caption` of CSV, Parquet.

    Empty lines are skipped. Raises PromptError if the file cannot be read or holds no prompt, or
    something else.
    """
    file = Path(path)
    try:
        suffix = file.suffix.lower()
        if suffix == ".parquet":
            texts = _read_parquet(file)
        elif suffix == ".csv":
            texts = _read_csv(file)
        else:
            # Not splitlines: to it a form feed within a prompt is the end of a line.
            texts = file.read_text(encoding="utf-8-sig").split("\n")
    except PromptError:
        raise
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text ({error.reason}): save it as UTF-8") from error
    except (OSError, ValueError) as error:  # Of a name with a NUL.
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise PromptError(f"{path}: {reason}: set prompts.path to a readable file") from error
    found = [text.strip() for text in texts if text.strip()]
    if not found:
        raise PromptError(f"{path}: holds no prompt: write one prompt a line")
    if any("\0" in text for text in found):
        raise PromptError(f"{path}: not text, it holds NULs: save it as UTF-8")
    return found


_COLUMNS = ("prompt", "caption")


def _column(found: Sequence[str], path: Path) -> int:
    for name in _COLUMNS:
        if found.count(name) > 1:
            raise PromptError(f"{path}: has {found.count(name)} columns {name}: leave one")
        if name in found:
            return found.index(name)
    raise PromptError(f"{path}: has the columns {list(found)}: name one of them prompt")


def _read_csv(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, strict=True)
        try:
            heading = next(rows, [])
            column = _column(heading, path)
            texts = []
            for row in rows:
                if any(row[len(heading) :]):  # Part of the prompt would be lost.
                    raise PromptError(
                        f"{path}: line {rows.line_num} has {len(row)} fields and the heading "
                        f"{len(heading)}: put prompts with commas into quotes"
                    )
                texts += row[column : column + 1]
            return texts
        except csv.Error as error:
            raise PromptError(
                f"{path}: line {rows.line_num}: {error}: put prompts into quotes, and double "
                "those within"
            ) from error


def _read_parquet(path: Path) -> list[str]:
    # Only this format needs pyarrow, which a machine that only draws may not have.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            name = names[_column(names, path)]
            values = file.read(columns=[name])[name].to_pylist()
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise PromptError(f"{path}: not Parquet ({reason}): write it again") from error
    texts = [value for value in values if value is not None]
    for text in texts:
        if not isinstance(text, str):
            raise PromptError(
                f"{path}: its column {name} holds {type(text).__name__}, not text: write strings"
            )
    return texts


# --- the command line ------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print its usage, many lines, above the message.
        raise PromptError(f"{message} (--help lists the options)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m crdiff_core.prompts", description="Make files of prompts.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = "draw the paper's subset of COCO: random images, one caption of each, as Parquet"
    add = commands.add_parser("coco", help=about, description=about).add_argument
    add("--captions", type=Path, required=True, metavar="JSON", help="captions_val2014.json")
    add("--images", type=Path, metavar="FOLDER", help="val2014/: put the images in the file too")
    add("--out", type=Path, default=Path(COCO_FILE), help=f"default: {COCO_FILE}")
    add("--num", type=int, default=COCO_SIZE, metavar="N", help=f"default: {COCO_SIZE}")
    add("--seed", type=int, default=COCO_SEED, help=f"of the choice; default: {COCO_SEED}")
    return parser


def _check_options(options: argparse.Namespace) -> None:
    for name, value, least in (("--num", options.num, 1), ("--seed", options.seed, 0)):
        if value < least:
            raise PromptError(f"{name} {value}: give at least {least}")
    out = options.out
    if out.suffix.lower() != ".parquet":
        raise PromptError(f"--out {out}: not the name of a Parquet file: end it with .parquet")
    if out.is_dir():
        raise PromptError(f"--out {out}: is a folder: give the name of a file")
    if not os.access(out.parent, os.W_OK):
        raise PromptError(f"--out {out}: {out.parent} is not a folder you may write to")
    if options.images is not None and not options.images.is_dir():
        raise PromptError(f"--images {options.images}: is not a folder: give val2014/")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the file that the command line asks for; return the exit code."""
    try:
        options = _parser().parse_args(arguments)
        _check_options(options)
        write_subset(
            CocoCaptions.read(options.captions),
            options.out,
            images=options.images,
            num=options.num,
            seed=options.seed,
        )
    except (PromptError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
