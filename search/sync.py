"""A search's run in MLflow: filled as it goes, or afterwards by `python -m search.sync`."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crdiff_core.errors import CRDiffError
from crdiff_core.ratios import GROUPS
from search.config import ConfigError
from search.evaluation_search import Step
from search.export import HISTORY_FILE, RATIOS_FILE, load_plan, validated
from search.lease import Lease, LeaseError
from search.plan import RUN_FILE, Plan, read_record, runs_in
from search.storage import Storage, StorageError
from search.tracking import Experiment, Status, Tracker

log = logging.getLogger(__name__)

_SQLITE = "sqlite:///"
_PROGRESS_INTERVAL_S = 10.0


class TrackingError(CRDiffError):
    """MLflow cannot be reached, or refuses us."""


class TrackedSearch:
    """Passes on to MLflow what is new in a search.

    Raises ConfigError if MLflow's database cannot lie where the results do.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._num_told = 0
        self._num_charted = 0
        self.tracker = Tracker(
            _experiment(plan),
            plan.key,
            f"{plan.folder.parent.name} {plan.folder.name}",
            params=_flat(plan.config.model_dump(mode="json")),
            tags={
                "model": plan.model.name,
                "resolution": str(plan.config.res),
                "searcher": plan.config.searcher.name,
                "revision": plan.recipe.revision,
            },
            abandoned=lambda: _abandoned(plan.folder.parent.parent),
        )

    def update(self) -> None:
        """Pass on the evaluations and steps since the last time."""
        evaluations, steps = self._plan.search.evaluations, self._plan.search.steps
        for evaluation in evaluations[self._num_told :]:
            self.tracker.evaluation(evaluation)
            if evaluation.kind == "dense":
                self.tracker.chart(0, evaluation.measured_at, {"dense_reward": evaluation.mean})
        self._num_told = len(evaluations)
        for number in range(self._num_charted + 1, len(steps) + 1):
            at = steps[number - 1].evaluation.measured_at
            self.tracker.chart(number, at, _charts(steps[:number]))
        self._num_charted = len(steps)

    def close(self, status: Status, patience_s: float) -> None:
        """Pass on the results, and wait for MLflow, but no longer than that."""
        self.update()
        plan = self._plan
        comparison, winner = validated(plan), plan.search.winner
        metrics: dict[str, float] = {}
        tags = {"failure": plan.search.failure} if plan.search.failure else {}
        if comparison is not None:
            metrics = {
                "validation_difference": comparison.difference,
                "validation_low": comparison.low,
                "validation_high": comparison.high,
            }
            tags["verdict"] = comparison.verdict
        if winner is not None:
            metrics |= {f"best_ratio_{group}": winner.ratios[group] for group in GROUPS}
        self.tracker.finish(status, metrics, tags, self._files(), patience_s)

    def _files(self) -> dict[str, bytes]:
        try:
            folder = self._plan.folder
            files = {name: folder.read(name) for name in (RUN_FILE, HISTORY_FILE, RATIOS_FILE)}
        except StorageError as broken:  # It has ended the search, and is about to be said.
            log.warning("%s", broken)
            return {}
        return {name: data for name, data in files.items() if data}


def _experiment(plan: Plan) -> Experiment:
    settings = plan.config.tracking
    uri = settings.uri
    if not uri:
        output = plan.folder.parent.parent.local
        if output is None:
            raise ConfigError(
                f"MLflow's database cannot lie in {plan.config.output}: set tracking.uri to a "
                "server's, or tracking=none"
            )
        uri = f"{_SQLITE}{output / 'mlflow.db'}"
    if not uri.startswith(_SQLITE):
        return Experiment(uri, settings.experiment)
    # Beside the database; MLflow would put them wherever the search was started.
    database = Path(uri.removeprefix(_SQLITE)).absolute()
    return Experiment(
        f"{_SQLITE}{database}", settings.experiment, (database.parent / "mlartifacts").as_uri()
    )


def _charts(steps: list[Step]) -> dict[str, float]:
    """Return the parent run's points for the last of these steps."""
    last = steps[-1]
    scored = [step.evaluation.mean for step in steps if not step.lost_race]
    best = max((mean for mean in scored if not math.isnan(mean)), default=math.nan)
    return {
        "reward": math.nan if last.reward is None else last.reward,
        "best_reward": best,
        "temperature": math.nan if last.temperature is None else last.temperature,
    }


def _flat(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _abandoned(output: Storage) -> list[str]:
    """Return the keys of the searches that nobody works on."""
    try:
        return [read_record(run).get("key", "") for run in runs_in(output) if Lease(run).is_free]
    except StorageError as broken:  # They are closed another time.
        log.info("%s", broken)
        return []


def sync(run: Storage) -> str:
    """Fill MLflow from a search's ledger, whatever it has by now; return what came of it.

    Raises a CRDiffError, in one line, if the search or MLflow cannot be reached.
    """
    try:
        with Lease(run):
            plan = load_plan(str(run))
            if plan.config.tracking.name == "none":
                return "made with tracking=none: nothing to do"
            is_finished = plan.search.replay()
            tracked = TrackedSearch(plan)
            tracked.update()
            _wait(tracked.tracker, run)
            status: Status = "FAILED" if plan.search.failure else "KILLED"
            if is_finished and plan.search.winner is not None:
                status = "FINISHED"
            tracked.close(status, patience_s=60.0)
    except LeaseError:
        return "its driver is at work, and fills MLflow by itself"
    if tracked.tracker.error is not None:
        raise TrackingError(
            f"{run}: MLflow was not filled: {tracked.tracker.error}: mend that and run this again"
        )
    return f"{len(plan.search.evaluations)} evaluations, {status}"


def _wait(tracker: Tracker, run: Storage) -> None:
    """Wait while there is progress, and show it."""
    last_line_s = time.monotonic()
    while tracker.num_waiting and tracker.error is None:
        time.sleep(0.1)
        if time.monotonic() - last_line_s > _PROGRESS_INTERVAL_S:
            last_line_s = time.monotonic()
            print(f"{run}: {tracker.num_waiting} entries to go", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill MLflow with what it missed of the searches in a folder, from their ledgers."""
    parser = argparse.ArgumentParser(prog="python -m search.sync", description=main.__doc__)
    parser.add_argument(
        "output", nargs="?", default="runs", help="of searches, or of one (default: runs)"
    )
    code = 0
    try:
        output = Storage.at(parser.parse_args(arguments).output)
        runs = runs_in(output)
        if not runs:
            raise ConfigError(
                f"{output}: no search is there: give a run's folder, or the output of searches"
            )
        for run in runs:
            try:
                print(f"{run}: {sync(run)}", flush=True)
            except CRDiffError as error:  # The others may be in order.
                print(f"error: {error}", file=sys.stderr)
                code = 2
    except CRDiffError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
