import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SMALL = (
    "budget.steps=4",
    "prompts.search=8",
    "prompts.rerank=4",
    "prompts.validation=8",
)

# In the environment of the `finished` search, and to be found nowhere.
SECRETS = {
    name: f"secret{secrets.token_hex(16)}"
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "HF_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "RAY_AUTH_TOKEN",
    )
}


@dataclass(frozen=True)
class Finished:
    """A search that has run: its command, its folder and what it printed, errors apart."""

    command: tuple[str, ...]
    output: Path
    printed: str
    errors: str
    environment: dict[str, str]

    @property
    def folder(self) -> Path:
        return self.output / "shapes_24x40" / "annealing-seed0"


@pytest.fixture(scope="session")
def environment(ray_tmpdir):
    """A child process's environment: Ray in a folder of ours, any warning of ours an error."""
    ours = "crdiff_core", "search"
    warnings = ",".join(f"error:::{name}" for name in ours)
    return {**os.environ, "RAY_TMPDIR": ray_tmpdir, "PYTHONWARNINGS": warnings}


def search(output, environment, *arguments):
    """Run `python -m search.run` from another folder."""
    command = (sys.executable, "-m", "search.run", *SMALL, f"output={output}", *arguments)
    return command, subprocess.run(
        command, cwd="/", env=environment, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory, environment):
    """One real search of the embedded model, small."""
    output = tmp_path_factory.mktemp("runs of ours")  # A path with spaces.
    command, done = search(output, {**environment, **SECRETS})
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(command, output, done.stdout, done.stderr, environment)


@pytest.fixture(scope="module")
def browser():
    """A real Chromium, without a window."""
    # No longer than a module: an event loop runs while it is there, and others need their own.
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    chromium = next(filter(None, found), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    quiet = "background-networking", "component-update", "gpu", "quic", "sync"
    options = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory):
    """The folder for pictures of pages: $CRDIFF_SCREENSHOTS, or one of pytest's."""
    chosen = os.environ.get("CRDIFF_SCREENSHOTS")
    folder = Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
