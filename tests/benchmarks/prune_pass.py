"""Our prune pass against the reference's way and a plain copy, on SD1.5's up group in fp16.

python -m tests.benchmarks.prune_pass
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from crdiff_core.pruning import PrunedGroup, target_layers
from crdiff_core.ratios import Group

RESULTS = Path(__file__).parent / "results"
GROUP: Group = "up"
RATIOS = (0.36, 0.43)
MIN_SPEEDUP = 30
MAX_COPIES = 2


def sd15_unet() -> UNet2DConditionModel:
    """SD1.5's UNet without memory for its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


def materialise(
    unet: nn.Module, group: Group, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Give the layers that one group prunes normal random weights; return copies of them."""
    generator = torch.Generator(device).manual_seed(0)
    weights = []
    for layer in target_layers(unet, group):
        shape = layer.weight.shape
        scale = shape[1] ** -0.5
        weight = torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        weights.append(weight.clone())
    return weights


def reference_prune(dense: Sequence[Tensor], ratio: float) -> list[Tensor]:
    """The reference implementation's way: copy, concatenate, kthvalue, mask, multiply."""
    pruned = [weight.clone() for weight in dense]
    magnitudes = torch.cat([weight.abs().flatten() for weight in pruned])
    threshold = magnitudes.kthvalue(int(ratio * magnitudes.numel())).values
    for weight in pruned:
        mask = weight.abs() > threshold
        weight.mul_(mask)
    return pruned


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    _finish(device)
    start = time.perf_counter()
    action()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def measure(
    unet: nn.Module, dtype: torch.dtype, device: torch.device, num_repeats: int, num_fast: int
) -> dict[str, Any]:
    """Time the three ways in turn and compare their masks.

    num_repeats: rounds; in each the reference's way runs once.
    num_fast:    how often the two fast ways run in each round.
    Raises AssertionError if a mask differs.
    """
    reference_dense = materialise(unet, GROUP, dtype, device)
    replica = UNet2DConditionModel.from_config(unet.config).to("meta")
    replica.requires_grad_(False)
    start = time.perf_counter()
    group = PrunedGroup(unet, replica, GROUP)
    _finish(device)
    once_s = time.perf_counter() - start
    copied = torch.empty_like(group.dense)
    num_weights = group.dense.numel()
    print(f"{num_weights / 1e6:.1f} M weights, {dtype}, {device}", flush=True)

    seconds: dict[str, list[float]] = {"ours": [], "reference": [], "copy": []}
    pruned: list[Tensor] = []

    def reference(ratio: float) -> None:
        pruned[:] = reference_prune(reference_dense, ratio)

    # Touches every page once, so that the first round is like the others.
    copied.copy_(group.dense)
    group.prune(RATIOS[1])
    for repeat in range(num_repeats):
        for _ in range(num_fast):
            # Each call changes the ratio, so each one writes the whole group.
            ratio = RATIOS[0] if group.ratio == RATIOS[1] else RATIOS[1]
            seconds["ours"].append(seconds_of(partial(group.prune, ratio), device))
            seconds["copy"].append(seconds_of(lambda: copied.copy_(group.dense), device))
        seconds["reference"].append(seconds_of(lambda: reference(group.ratio), device))
        ours = group.pruned.split([weight.numel() for weight in pruned])
        for mine, theirs in zip(ours, pruned, strict=True):
            assert torch.equal(mine != 0, theirs.flatten() != 0), "the masks differ"
            assert torch.equal(mine, theirs.flatten()), "the weights differ"
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        print(
            f"round {repeat + 1}/{num_repeats}: masks equal; "
            + ", ".join(f"{way} {1e3 * median:.1f} ms" for way, median in medians.items()),
            flush=True,
        )
    return {
        "benchmark": "prune_pass",
        "num_weights": num_weights,
        "dtype": str(dtype).removeprefix("torch."),
        "ratios": list(RATIOS),
        "num_rounds": num_repeats,
        "masks_equal": True,
        "median_ms": {way: round(1e3 * median, 3) for way, median in medians.items()},
        "ours_once_per_load_ms": round(1e3 * once_s, 1),
        "times_faster_than_reference": round(medians["reference"] / medians["ours"], 1),
        "times_a_plain_copy": round(medians["ours"] / medians["copy"], 2),
        "targets": {
            "times_faster_than_reference": MIN_SPEEDUP,
            "times_a_plain_copy": MAX_COPIES,
        },
        "machine": machine(device),
    }


def main(arguments: Sequence[str] | None = None, unet: nn.Module | None = None) -> int:
    """Measure, print a table, write JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument(
        "--num-fast", type=int, default=5, help="fast calls in a round (default 5)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "prune_pass.json")
    options = parser.parse_args(arguments)
    with torch.no_grad():
        result = measure(
            sd15_unet() if unet is None else unet,
            torch.float16,
            torch.device(options.device),
            options.num_repeats,
            options.num_fast,
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    faster, copies = result["times_faster_than_reference"], result["times_a_plain_copy"]
    print(f"\n{result['machine']['processor']}, {result['machine']['num_threads']} threads")
    for way, median in result["median_ms"].items():
        print(f"  {way:<10} {median:>10.2f} ms")
    print(f"  ours, once per load (buffers, histogram) {result['ours_once_per_load_ms']:.0f} ms")
    print(f"  ours is {faster:.1f} times faster than the reference's way (target {MIN_SPEEDUP})")
    print(f"  and takes {copies:.2f} plain copies of the same bytes (target {MAX_COPIES} at most)")
    met = faster >= MIN_SPEEDUP and copies <= MAX_COPIES
    print(f"targets {'met' if met else 'MISSED'}; written to {options.output}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
