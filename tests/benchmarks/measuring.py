"""A stopwatch, goals, the machine and the results file of a benchmark."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Goal:
    """A figure and the limit that it should keep; a figure of None was not measured."""

    name: str
    figure: float | None
    kind: Literal["at least", "at most"]
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool | None:
        if self.figure is None:
            return None
        return self.figure >= self.limit if self.kind == "at least" else self.figure <= self.limit

    def __str__(self) -> str:
        verdict = {True: "met", False: "MISSED", None: "NOT MEASURED"}[self.met]
        found = "-" if self.figure is None else f"{self.figure:g}"
        return f"{self.name}: {found}{self.unit} (goal: {self.kind} {self.limit:g}) {verdict}"

    def as_json(self) -> dict[str, Any]:
        return {"figure": self.figure, self.kind.replace(" ", "_"): self.limit, "met": self.met}


def goals_as_json(goals: Sequence[Goal]) -> dict[str, Any]:
    return {goal.name: goal.as_json() for goal in goals}


def print_goals(goals: Sequence[Goal], output: Path) -> int:
    """Print each goal and where the results are; return the exit code, 1 if one is missed."""
    for goal in goals:
        print(f"  {goal}")
    missed = any(goal.met is False for goal in goals)
    print(f"goals {'MISSED' if missed else 'met'}; written to {output}")
    return int(missed)


def write_json(result: dict[str, Any], output: Path) -> None:
    """Write the results, so that one never finds half of them."""
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    text = json.dumps(result, indent=2)
    # A list of numbers stays on its line.
    text = re.sub(r"\[\s+([^][{}\"]*?)\s+\]", lambda s: f"[{' '.join(s[1].split())}]", text)
    draft.write_text(text + "\n")
    draft.replace(output)


def finish(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    finish(device)
    start = time.perf_counter()
    action()
    finish(device)
    return time.perf_counter() - start


def processor(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure was measured on."""
    return {
        "device": device.type,
        "processor": processor(device),
        "num_cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
