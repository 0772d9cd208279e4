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
TESTS = "tests/integration/faults"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the slow campaigns")
    parser.add_argument("--output", type=Path, default=RESULTS / "faults.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        notes.touch()
        command = [sys.executable, "-m", "pytest", "-n0", "-q", TESTS]
        command += ["-m", "not gpu and not slow" if options.quick else "not gpu"]
        done = subprocess.run(
            command, env={**os.environ, "CRDIFF_FAULTS": str(notes)}, check=False
        )
        found: dict[str, dict[str, int]] = {}
        for line in map(json.loads, notes.read_text().splitlines()):
            counts = found.setdefault(line["fault"], {"injected": 0, "lost": 0})
            counts["injected"] += line["injected"]
            counts["lost"] += line["lost"]
    for fault, counts in sorted(found.items()):
        print(f"| {fault} | {counts['injected']} | {counts['lost']} |")
    passed = done.returncode == 0
    result = {"machine": machine(torch.device("cpu")), "passed": passed, "faults": found}
    write_json(result, options.output)
    return 0 if passed and not any(counts["lost"] for counts in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
