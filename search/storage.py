"""Storage: where a search keeps what must not be lost: a local folder, NFS, or an object store."""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from pyarrow import ArrowException, fs

from crdiff_core.errors import CRDiffError

_REMEDY = "set output to a place you may read and write"


class StorageError(CRDiffError):
    """A place cannot be reached, read or written."""


@dataclass(frozen=True)
class Storage:
    """A folder on a filesystem of pyarrow's.

    What is written is durable and whole before `write` returns: nobody ever reads half a file.
    Every method raises StorageError, in one line, where the filesystem fails.
    """

    filesystem: fs.FileSystem
    path: str
    scheme: str = ""
    options: str = ""

    @classmethod
    def at(cls, place: str | Path) -> Storage:
        """Return the storage at a path or a URI such as s3://bucket/folder?region=eu-west-1."""
        text = str(place)
        scheme = re.match(r"[a-zA-Z][\w+.-]*://", text)
        if scheme is None:
            return cls(fs.LocalFileSystem(), str(Path(text).absolute()))
        if re.search(r"@|(access|secret)_key=", text):
            raise StorageError(
                f"{scheme[0]}...: credentials do not belong into a place, which is written down: "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
            )
        try:
            filesystem, path = fs.FileSystem.from_uri(text)
        except (ArrowException, OSError, ValueError) as error:
            raise StorageError(f"{text}: {_reason(error)}: give a path or s3://...") from error
        if not path:
            raise StorageError(f"{text}: it names no bucket: give a path or s3://bucket/folder")
        _, mark, options = text.partition("?")
        return cls(filesystem, path.rstrip("/"), scheme[0], mark + options)

    def __truediv__(self, name: str) -> Storage:
        return replace(self, path=f"{self.path}/{name}")

    def __str__(self) -> str:
        return f"{self.scheme}{self.path}{self.options}"

    @property
    def local(self) -> Path | None:
        """Its path, if it is a folder of this machine's (or a mounted one)."""
        return Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None

    @property
    def name(self) -> str:
        """Its last part."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Storage:
        """The folder it lies in."""
        return replace(self, path=self.path.rpartition("/")[0])

    def make(self) -> None:
        """Make the folder, if it is not there."""
        try:
            self.filesystem.create_dir(self.path, recursive=True)
        except OSError as error:
            raise self._failed(error, _REMEDY) from error

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes; None if it is not there."""
        try:
            with self.filesystem.open_input_stream(f"{self.path}/{name}") as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise (self / name)._failed(error, _REMEDY) from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole, in place of what had its name."""
        try:
            if self.local is None:
                # An object appears when it is whole.
                with self.filesystem.open_output_stream(f"{self.path}/{name}") as file:
                    file.write(data)
            else:
                _write_durably(self.local / name, data)
        except OSError as error:
            raise (self / name)._failed(
                error,
                "free space there, or copy the folder to another place and set output to it; what "
                "is there is kept",
            ) from error

    def move(self, name: str, target: Storage) -> None:
        """Move a file into another folder of the same storage."""
        try:
            self.filesystem.move(f"{self.path}/{name}", f"{target.path}/{name}")
        except OSError as error:
            raise (self / name)._failed(error, _REMEDY) from error

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        try:
            self.filesystem.delete_file(f"{self.path}/{name}")
        except FileNotFoundError:
            return
        except OSError as error:
            raise (self / name)._failed(error, _REMEDY) from error

    def files(self) -> dict[str, float]:
        """Return the names of the files in the folder, and when each was written, by its clock.

        In seconds since 1970; drafts that somebody is writing are not among them.
        """
        return {
            each.base_name: (each.mtime_ns or 0) / 1e9
            for each in self._listed()
            if each.type == fs.FileType.File and not each.base_name.startswith(".")
        }

    def folders(self) -> list[Storage]:
        """Return the folders in it, by name."""
        found = (each.base_name for each in self._listed() if each.type == fs.FileType.Directory)
        return [self / name for name in sorted(found)]

    def _listed(self) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self.path, allow_not_found=True)
        try:
            return list(self.filesystem.get_file_info(selector))
        except OSError as error:
            raise self._failed(error, _REMEDY) from error

    def _failed(self, error: OSError, remedy: str) -> StorageError:
        return StorageError(f"{self}: {_reason(error)}: {remedy}")


def _write_durably(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _reason(error: Exception) -> str:
    # pyarrow's own texts go on for lines, say the path again, and some name requests.
    text = getattr(error, "strerror", None) or str(error)
    text = text.rpartition("Detail: ")[2].split("] ", 1)[-1]
    return " ".join(text.split())[:200]
