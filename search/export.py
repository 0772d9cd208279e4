"""Write a finished search's results from the ledger: `python -m search.export RUN_FOLDER`."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crdiff_core.errors import CRDiffError
from crdiff_core.models import Model
from crdiff_core.prompts import Prompt
from crdiff_core.ratios import GROUPS, BlockRatios, RatiosFile
from search.comparison import Comparison, compare
from search.config import Config, ConfigError
from search.evaluations import Evaluation
from search.plan import EARLIER, Plan, folder_of
from search.runs import RATIOS_FILE, RUN_FILE, read_record
from search.storage import Storage

HISTORY_FILE = "history.parquet"
PACKAGES = ("crdiff-search", "torch", "diffusers", "transformers", "ray", "optuna")


def validated(plan: Plan) -> Comparison | None:
    """Compare the winner with the dense model on the validation prompts; None if that failed."""
    winner, dense = plan.search.of("validation"), plan.search.of("dense validation")
    if winner is None or dense is None or winner.failure or dense.failure:
        return None
    chosen_by = [each for name, each in plan.prompt_sets.items() if name != "validation"]
    return compare(
        winner.rewards,
        dense.rewards,
        winner.prompts.texts,
        searched={text for prompts in chosen_by for text in prompts.texts},
        num_earlier=_num_earlier(plan, winner),
    )


def _num_earlier(plan: Plan, winner: Evaluation) -> int:
    """Count other ratios that the ledger has on all of these prompts since before the winner.

    They are earlier winners, of this search with fewer steps or of others of its cell. Theirs are
    also the pictures of the pruned model alone; the dense model's are nobody's.
    """
    first = min(_measured_at(plan, winner.key, winner.prompts.prompts), default=math.inf)
    earlier: set[BlockRatios] = set()
    for key, candidate in plan.ledger.candidates.items():
        if candidate.ratios.is_dense or candidate.ratios in earlier | {winner.ratios}:
            continue
        measured_at = _measured_at(plan, key, winner.prompts.prompts)
        if len(measured_at) == len(winner.prompts) and max(measured_at) <= first:
            earlier.add(candidate.ratios)
    return len(earlier)


def _measured_at(plan: Plan, key: str, prompts: Sequence[Prompt]) -> list[float]:
    """Return when each prompt was measured under a key, up to the first that was not."""
    found = []
    for prompt in prompts:
        entry = plan.ledger.get(key, prompt)
        if entry is None or entry.reward is None:
            break
        found.append(entry.measured_at)
    return found


def write_ratios(plan: Plan) -> Storage:
    """Write best_ratios.json of a finished search; return its place.

    Raises ConfigError, or StorageError if it cannot be written.
    """
    winner = plan.search.winner
    if winner is None:
        raise ConfigError(
            f"{plan.folder}: this search is not finished: run it again, it goes on where it was"
        )
    found = RatiosFile(
        model=plan.model.name,
        resolution=plan.config.res,
        score=winner.mean,
        ratios=winner.ratios,
        poa_weight=winner.candidate.poa_weight,
        provenance=_provenance(plan, winner),
    )
    data = found.as_json().encode()
    if plan.folder.read(RATIOS_FILE) != data:  # Else it stays as old as it is.
        plan.folder.write(RATIOS_FILE, data)
    return plan.folder / RATIOS_FILE


def _provenance(plan: Plan, winner: Evaluation) -> dict[str, Any]:
    comparison = validated(plan)
    searched = {step.evaluation.key: step.evaluation for step in plan.search.steps}
    use = plan.search.use
    reranked = next(
        (
            each
            for each in plan.search.evaluations
            if each.kind == "rerank" and each.candidate == winner.candidate
        ),
        None,
    )
    dense = plan.search.of("dense")
    return {
        "ledger_key": winner.key,
        "recipe": asdict(plan.recipe) | {"batch_size": plan.search.batch_size},
        "source": source_of(plan.model),
        "num_prunable": plan.model.num_prunable(),
        "sparsity": dict(winner.sparsity),
        # What decided the course of the search: the same for any number of workers.
        "searcher": plan.config.searcher.model_dump(mode="json"),
        "space": plan.config.space.model_dump(mode="json"),
        "racing": plan.config.racing.model_dump(mode="json"),
        "seed": plan.config.seed,
        "prompts": {
            name: {"digest": prompts.digest, "num_prompts": len(prompts)}
            for name, prompts in plan.prompt_sets.items()
        },
        "num_steps": plan.search.num_steps,
        "num_evaluations": len(searched),
        "num_failed": sum(e.failure is not None for e in searched.values()),
        "dense_score": dense.mean if dense else None,
        "rerank_score": reranked.mean if reranked and not reranked.failure else None,
        "validation": comparison.as_dict() if comparison else None,
        # What it took, which depends on the workers.
        "use": {name: round(value, 6) for name, value in asdict(use).items()},
        "versions": {package: version(package) for package in PACKAGES},
    }


def source_of(model: Model) -> dict[str, str]:
    """Say where the model came from, without the paths of this machine."""
    hub = {"hub_id": model.hub_id, "hub_revision": model.hub_revision}
    if not model.path:
        return hub
    of_hub = hub if model.checkpoint else {}  # A checkpoint's configuration is the hub's.
    return {**of_hub, "file": Path(model.path).name}


def write_history(plan: Plan) -> None:
    """Write the search so far: the steps in their order, then what annealing passed by.

    The dense model comes first, re-ranking and validation last; they have no step. A reward of a
    step that lost its race is null, and num_prompts says how far it got.
    """
    search = plan.search
    taken = {step.evaluation.key for step in search.steps}
    others = [e for e in search.evaluations if e.kind != "search"]
    rows = [_row(e) for e in others if e.kind == "dense"]
    for number, step in enumerate(search.steps, 1):
        row = _row(step.evaluation)
        if step.lost_race:  # Other workers may have drawn the rest of its prompts meanwhile.
            row |= {"reward": None, "standard_error": None}
        rows.append(
            row
            | {
                "step": number,
                "chain": step.chain,
                "event": step.event,
                "temperature": step.temperature,
                "lost_race": step.lost_race,
            }
        )
    rows += [_row(e) for e in search.known_evaluations if e.key not in taken]
    rows += [_row(e) for e in others if e.kind != "dense"]
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_HISTORY), data)
    plan.folder.write(HISTORY_FILE, data.getvalue())


_HISTORY = pa.schema(
    [
        ("step", pa.int32()),
        ("kind", pa.string()),
        *((group, pa.float64()) for group in GROUPS),
        ("poa_weight", pa.float64()),
        ("reward", pa.float64()),
        ("standard_error", pa.float64()),
        ("num_prompts", pa.int32()),
        ("seconds", pa.float64()),
        ("failure", pa.string()),
        ("chain", pa.int32()),
        ("event", pa.string()),
        ("temperature", pa.float64()),
        ("lost_race", pa.bool_()),
        ("ledger_key", pa.string()),
    ]
)


def _row(evaluation: Evaluation) -> dict[str, Any]:
    mean, error = evaluation.mean, evaluation.standard_error
    return {
        "kind": evaluation.kind,
        **{str(group): evaluation.ratios[group] for group in GROUPS},
        "poa_weight": evaluation.candidate.poa_weight,
        "reward": None if math.isnan(mean) else mean,
        "standard_error": None if math.isnan(error) else error,
        "num_prompts": len(evaluation.rewards),
        "seconds": evaluation.seconds,
        "failure": evaluation.failure,
        "ledger_key": evaluation.key,
    }


def load_plan(place: str | Path) -> Plan:
    """Make the plan of an earlier run again, from the settings in its folder."""
    folder = Storage.at(place)
    record = read_record(folder)
    try:
        raw, key = dict(record["config"]), record["key"]
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{folder} is not the folder of a run (no readable {RUN_FILE}): give one, such as "
            "runs/shapes_24x40/annealing-seed0"
        ) from error
    if folder.local is not None:  # The names of the folders it lies in count, and .. is none.
        folder = Storage.at(os.path.abspath(folder.local))
    if folder.parent.name == EARLIER:
        raise ConfigError(
            f"{folder} holds the results of earlier settings, not a run of its own: run the "
            f"command in its {RUN_FILE} again, the ledger has its rewards"
        )
    # The folder may have been moved: its own place counts, not the one it was made at.
    raw["output"] = str(folder.parent.parent)
    if isinstance(raw.get("trial"), dict):  # What failed then is not to be evaluated again now.
        raw["trial"] = {**raw["trial"], "retry_failed": False}
    config = Config.parse(raw)
    named = folder_of(config)
    if named.path != folder.path:  # Its ledger and its results would be looked for there.
        raise ConfigError(
            f"{folder} was renamed: call it {named.parent.name}/{named.name} again, as its "
            "settings do, or give its own path if this is a link"
        )
    plan = Plan.make(config)
    if plan.key != key:
        raise ConfigError(
            f"{folder} was made with another model, reward or prompts than these settings give "
            "today: use the version and files that made it, or run the search again"
        )
    return plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Export the best ratios of a finished run again, from the ledger."""
    parser = argparse.ArgumentParser(prog="python -m search.export", description=main.__doc__)
    parser.add_argument("run", help="folder, such as runs/shapes_24x40/annealing-seed0")
    try:
        plan = load_plan(parser.parse_args(arguments).run)
        plan.search.replay()
        write_history(plan)
        print(write_ratios(plan))
    except CRDiffError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
