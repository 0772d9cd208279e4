"""Searches that tests run as a user does: `python -m search.run` in a process of its own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

SMALL = (
    "budget.steps=4",
    "prompts.search=8",
    "prompts.rerank=4",
    "prompts.validation=8",
)
# What a search must keep to itself: FINISHED has them in its environment.
SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
)


def environment(ray_folder: Path | str) -> dict[str, str]:
    """Return a search's environment: Ray in this folder, any warning of ours an error."""
    warnings = ",".join(f"error:::{name}" for name in ("crdiff_core", "search"))
    return {**os.environ, "RAY_TMPDIR": str(ray_folder), "PYTHONWARNINGS": warnings}


def command(output: Path | str, *arguments: str) -> list[str]:
    """Return the command of a small search of the embedded model."""
    return [sys.executable, "-m", "search.run", *SMALL, f"output={output}", *arguments]


def search(
    output: Path | str, environment: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run a small search from another folder than the checkout."""
    return subprocess.run(
        command(output, *arguments),
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def start(
    output: Path | str, environment: dict[str, str], prints_to: int
) -> subprocess.Popen[str]:
    """Start such a search in a session of its own, for tests that end it early."""
    return subprocess.Popen(
        command(output),
        cwd="/",
        env=environment,
        stdout=prints_to,
        stderr=prints_to,
        text=True,
        start_new_session=True,
    )


def num_drawn(printed: str) -> int:
    """Return how many pictures a run says it drew."""
    line = next(line for line in printed.splitlines() if line.startswith("pictures"))
    return 0 if "nothing was drawn" in line else int(line.split()[1])


@dataclass(frozen=True)
class Finished:
    """A small search that has run to its end.

    output:          its output folder, whose path has spaces.
    printed, errors: what it printed.
    secrets:         what its environment held, by name.
    ray_files:       a copy of the files that Ray wrote.
    """

    output: str
    printed: str
    errors: str
    secrets: dict[str, str]
    ray_files: str

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output) / "shapes_24x40" / "annealing-seed0"

    @classmethod
    def run(cls, folder: Path) -> Finished:
        """Run the search, keeping all it leaves in a folder."""
        output, ray_files = folder / "runs of ours", folder / "ray"
        given = {name: f"secret{secrets.token_hex(16)}" for name in SECRETS}
        # Ray's own folder needs a short path: it holds Unix sockets.
        with tempfile.TemporaryDirectory(prefix="crf", dir="/tmp") as short:
            done = search(output, {**environment(short), **given})
            assert done.returncode == 0, done.stdout + done.stderr
            shutil.copytree(short, ray_files, ignore=lambda *_: ["sockets"], symlinks=True)
        return cls(str(output), done.stdout, done.stderr, given, str(ray_files))

    @classmethod
    def once(cls, folder: Path) -> Finished:
        """Run the search if nobody has run it in this folder; else read what came of it."""
        record = folder / "finished.json"
        if not record.exists():
            record.write_text(json.dumps(asdict(cls.run(folder))))
        return cls(**json.loads(record.read_text()))
