"""A lease: one driver at a time on one search, wherever its results are kept."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from crdiff_core.errors import CRDiffError
from search.storage import Storage, StorageError

log = logging.getLogger(__name__)

_FILE = "driver.json"


class LeaseError(CRDiffError):
    """Another driver works on the search."""


class Lease:
    """Keeps other drivers off a search, by a file beside its results that is written ever again.

        with Lease(folder) as lease:
            lease.on_lost = stop

    No filesystem has to lock: a driver that died on this machine is recognised by its process,
    one on another machine by a file that has grown old. Ages are by the storage's own clock.

    beat_s: seconds between two writings; lapse_s: age at which a lease counts no more.
    """

    def __init__(self, storage: Storage, beat_s: float = 10.0, lapse_s: float = 60.0) -> None:
        self.on_lost: Callable[[str], None] = log.error
        """Called, from a thread, if another driver has taken over: this one must stop."""
        self._storage = storage
        self._beat_s = beat_s
        self._lapse_s = lapse_s
        self._mine = {"id": uuid.uuid4().hex, **_here()}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    @property
    def is_free(self) -> bool:
        """Whether nobody works on the search."""
        holder = self._holder()
        return holder is None or self._is_over(holder)

    def __enter__(self) -> Lease:
        """Take the lease. Raises LeaseError if another driver has it, and StorageError."""
        holder = self._holder()
        if holder is not None and not self._is_over(holder):
            raise LeaseError(_taken(holder))
        self._write()
        # Of two that come at once the last one to write stays.
        time.sleep(0.05 if self._storage.local is not None else 2.0)
        holder = self._holder()
        if holder is None or holder["id"] != self._mine["id"]:
            raise LeaseError(_taken(holder or {}))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the lease back."""
        self._ended.set()
        self._thread.join()
        try:
            holder = self._holder()
            if holder is not None and holder["id"] == self._mine["id"]:
                self._storage.delete(_FILE)
        except StorageError as broken:  # It lapses by itself.
            log.warning("%s", broken)

    def _keep(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                holder = self._holder()
                if holder is not None and holder["id"] != self._mine["id"]:
                    self.on_lost(_taken(holder))
                    return
                self._write()
            except StorageError as broken:  # The ledger will say so, if it stays.
                log.warning("%s", broken)

    def _write(self) -> None:
        self._storage.write(_FILE, json.dumps(self._mine).encode())

    def _holder(self) -> dict[str, Any] | None:
        try:
            holder = json.loads(self._storage.read(_FILE) or b"null")
            return {name: holder[name] for name in self._mine}
        except (ValueError, KeyError, TypeError):  # None, or not ours.
            return None

    def _is_over(self, holder: dict[str, Any]) -> bool:
        if holder["place"] == self._mine["place"]:
            return not _is_running(holder["process"], holder["began"])
        probe = f"{_FILE}.{self._mine['id']}"
        self._storage.write(probe, b"")
        try:
            written = self._storage.files()
        finally:
            self._storage.delete(probe)
        return _FILE not in written or written[probe] - written[_FILE] > self._lapse_s


def _taken(holder: dict[str, Any]) -> str:
    who = f" (process {holder['process']} on {holder['host']})" if holder else ""
    return (
        f"another driver works on this search{who}: wait until it ends, or stop it; one that died "
        "on another machine is forgotten after a minute"
    )


def _here() -> dict[str, Any]:
    """Say which process this is, so that others can tell whether it still runs."""
    process = os.getpid()
    return {
        "host": socket.gethostname(),
        "place": _place(),
        "process": process,
        "began": psutil.Process(process).create_time(),
    }


def _place() -> str:
    """Name what a process number is unique in: a boot of a machine, and a container in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # Not Linux.
        return f"{uuid.getnode()} {psutil.boot_time():.0f}"


def _is_running(process: int, began: float) -> bool:
    try:
        return bool(abs(psutil.Process(process).create_time() - began) < 1.0)
    except psutil.Error:
        return False
