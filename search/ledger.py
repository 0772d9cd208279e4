"""The ledger: every reward ever measured, in Parquet; the only state of a search that counts."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ArrowException

from crdiff_core.errors import CRDiffError
from crdiff_core.prompts import Prompt
from crdiff_core.ratios import GROUPS, BlockRatios, Group, Resolution
from search.space import Candidate
from search.storage import Storage, StorageError

if TYPE_CHECKING:
    from crdiff_core.evaluation import Measurement

log = logging.getLogger(__name__)


# Files read at once: an object store takes its time for each.
_NUM_READERS = 16


class LedgerError(CRDiffError):
    """A ledger that this version cannot use."""


@dataclass(frozen=True)
class Recipe:
    """Everything, but ratios and prompt, that a reward is a function of.

    Two equal recipes give equal rewards, so a reward measured once is never measured again.

    A later field has a default: the behaviour before the field existed. Keys leave defaults out,
    so keys of earlier ledgers stay as they are. A column of the field's name in SCHEMA keeps it;
    null is the default.

    size_conditioning: the HEIGHTxWIDTH that SDXL is told; requested: that of the picture.
    drawn_at:          the HEIGHTxWIDTH that pictures are drawn at, before they are resized to
                       height and width; requested: at those.
    negative_prompt:   what guidance leads away from; None: the pipeline's own.
    batch_size:        pictures drawn in one forward pass; None: the model's own number.
    """

    model: str
    revision: str
    height: int
    width: int
    dtype: str
    scheduler: str
    num_steps: int
    guidance_scale: float
    poa_weight: float
    reward: str
    reward_version: str
    size_conditioning: str = "requested"
    drawn_at: str = "requested"
    negative_prompt: str | None = None
    batch_size: int | None = None

    @classmethod
    def of_row(cls, row: Mapping[str, Any], own_batch_size: int | None) -> Recipe:
        """Return the recipe of a ledger's row; what is null there has its default."""
        columns = {each.name: each.name for each in fields(cls)} | {"reward": "reward_name"}
        found = {name: row[column] for name, column in columns.items()}
        if found["batch_size"] == own_batch_size:
            del found["batch_size"]
        return cls(**{name: value for name, value in found.items() if value is not None})

    @property
    def told_size(self) -> Resolution | None:
        """The size that SDXL is told of its pictures; None: their own."""
        if self.size_conditioning == "requested":
            return None
        return Resolution.parse(self.size_conditioning)

    @property
    def parts(self) -> dict[str, Any]:
        """The fields that are part of keys: those that have not their default."""
        values = asdict(self)
        # What has none has MISSING, which equals nothing.
        return {
            each.name: values[each.name]
            for each in fields(self)
            if values[each.name] != each.default
        }

    def key(self, ratios: BlockRatios) -> str:
        """Name the evaluation of these ratios: a SHA-256 of the recipe and them."""
        # The dense model has no pruned output to amplify: one key whatever the weight.
        recipe = replace(self, poa_weight=0.0) if ratios.is_dense else self
        parts = {**recipe.parts, "ratios": ratios.as_dict()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


STAGES = ("prune", "render", "score")
"""What a trial's seconds are spent on."""
DRAWN_BY = ("device", "torch", "compile")
"""What else moves a reward's last digits: the GPU, torch's version, the mode of compilation."""

# Of a file's rows: what a newer version writes is refused, what an older one wrote is read, with
# nulls where it had no column yet.
VERSION = 1
_VERSION_KEY = b"crdiff_ledger_schema"

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        # None where the evaluation failed; a failure is never a number.
        ("reward", pa.float64()),
        ("failure", pa.string()),
        *((group, pa.float64()) for group in GROUPS),
        *((f"sparsity_{group}", pa.float64()) for group in GROUPS),
        ("model", pa.string()),
        ("revision", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("dtype", pa.string()),
        ("scheduler", pa.string()),
        ("num_steps", pa.int32()),
        ("guidance_scale", pa.float64()),
        ("poa_weight", pa.float64()),
        ("reward_name", pa.string()),
        ("reward_version", pa.string()),
        ("size_conditioning", pa.string()),
        ("drawn_at", pa.string()),
        # Null: the pipeline's own.
        ("negative_prompt", pa.string()),
        # The search that paid for it.
        ("run", pa.string()),
        # Pictures drawn in one forward pass.
        ("batch_size", pa.int32()),
        # True: drawn, decoded or scored in smaller parts than usual, so its digits may differ.
        ("redrawn", pa.bool_()),
        *((name, pa.string()) for name in DRAWN_BY),
        # Of the whole batch, divided evenly among its rows.
        ("seconds", pa.float64()),
        *((f"{stage}_seconds", pa.float64()) for stage in STAGES),
        # The GPU's peak while the batch was drawn.
        ("memory_gib", pa.float64()),
        ("measured_at", pa.timestamp("ms", tz="UTC")),
    ],
    metadata={_VERSION_KEY: str(VERSION)},
)


@dataclass(frozen=True)
class Entry:
    """What the ledger knows of one prompt under one key: a reward, or why there is none.

    measured_at: in seconds since 1970.
    stages:      the seconds by stage; empty where they were not written yet.
    memory_gib:  the GPU's peak; None: not measured.
    drawn_by:    what else moves its last digits, by name; empty where that was not written yet.
    """

    reward: float | None
    failure: str | None
    seconds: float
    sparsity: dict[Group, float]
    measured_at: float
    stages: dict[str, float]
    memory_gib: float | None
    drawn_by: dict[str, str]


@dataclass
class Spent:
    """What one search has paid for so far, in all its sessions.

    seconds: that workers took to draw and score, summed over them.
    keys:    of what it evaluated.
    """

    num_pictures: int = 0
    seconds: float = 0.0
    keys: set[str] = field(default_factory=set)


class Ledger:
    """An append-only folder of Parquet files, one row for each (evaluation key, prompt, seed).

    A batch's rows become durable together before `append` returns. Several drivers may append to
    one folder. Where a row is there twice, the first one written counts.

    Rows are known by the key that their columns give today: those from before the batch size was
    part of it were written without.
    """

    def __init__(
        self,
        storage: Storage | str | Path,
        *,
        run: str = "",
        retry_failed: bool = False,
        own_batch_size: int | None = None,
    ) -> None:
        """Read what is there.

        run:            name of the search that appends.
        retry_failed:   forget recorded failures, so that they are evaluated again.
        own_batch_size: the model's own number of pictures in one forward pass.
        Raises StorageError if the folder cannot be made or read, LedgerError if a newer version
        has written to it.
        """
        self.storage = storage if isinstance(storage, Storage) else Storage.at(storage)
        self.candidates: dict[str, Candidate] = {}
        """What each key stands for, whichever search evaluated it."""
        self.spent = Spent()
        self.own_batch_size = own_batch_size
        self._run = run
        self._retry_failed = retry_failed
        self._entries: dict[tuple[str, str, int], Entry] = {}
        self._names: list[str] = []
        self._rescued: Path | None = None
        # Today's keys, by the key and the batch size that a row was written with.
        self._keys: dict[tuple[str, int | None], str] = {}
        self.storage.make()
        for row in self._written().to_pylist():
            sparsity = {group: row[f"sparsity_{group}"] for group in GROUPS}
            self._add(row, sparsity)

    def table(self) -> pa.Table:
        """Return every row, oldest file first, under the keys of today."""
        table = self._written()
        keys = pa.array(map(self._key, table.to_pylist()), pa.string())
        return table.set_column(table.schema.get_field_index("key"), "key", keys)

    def _written(self) -> pa.Table:
        self._names = self._files()
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            tables = [each for each in readers.map(self._read, self._names) if each is not None]
        return pa.concat_tables(tables) if tables else SCHEMA.empty_table()

    @property
    def has_grown(self) -> bool:
        """Whether others have written to it since it was read."""
        return self._files() != self._names

    def _files(self) -> list[str]:
        return sorted(name for name in self.storage.files() if name.endswith(".parquet"))

    def _read(self, name: str) -> pa.Table | None:
        data = self.storage.read(name)
        if data is None:
            return None
        place = self.storage / name
        try:
            version = int((pq.read_schema(io.BytesIO(data)).metadata or {})[_VERSION_KEY])
            if version <= VERSION:
                return pq.read_table(
                    io.BytesIO(data), schema=SCHEMA, page_checksum_verification=True
                )
        except KeyError:
            log.warning("%s is no ledger file and is left out: move it away", place)
            return None
        except (ArrowException, ValueError, OSError) as error:
            reason = str(error).partition("\n")[0]
            log.warning(
                "%s cannot be read and is left out: %s: delete it, its pictures are drawn again",
                place,
                reason,
            )
            return None
        raise LedgerError(
            f"{place} was written by a newer version of crdiff-search (schema {version}, this one "
            f"knows {VERSION}): update this one, or set output to another place"
        )

    def get(self, key: str, prompt: Prompt) -> Entry | None:
        """Return what is known of a prompt under a key."""
        return self._entries.get((key, prompt.text, prompt.seed))

    def append(
        self,
        recipe: Recipe,
        ratios: BlockRatios,
        prompts: Sequence[Prompt],
        outcome: Measurement | str,
        *,
        drawn_by: Mapping[str, str] | None = None,
        redrawn: bool = False,
    ) -> int:
        """Write the rows of one prompt batch, durably; those that are there already are left out.

        prompts:  the first ones of the batch; what it drew after them only filled it up.
        outcome:  what was measured, or in one line why it failed.
        drawn_by: values of DRAWN_BY; redrawn: whether a first try had failed.
        Returns the number of rows written.
        Raises StorageError if they cannot be written; they are then kept on this machine.
        """
        failed = isinstance(outcome, str)
        key = recipe.key(ratios)
        rewards = (None,) * len(prompts) if isinstance(outcome, str) else outcome.rewards
        fresh = [
            (prompt, reward)
            for prompt, reward in zip(prompts, rewards, strict=False)
            if not self._is_known(key, prompt, failed)
        ]
        if not fresh:
            return 0
        seconds = 0.0 if isinstance(outcome, str) else sum(outcome.seconds.values())
        sparsity = {} if isinstance(outcome, str) else outcome.sparsity
        stages = {} if isinstance(outcome, str) else outcome.seconds
        shared: dict[str, Any] = {
            "key": key,
            "failure": outcome if failed else None,
            **{group: ratios[group] for group in GROUPS},
            **{f"sparsity_{group}": sparsity.get(group) for group in GROUPS},
            **{name: value for name, value in asdict(recipe).items() if name != "reward"},
            "poa_weight": 0.0 if ratios.is_dense else recipe.poa_weight,
            "reward_name": recipe.reward,
            "run": self._run,
            "batch_size": recipe.batch_size or self.own_batch_size,
            "redrawn": redrawn or None,
            **(drawn_by or {}),
            "seconds": seconds / len(fresh),
            **{
                f"{stage}_seconds": stages[stage] / len(fresh)
                for stage in STAGES
                if stage in stages
            },
            "memory_gib": None if isinstance(outcome, str) else outcome.memory_gib,
            "measured_at": datetime.now(UTC),
        }
        rows = [
            {**shared, "prompt": prompt.text, "seed": prompt.seed, "reward": reward}
            for prompt, reward in fresh
        ]
        self._write(rows)
        for row in rows:
            self._add(row, sparsity)
        return len(rows)

    def _is_known(self, key: str, prompt: Prompt, failed: bool) -> bool:
        """Whether a row would say nothing new; a reward does where there is only a failure."""
        known = self.get(key, prompt)
        return known is not None and (failed or known.failure is None)

    def _key(self, row: Mapping[str, Any]) -> str:
        """Return the key that a row's columns give today, and note what it stands for."""
        written = row["key"], row["batch_size"]
        if written not in self._keys:
            ratios = BlockRatios(**{group: row[group] for group in GROUPS})
            recipe = Recipe.of_row(row, self.own_batch_size)
            key = self._keys[written] = recipe.key(ratios)
            self.candidates.setdefault(key, Candidate(ratios, recipe.poa_weight, recipe.drawn_at))
        return self._keys[written]

    def _add(self, row: Mapping[str, Any], sparsity: dict[Group, float]) -> None:
        key = self._key(row)
        if self._run and row["run"] == self._run:
            self.spent.num_pictures += row["reward"] is not None
            self.spent.seconds += row["seconds"]
            self.spent.keys.add(key)
        measured_at = row["measured_at"].timestamp()
        stages = {stage: row.get(f"{stage}_seconds") for stage in STAGES}
        drawn_by = {name: row.get(name) for name in DRAWN_BY}
        entry = Entry(
            row["reward"],
            row["failure"],
            row["seconds"],
            sparsity,
            measured_at,
            {stage: taken for stage, taken in stages.items() if taken is not None},
            row["memory_gib"],
            {name: value for name, value in drawn_by.items() if value is not None},
        )
        place = (key, row["prompt"], row["seed"])
        known = self._entries.get(place)
        if entry.failure is not None and (self._retry_failed or known is not None):
            return
        if known is None or known.failure is not None:
            self._entries[place] = entry

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        data = io.BytesIO()
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        pq.write_table(table, data, write_page_checksum=True)
        # Time first, so that files sort by age.
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}.parquet"
        try:
            self.storage.write(name, data.getvalue())
        except StorageError as broken:
            raise StorageError(f"{broken}{self._rescue(name, data.getvalue())}") from broken

    def _rescue(self, name: str, data: bytes) -> str:
        """Keep on this machine what was paid for and cannot be written; say where."""
        try:
            self._rescued = self._rescued or Path(tempfile.mkdtemp(prefix="crdiff-ledger-"))
            (self._rescued / name).write_bytes(data)
        except OSError:  # Here there is no space either.
            return ""
        return f"; the rows just measured are in {self._rescued}: move them there, then run again"
