"""The wheel that `pip install` builds."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_wheel_works_from_any_folder(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    site = tmp_path / "site"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "from search.run import CONF, main; print(CONF); main()",
            "prompts.search=100000",
            f"output={tmp_path}",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )

    # It composed its own conf, found its own weights, and only then refused.
    assert found.stdout.splitlines()[0] == str(site / "search" / "conf")
    assert (site / "search" / "templates" / "report.html").is_file()
    assert "distinct prompts and 100000 search" in found.stderr
