"""Injects every fault that the tests have, and counts them and what they cost.

python -m tests.benchmarks.faults
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.benchmarks.measuring import RESULTS, machine, write_json

ROOT = Path(__file__).parents[2]
TESTS = "tests/faults"
NOTES = "CRDIFF_FAULTS"


def inject(notes: Path, is_quick: bool) -> bool:
    """Run the tests; returns whether they passed."""
    notes.touch()
    command = [sys.executable, "-m", "pytest", "-n0", "-q", TESTS]
    command += ["-m", "not gpu and not slow" if is_quick else "not gpu"]
    environment = {**os.environ, NOTES: str(notes)}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def counted(notes: Path) -> dict[str, dict[str, int]]:
    """Add up what the tests noted, by fault."""
    found: dict[str, dict[str, int]] = {}
    for line in map(json.loads, notes.read_text().splitlines()):
        counts = found.setdefault(line["fault"], {"injected": 0, "lost": 0})
        counts["injected"] += line["injected"]
        counts["lost"] += line["lost"]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the slow campaigns")
    parser.add_argument(
        "--notes", type=Path, help=f"count what a run of the tests noted in ${NOTES} instead"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "faults.json")
    options = parser.parse_args(arguments)
    passed = None  # What noted them knows.
    if options.notes is not None:
        found = counted(options.notes)
    else:
        with tempfile.TemporaryDirectory() as folder:
            passed = inject(Path(folder) / "notes", options.quick)
            found = counted(Path(folder) / "notes")
    for fault, counts in sorted(found.items()):
        print(f"| {fault} | {counts['injected']} | {counts['lost']} |")
    result = {"machine": machine(torch.device("cpu")), "passed": passed, "faults": found}
    write_json(result, options.output)
    return 0 if passed is not False and not any(counts["lost"] for counts in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
