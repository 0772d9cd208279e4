"""Prompts: a text, a tag and the seed of its initial noise; read from text, CSV and Parquet."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crdiff_core.errors import PromptError


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
    """Prompts in a fixed order; the order decides which of them share a batch."""

    name: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def batches(self, batch_size: int) -> list[tuple[Prompt, ...]]:
        """Cut into consecutive batches; the last may be smaller."""
        starts = range(0, len(self.prompts), batch_size)
        return [self.prompts[start : start + batch_size] for start in starts]

    @property
    def digest(self) -> str:
        """A SHA-256 of texts and seeds, in order."""
        lines = "\n".join(f"{prompt.seed} {prompt.text}" for prompt in self.prompts)
        return hashlib.sha256(lines.encode()).hexdigest()


def split_prompts(
    texts: Sequence[str], sizes: dict[str, int], seed: int, source: str
) -> dict[str, PromptSet]:
    """Cut disjoint prompt sets from the start of a list of texts.

    texts:  duplicates count once.
    sizes:  number of prompts by the set's name, in the order in which they are cut.
    seed:   of the initial noise.
    source: where the texts came from, for the message.
    Raises PromptError when there are too few.
    """
    distinct = list(dict.fromkeys(texts))
    wanted = sum(sizes.values())
    if len(distinct) < wanted:
        need = " + ".join(f"{size} {name}" for name, size in sizes.items())
        raise PromptError(
            f"{source} has {len(distinct)} distinct prompts and {need} are needed, all disjoint: "
            "add prompts, or lower prompts.search, prompts.rerank or prompts.validation"
        )
    sets: dict[str, PromptSet] = {}
    for name, size in sizes.items():
        part, distinct = distinct[:size], distinct[size:]
        prompts = (
            Prompt(text, f"{name}-{index:03d}", noise_seed(text, seed))
            for index, text in enumerate(part)
        )
        sets[name] = PromptSet(name, tuple(prompts))
    return sets


def noise_seed(text: str, seed: int) -> int:
    """Return the noise seed of a prompt, in [0, 2**31): a hash of its text and the run's seed."""
    digest = hashlib.sha256(f"{seed} {text}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """Read prompt texts: one a line (.txt), or the column `prompt` or `caption` of CSV, Parquet.

    Empty lines are skipped. Raises PromptError if the file cannot be read or holds no prompt.
    """
    file = Path(path)
    try:
        suffix = file.suffix.lower()
        if suffix == ".parquet":
            texts: Iterable[str] = _read_parquet(file)
        elif suffix == ".csv":
            texts = _read_csv(file)
        else:
            texts = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        reason = error.strerror or str(error)
        raise PromptError(f"{path}: {reason}: set prompts.path to a readable file") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text ({error.reason}): save it as UTF-8") from error
    found = [text.strip() for text in texts if text and text.strip()]
    if not found:
        raise PromptError(f"{path}: holds no prompt: write one prompt a line")
    return found


_COLUMNS = ("prompt", "caption")


def _column(found: Sequence[str], path: Path) -> str:
    for name in _COLUMNS:
        if name in found:
            return name
    raise PromptError(f"{path}: has the columns {list(found)}: name one of them prompt")


def _read_csv(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            column = _column(reader.fieldnames or [], path)
            return [row[column] or "" for row in reader]
        except csv.Error as error:
            raise PromptError(f"{path}: line {reader.line_num}: {error}") from error


def _read_parquet(path: Path) -> list[str]:
    # Only this format needs pyarrow, which a machine that only draws may not have.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        column = _column(pq.read_schema(path).names, path)
        values = pq.read_table(path, columns=[column])[column].to_pylist()
    except pa.ArrowInvalid as error:
        raise PromptError(f"{path}: not Parquet ({error}): write it again") from error
    return [str(value) for value in values if value is not None]
