"""Logs: warnings of ours on the console, everything in one file of JSON lines for each search."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import IO, TextIO

from search.storage import Storage, StorageError

LOG_FILE = "log.jsonl"
_OURS = ("search", "crdiff_core")
# Packages that print their records themselves.
_LOUD = ("ray", "mlflow", "optuna", "alembic", "diffusers", "transformers")
_FLUSH_INTERVAL_S = 30.0
_USUAL = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def to_console(is_verbose: bool) -> None:
    """Show warnings of ours on stderr; if verbose, everything of anybody."""
    console = _Console()
    console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    if not is_verbose:
        console.addFilter(lambda record: _is_ours(record) and record.levelno >= logging.WARNING)
    level = logging.INFO if is_verbose else logging.WARNING
    logging.basicConfig(level=level, handlers=[console], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(True)


def one_line(text: str) -> str:
    """Put a message into one line, for a person or a file to keep."""
    # An URI that was not understood may have a password in it.
    return re.sub(r"://\S*@", "://...@", " ".join(text.split()))


def take_over() -> None:
    """Let the records of packages that are imported by now come to our handlers alone."""
    for name in _LOUD:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    # It misses the files of trials, of which we let it write none.
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)


@contextmanager
def to_file(folder: Storage) -> Iterator[None]:
    """Add every record to the folder's log.jsonl: its time, level, logger, message, and fields.

    A log that cannot be written ends nothing.
    """
    handler = _Local(folder) if folder.local is not None else _Remote(folder)
    handler.setFormatter(_JSONLines())
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in _OURS


def _is_field(name: str) -> bool:
    # Ray adds one of its own to every record.
    return name not in _USUAL and not name.startswith("_")


class _Console(logging.StreamHandler[TextIO]):
    """Writes to what stderr is by now: a live view takes its place, so that lines go above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _JSONLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if _is_field(name)},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Local(logging.Handler):
    """Appends line by line, so that a driver that is killed leaves all it had to say."""

    def __init__(self, folder: Storage) -> None:
        super().__init__()
        self._file: IO[str] | None = None
        with suppress(OSError):
            assert folder.local is not None
            self._file = (folder.local / LOG_FILE).open("a", encoding="utf-8")

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):
            if self._file is not None:
                self._file.write(self.format(record) + "\n")
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


class _Remote(logging.Handler):
    """Writes the whole object again, now and then: none can be appended to."""

    def __init__(self, folder: Storage) -> None:
        super().__init__()
        self._folder = folder
        self._flushed_s = time.monotonic()
        self._text = ""
        with suppress(StorageError):
            self._text = (folder.read(LOG_FILE) or b"").decode(errors="replace")

    def emit(self, record: logging.LogRecord) -> None:
        self._text += self.format(record) + "\n"
        if time.monotonic() - self._flushed_s > _FLUSH_INTERVAL_S:
            self._write()

    def close(self) -> None:
        self._write()
        super().close()

    def _write(self) -> None:
        self._flushed_s = time.monotonic()
        with suppress(StorageError):
            self._folder.write(LOG_FILE, self._text.encode())
