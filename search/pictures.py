"""The pictures that a report shows, in Parquet beside the ledger; losing them costs no reward."""

from __future__ import annotations

import io
import logging
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ArrowException

from crdiff_core.prompts import Prompt
from search.storage import Storage, StorageError

log = logging.getLogger(__name__)

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("picture", pa.binary()),
    ]
)
_NUM_READERS = 16
_Key = tuple[str, str, int]


class Pictures:
    """An append-only folder of Parquet files: encoded pictures by (evaluation key, prompt, seed).

    All searches of a cell share it, as they do the ledger. It may be deleted at any time.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        # The file that each picture is in, as far as files were read.
        self._places: dict[_Key, str] = {}
        self._names: set[str] = set()

    def add(self, key: str, prompts: Sequence[Prompt], pictures: Mapping[int, bytes]) -> None:
        """Keep pictures of these prompts, by their place among them.

        Where that fails the search goes on without: they are worth no paid reward.
        """
        rows: list[dict[str, Any]] = [
            {
                "key": key,
                "prompt": prompts[place].text,
                "seed": prompts[place].seed,
                "picture": picture,
            }
            for place, picture in pictures.items()
        ]
        if not rows:
            return
        data = io.BytesIO()
        # They are compressed already.
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        pq.write_table(table, data, compression="none", write_page_checksum=True)
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}.parquet"
        try:
            self.storage.make()
            self.storage.write(name, data.getvalue())
        except StorageError as broken:
            log.warning("pictures are not kept: %s", broken)
            return
        self._places |= {(row["key"], row["prompt"], row["seed"]): name for row in rows}
        self._names.add(name)

    def get(self, key: str, prompts: Sequence[Prompt]) -> list[bytes | None]:
        """Return the pictures of these prompts under a key; None where none was kept."""
        keys = [(key, prompt.text, prompt.seed) for prompt in prompts]
        if any(each not in self._places for each in keys):
            self._read_places()
        names = sorted({self._places[each] for each in keys if each in self._places})
        found: dict[_Key, bytes] = {}
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            for rows in readers.map(self._read, names):
                found |= {(row["key"], row["prompt"], row["seed"]): row["picture"] for row in rows}
        return [found.get(each) for each in keys]

    def _read_places(self) -> None:
        """Look into the files that others have written meanwhile."""
        names = sorted(
            name
            for name in self.storage.files()
            if name.endswith(".parquet") and name not in self._names
        )
        columns = ["key", "prompt", "seed"]
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            contents = list(readers.map(lambda name: self._read(name, columns), names))
        for name, rows in zip(names, contents, strict=True):
            self._places |= {(row["key"], row["prompt"], row["seed"]): name for row in rows}
        self._names.update(names)

    def _read(self, name: str, columns: list[str] | None = None) -> list[dict[str, Any]]:
        try:
            file = io.BytesIO(self.storage.read(name) or b"")
            table = pq.read_table(file, columns=columns, page_checksum_verification=True)
            rows: list[dict[str, Any]] = table.to_pylist()
        except (ArrowException, ValueError, KeyError, OSError) as error:
            reason = str(error).partition("\n")[0]
            log.warning("%s cannot be read and is left out: %s", self.storage / name, reason)
            return []
        return rows
