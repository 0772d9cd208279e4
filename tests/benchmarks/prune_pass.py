"""Our prune pass against the reference's way and a plain copy, group by group, in fp16.

python -m tests.benchmarks.prune_pass

Every group of SD1.5 and SDXL's mid block, with random weights. Ours: a new ratio for a group whose
buffers and histogram exist, as in every trial but the first; what is done once per load is given
apart. The reference's way: copy the group's weights, concatenate their magnitudes, kthvalue, mask,
multiply. The plain copy: as many bytes from one buffer to another.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crdiff_core.pruning import PrunedGroup, target_layers
from crdiff_core.ratios import GROUPS, Group
from tests.benchmarks.architectures import UNETS, meta_unet
from tests.benchmarks.measuring import (
    RESULTS,
    Goal,
    finish,
    goals_as_json,
    machine,
    print_goals,
    seconds_of,
    write_json,
)
from tests.benchmarks.reference_way import prune_in_place

# All of SDXL would need more memory and time than a small machine has.
MEASURED: Mapping[str, Sequence[Group]] = {"sd15": GROUPS, "sdxl": ("mid",)}
RATIOS = (0.36, 0.43)
MIN_SPEEDUP = 30
MAX_COPIES = 2


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
    """The reference implementation's way, which leaves the dense weights as they are."""
    pruned = [weight.clone() for weight in dense]
    prune_in_place(pruned, ratio)
    return pruned


def measure(
    config: Mapping[str, Any],
    group: Group,
    dtype: torch.dtype,
    device: torch.device,
    num_repeats: int,
    num_fast: int,
) -> dict[str, Any]:
    """Time the three ways in turn and compare their masks.

    config:      of the UNet.
    num_repeats: rounds; in each the reference's way runs once.
    num_fast:    how often the two fast ways run in each round.
    Raises AssertionError if a mask differs.
    """
    unet, replica = meta_unet(config), meta_unet(config)
    reference_dense = materialise(unet, group, dtype, device)
    replica.requires_grad_(False)
    start = time.perf_counter()
    ours = PrunedGroup(unet, replica, group)
    finish(device)
    once_s = time.perf_counter() - start
    copied = torch.empty_like(ours.dense)

    seconds: dict[str, list[float]] = {"ours": [], "reference": [], "copy": []}
    pruned: list[Tensor] = []

    def reference(ratio: float) -> None:
        pruned[:] = reference_prune(reference_dense, ratio)

    # Touches every page once, so that the first round is like the others.
    copied.copy_(ours.dense)
    ours.prune(RATIOS[1])
    for repeat in range(num_repeats):
        for _ in range(num_fast):
            # Each call changes the ratio, so each one writes the whole group.
            ratio = RATIOS[0] if ours.ratio == RATIOS[1] else RATIOS[1]
            seconds["ours"].append(seconds_of(partial(ours.prune, ratio), device))
            seconds["copy"].append(seconds_of(lambda: copied.copy_(ours.dense), device))
        seconds["reference"].append(seconds_of(lambda: reference(ours.ratio), device))
        sizes = [weight.numel() for weight in pruned]
        for mine, theirs in zip(ours.pruned.split(sizes), pruned, strict=True):
            assert torch.equal(mine != 0, theirs.flatten() != 0), "the masks differ"
            assert torch.equal(mine, theirs.flatten()), "the weights differ"
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        print(
            f"round {repeat + 1}/{num_repeats}: masks equal; "
            + ", ".join(f"{way} {1e3 * median:.1f} ms" for way, median in medians.items()),
            flush=True,
        )
    return {
        "num_weights": ours.dense.numel(),
        "masks_equal": True,
        "median_ms": {way: round(1e3 * median, 3) for way, median in medians.items()},
        "ours_once_per_load_ms": round(1e3 * once_s, 1),
        "times_faster_than_reference": round(medians["reference"] / medians["ours"], 1),
        "times_a_plain_copy": round(medians["ours"] / medians["copy"], 2),
    }


def goals_of(entry: dict[str, Any]) -> list[Goal]:
    where = f"{entry['model']} {entry['group']}"
    faster, copies = entry["times_faster_than_reference"], entry["times_a_plain_copy"]
    return [
        Goal(f"{where}, times faster than the reference's way", faster, "at least", MIN_SPEEDUP),
        Goal(f"{where}, plain copies of the same bytes", copies, "at most", MAX_COPIES),
    ]


def main(
    arguments: Sequence[str] | None = None,
    unets: Mapping[str, Mapping[str, Any]] = UNETS,
    measured: Mapping[str, Sequence[Group]] = MEASURED,
) -> int:
    """Measure, print a table, write JSON; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument(
        "--num-fast", type=int, default=5, help="fast calls in a round (default 5)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "prune_pass.json")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), torch.float16
    entries = []
    for model, groups in measured.items():
        for group in groups:
            print(f"{model} {group}, {dtype}, {device}", flush=True)
            with torch.no_grad():
                entry = measure(
                    unets[model], group, dtype, device, options.num_repeats, options.num_fast
                )
            entries.append({"model": model, "group": group, **entry})
    goals = [goal for entry in entries for goal in goals_of(entry)]
    result = {
        "benchmark": "prune_pass",
        "dtype": str(dtype).removeprefix("torch."),
        "ratios": list(RATIOS),
        "num_rounds": options.num_repeats,
        "entries": entries,
        "goals": goals_as_json(goals),
        "machine": machine(device),
    }
    write_json(result, options.output)
    print(f"\n{result['machine']['processor']}, {result['machine']['num_threads']} threads")
    print("  model group  weights       ours  reference       copy  ours, once per load")
    for entry in entries:
        ms = entry["median_ms"]
        print(
            f"  {entry['model']:<5} {entry['group']:<5} {entry['num_weights'] / 1e6:>6.1f} M "
            f"{ms['ours']:>7.2f} ms {ms['reference']:>7.0f} ms {ms['copy']:>7.2f} ms "
            f"{entry['ours_once_per_load_ms']:>17.0f} ms"
        )
    return print_goals(goals, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
