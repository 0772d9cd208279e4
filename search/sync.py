"""A search's run in MLflow: filled as it goes, or afterwards by `python -m search.sync`."""

from __future__ import annotations

import argparse
import getpass
import io
import logging
import math
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from crdiff_core import sheet
from crdiff_core.errors import CRDiffError
from crdiff_core.prompts import Prompt
from crdiff_core.ratios import GROUPS
from crdiff_core.sheet import Row, legible_zoom
from search.comparison import standard_error
from search.config import ConfigError
from search.evaluation_search import Step
from search.evaluations import Evaluation, Kind
from search.export import HISTORY_FILE, load_plan, validated
from search.lease import Lease, LeaseError
from search.pictures import Pictures
from search.plan import Plan
from search.runs import RATIOS_FILE, REPORT_FILE, RUN_FILE, read_record, runs_in
from search.storage import Storage, StorageError
from search.tracking import Experiment, Status, Tracker

log = logging.getLogger(__name__)

LEDGER_FILE = "ledger.parquet"

# The dense model's evaluation on the same prompts. Those of "pruned alone" and "resized" were
# chosen by their gains: a mean over them says nothing.
_BASELINES: dict[Kind, Kind] = {"search": "dense", "validation": "dense validation"}
# Pixels that a picture's longer side has at most, in a sheet.
_LARGEST = 512
_GIT_TIMEOUT_S = 5.0
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
        self._uncompared: list[Evaluation] = []
        # The dense model's, of every prompt that it was evaluated on.
        self._dense: dict[Prompt, float] = {}
        self._charts = Charts()
        self._pictures: Pictures | None = None
        if plan.config.report.pictures > 0:  # Of our own: MLflow's thread alone reads it.
            self._pictures = Pictures(plan.folder.parent / "pictures")
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
                **_source(),
            },
            abandoned=lambda: _abandoned(plan.folder.parent.parent),
        )

    def update(self) -> None:
        """Pass on the evaluations and steps since the last time."""
        search = self._plan.search
        new = search.evaluations[self._num_told :]
        self._num_told += len(new)
        for evaluation in new:
            if evaluation.kind in _BASELINES.values() and evaluation.is_complete:
                rewards = zip(evaluation.prompts.prompts, evaluation.rewards, strict=True)
                self._dense |= dict(rewards)
        waiting, self._uncompared = [*self._uncompared, *new], []
        for evaluation in waiting:
            baseline = _BASELINES.get(evaluation.kind)
            if baseline is None or search.of(baseline) is not None:
                self.tracker.evaluation(evaluation, self._difference(evaluation))
            else:
                self._uncompared.append(evaluation)
        dense = search.of("dense")
        if dense is not None:
            self._chart(dense)

    def _difference(self, evaluation: Evaluation) -> dict[str, float]:
        """Compare an evaluation with its baseline, if both are complete."""
        prompts = evaluation.prompts.prompts
        is_comparable = evaluation.is_complete and evaluation.kind in _BASELINES
        if not is_comparable or any(prompt not in self._dense for prompt in prompts):
            return {}
        gains = [
            reward - self._dense[prompt]
            for prompt, reward in zip(prompts, evaluation.rewards, strict=True)
        ]
        found = {"difference_to_dense": statistics.fmean(gains)}
        error = standard_error(gains, evaluation.prompts.texts)
        if not math.isnan(error):
            found["difference_to_dense_standard_error"] = error
        return found

    def _chart(self, dense: Evaluation) -> None:
        """Pass on the points of new steps, and a picture of each new best one."""
        charts, search = self._charts, self._plan.search
        if charts.num_steps == 0:
            self.tracker.chart(0, dense.measured_at, {"dense_reward": dense.mean})
            self.tracker.picture(0, partial(self._sheet, dense, dense))
        num_chains = getattr(self._plan.config.searcher, "chains", 1)
        for step in search.steps[charts.num_steps :]:
            # A chain that is ahead waits for the others: its steps' numbers depend on theirs.
            is_in_turn = (step.number - 1, step.chain) == divmod(charts.num_steps, num_chains)
            if not (is_in_turn or search.finished):
                return
            earlier = charts.best
            points = charts.take(step) | {"dense_reward": dense.mean}
            self.tracker.chart(charts.num_steps, step.evaluation.measured_at, points)
            if charts.best != earlier:
                self.tracker.picture(
                    charts.num_steps, partial(self._sheet, dense, step.evaluation)
                )

    def _sheet(self, dense: Evaluation, best: Evaluation) -> Image.Image | None:
        """Draw the pictures that are kept of both, one prompt a column; None: there are none."""
        if self._pictures is None:
            return None
        rows = [("dense", dense)]
        if best is not dense:
            rows.append((f"best so far, {best.ratios} (down / mid / up)", best))
        prompts = dense.prompts.prompts
        try:
            found = [self._pictures.get(evaluation.key, prompts) for _, evaluation in rows]
            pictures = [[data and _opened(data) for data in row] for row in found]
        except (StorageError, OSError) as broken:  # Pillow's errors are OSErrors, too.
            log.warning("MLflow gets no picture of %s: %s", best.ratios, broken)
            return None
        both = [number for number, column in enumerate(zip(*pictures, strict=True)) if all(column)]
        if not both:
            return None
        first = pictures[0][both[0]]
        assert first
        return sheet.arrange(
            [
                Row(
                    f"{name}: mean reward {evaluation.mean:.3f} on {len(prompts)} prompts",
                    [picture for number in both if (picture := row[number])],
                    [f"reward {evaluation.rewards[number]:.3f}" for number in both],
                )
                for (name, evaluation), row in zip(rows, pictures, strict=True)
            ],
            legible_zoom(first.height, first.width),
            [prompts[number].text for number in both],
        )

    def close(self, status: Status, patience_s: float) -> None:
        """Pass on the results, and wait for MLflow, but no longer than that."""
        self.update()
        plan = self._plan
        comparison, winner = validated(plan), plan.search.winner
        metrics: dict[str, float] = {}  # Named so that MLflow charts them apart from the steps.
        tags = {"mlflow.note.content": _summary(plan)}
        if plan.search.failure:
            tags["failure"] = plan.search.failure
        if comparison is not None:
            metrics = {"result/difference": comparison.difference}
            if comparison.low is not None and comparison.high is not None:
                metrics |= {"result/low": comparison.low, "result/high": comparison.high}
            tags["verdict"] = comparison.verdict
        if winner is not None:
            metrics |= {f"result/ratio_{group}": winner.ratios[group] for group in GROUPS}
        self.tracker.finish(status, metrics, tags, self._files, patience_s)

    def _files(self) -> dict[str, bytes]:
        folder = self._plan.folder
        names = RUN_FILE, HISTORY_FILE, RATIOS_FILE, REPORT_FILE
        try:
            files = {name: data for name in names if (data := folder.read(name))}
            files[LEDGER_FILE] = _ledger_extract(self._plan)
        except StorageError as broken:  # It has ended the search, and is about to be said.
            log.warning("%s", broken)
            return {}
        return files


class Charts:
    """The parent run's charts, point by point: of the steps alone, so that a replay agrees."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.best = -math.inf
        self._num: Counter[str | None] = Counter()

    def take(self, step: Step) -> dict[str, float]:
        """Return the points of the next step."""
        evaluation = step.evaluation
        self.num_steps += 1
        self._num[step.event] += 1
        self._num["failed"] += evaluation.failure is not None
        if not step.lost_race and evaluation.mean > self.best:
            self.best = evaluation.mean
        num_decided = self._num["accept"] + self._num["reject"]
        num_drawn, seconds = len(evaluation.rewards), evaluation.seconds
        return {
            "reward": math.nan if step.reward is None else step.reward,
            "best_reward": self.best,
            "temperature": math.nan if step.temperature is None else step.temperature,
            "acceptance_rate": self._num["accept"] / num_decided if num_decided else math.nan,
            "num_failed": self._num["failed"],
            # Of one worker.
            "pictures_per_second": num_drawn / seconds if seconds and num_drawn else math.nan,
        }


def _opened(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        picture.thumbnail((_LARGEST, _LARGEST))
        return picture.convert("RGB")


def _ledger_extract(plan: Plan) -> bytes:
    """Return the ledger's rows of this search, each prompt of an evaluation once, as Parquet."""
    ours = {
        (evaluation.key, prompt.text, prompt.seed)
        for evaluation in plan.search.evaluations
        for prompt in evaluation.prompts.prompts
    }
    table = plan.ledger.table()
    columns = (table[name].to_pylist() for name in ("key", "prompt", "seed", "reward"))
    rows: dict[tuple[str, str, int], int] = {}
    has_failed: set[tuple[str, str, int]] = set()
    for number, (*key, reward) in enumerate(zip(*columns, strict=True)):
        name = (key[0], key[1], key[2])
        # The first counts, as in the ledger, but a failure only until there is a reward.
        if name in ours and (name not in rows or (name in has_failed and reward is not None)):
            rows[name] = number
            (has_failed.add if reward is None else has_failed.discard)(name)
    data = io.BytesIO()
    pq.write_table(table.take(pa.array(rows.values(), pa.int64())), data)
    return data.getvalue()


def _source() -> dict[str, str]:
    """Say what code runs, in MLflow's own tags, as far as it is known."""
    tags = {
        "version": version("crdiff-search"),
        "mlflow.source.name": "search.run",
        "mlflow.source.type": "LOCAL",
    }
    with suppress(KeyError, OSError, ImportError):
        tags["mlflow.user"] = getpass.getuser()
    checkout = Path(__file__).resolve().parents[1]
    with suppress(OSError, subprocess.SubprocessError):
        top, commit = _git(checkout, "rev-parse", "--show-toplevel", "HEAD").split("\n")
        if Path(top).resolve() == checkout:  # Not a repository that this package is installed in.
            tags["mlflow.source.git.commit"] = commit
            changes = _git(checkout, "status", "--porcelain", "--untracked-files=no")
            tags["mlflow.source.git.dirty"] = str(bool(changes)).lower()
    return tags


def _git(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), *arguments],
        capture_output=True,
        text=True,
        timeout=_GIT_TIMEOUT_S,
        check=True,
    )
    return done.stdout.strip()


def _summary(plan: Plan) -> str:
    """Return what MLflow shows on top of the run's page, in Markdown."""
    search = plan.search
    comparison, winner = validated(plan), search.winner
    if search.failure:
        return f"**failed**\n\n```\n{search.failure.replace('`', chr(39))}\n```"
    if comparison is None or winner is None:
        num_done, num_all = search.progress
        return f"{num_done} of {num_all} evaluations; the same command goes on from there."
    command = ["python", "-m", "crdiff_core.generate", "--ratios", RATIOS_FILE]
    command += ["--model", plan.config.model.path] if plan.config.model.path else []
    return "\n\n".join(
        [
            f"**Against dense: {comparison.verdict}.** "
            + _plain(f"{comparison.summary}. {comparison.note}".strip()),
            f"Best ratios **{winner.ratios}** (down / mid / up), poa_weight "
            f"{winner.candidate.poa_weight:g}. To draw with them, take {RATIOS_FILE} from the "
            "artifacts:",
            f"```\n{shlex.join(command)} --prompt TEXT\n```",
        ]
    )


def _plain(text: str) -> str:
    """Return a text for Markdown in which nothing of it is markup."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~&])", r"\\\1", text)


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
