import os
import shutil
from pathlib import Path

import pytest


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
