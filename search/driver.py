"""The driver: runs a plan on Ray Tune and alone writes ledger, MLflow and results."""

from __future__ import annotations

import json
import logging
import math
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from crdiff_core.errors import CRDiffError
from search.cluster import check_device, connect, num_workers, start_at_once
from search.comparison import Comparison
from search.config import ClusterSettings, Config
from search.deadline import Deadline
from search.evaluation_search import EvaluationSearch
from search.evaluations import Evaluation
from search.export import HISTORY_FILE, validated, write_history, write_ratios
from search.lease import Lease
from search.logs import to_file
from search.plan import EARLIER, Plan, reward_options
from search.progress import Progress
from search.runs import RATIOS_FILE, REPORT_FILE, RUN_FILE, read_record
from search.storage import Storage, StorageError
from search.sync import TrackedSearch
from search.tracking import Status, Tracker
from search.trial import RatioTrial, TrialSetup

log = logging.getLogger(__name__)


class SearchFailedError(CRDiffError):
    """A search ended without a result."""


@dataclass(frozen=True)
class Outcome:
    """What a finished search found.

    ratios_file:  the exported best ratios; report: the page to look at, None if it could not be
                  written.
    winner:       its evaluation on the search prompts; dense: the dense model's.
    comparison:   of the two on the validation prompts; None if that evaluation failed.
    num_reranked: how many of the best were compared again; the winner won there.
    reranked_on:  what they were compared on, such as fresh prompts.
    num_steps:    taken; num_lost: of them those that lost their race.
    num_warm:     evaluations of other searches that this one began with.
    num_drawn:    pictures drawn in this run; 0 when the ledger knew them all.
    off_path:     a better evaluation that annealing passed by, or None.
    ended_by:     the limit that ended the search, if it was not its number of steps.
    is_weight_searched: whether poa_weight was one of the dimensions.
    tracker:      None if tracking is off.
    """

    ratios_file: Storage
    report: Storage | None
    winner: Evaluation
    dense: Evaluation
    comparison: Comparison | None
    num_reranked: int
    reranked_on: str
    num_steps: int
    num_lost: int
    num_warm: int
    num_drawn: int
    off_path: Evaluation | None
    ended_by: str | None
    is_weight_searched: bool
    tracker: Tracker | None


def run(
    config: Config, command: str, progress: Progress, cluster: ClusterSettings | None = None
) -> Outcome:
    """Search, going on from whatever the ledger holds, and write the results.

    command: the command line that starts this search, for the record.
    cluster: where it runs, if not on the config's own: a grid has started one, and shares it out.
    Raises a CRDiffError, in one line, if it cannot run or ends without a result, and
    KeyboardInterrupt after Ctrl-C; what was measured by then is in the ledger.
    """
    plan = Plan.make(config)
    plan.folder.make()
    with Lease(plan.folder) as lease, to_file(plan.folder):
        if plan.ledger.has_grown:  # Another driver has ended meanwhile.
            plan = Plan.make(config)
        while True:
            lease.on_lost = plan.search.fail
            outcome = _run(plan, command, progress, cluster or config.cluster)
            if outcome is not None:
                return outcome
            plan = Plan.make(config)  # With a smaller batch.


def _run(plan: Plan, command: str, progress: Progress, cluster: ClusterSettings) -> Outcome | None:
    """Run a plan to its end; None: it has to begin anew, with the batch size now recorded."""
    search = plan.search
    began_s = time.monotonic()
    tracked = TrackedSearch(plan) if plan.config.tracking.name != "none" else None
    status: Status = "KILLED"
    log.info("search begins", extra={"key": plan.key, "command": command})
    try:
        _begin_folder(plan, command)
        _follow(plan, command, tracked, progress)
        if not search.replay():
            progress.begin(search)
            _record(plan, command)
            _fit(plan, command, cluster)
        try:
            write_history(plan)
            _record(plan, command)
        except StorageError as broken:
            search.fail(str(broken))
        if search.failure is not None:
            status = "FAILED"
            raise SearchFailedError(search.failure)
        if search.smaller_batch is not None:
            return None
        if not search.finished:
            raise KeyboardInterrupt
        ratios_file = write_ratios(plan)
        status = "FINISHED"
        report = _report(plan)
    finally:
        progress.close()
        log.info("search ends: %s", status, extra={"reason": search.failure or search.ended_by})
        if tracked is not None:
            # Nobody waits for MLflow longer than a twentieth of what the search took; a run that
            # drew nothing is there to fill it.
            patience_s = max(5.0, 0.05 * (time.monotonic() - began_s))
            is_replay = search.finished and not search.num_drawn
            tracked.close(status, 60.0 if is_replay else patience_s)
            log.info("MLflow is done with", extra={"error": tracked.tracker.error})
    winner, dense = search.winner, search.of("dense")
    assert winner is not None
    assert dense is not None
    return Outcome(
        ratios_file,
        report,
        winner,
        dense,
        validated(plan),
        num_reranked=sum(evaluation.kind == "rerank" for evaluation in search.evaluations),
        reranked_on=plan.freshness("rerank"),
        num_steps=search.num_steps,
        num_lost=sum(step.lost_race for step in search.steps),
        num_warm=len(search.warm_start),
        num_drawn=search.num_drawn,
        off_path=search.best_off_path,
        ended_by=search.ended_by,
        is_weight_searched=plan.config.space.poa_weight is not None,
        tracker=tracked.tracker if tracked else None,
    )


def _report(plan: Plan) -> Storage | None:
    """Write the report; whatever comes of it, the search has its result."""
    written = plan.folder.files()
    if written.get(REPORT_FILE, 0.0) >= written.get(
        RATIOS_FILE, math.inf
    ):  # The report was written from these ratios.
        return plan.folder / REPORT_FILE
    try:
        # It takes seconds to import what draws charts.
        from search.report import write_report

        return write_report(plan)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log.warning("no report: %s: python -m search.report %s tries again", reason, plan.folder)
        return None


def _begin_folder(plan: Plan, command: str) -> None:
    """Record the settings; keep the results of an earlier search with other settings."""
    folder = plan.folder
    folder.make()
    if folder.read(RUN_FILE) is not None and read_record(folder).get("key") != plan.key:
        kept = folder / EARLIER / f"{datetime.now():%Y%m%d-%H%M%S}"
        kept.make()
        for name in (RUN_FILE, RATIOS_FILE, HISTORY_FILE, REPORT_FILE):
            if name in folder.files():
                folder.move(name, kept)
        log.warning(
            "other settings than before, or a damaged %s: the earlier results are in %s",
            RUN_FILE,
            kept,
        )
    _record(plan, command)


def _record(plan: Plan, command: str) -> None:
    search = plan.search
    best = search.winner or next(iter(search.candidates), None)
    raw = {
        "key": plan.key,
        "command": command,
        "batch_size": search.smaller_batch or search.batch_size,
        # Whether a worker has drawn as many at once; until then auto may come to fewer.
        "is_batch_settled": not search.smaller_batch and search.settled_batch_size is not None,
        "wall_s": plan.search.wall_s,
        "ahead": plan.search.ahead,
        "warm_start": [
            [*candidate.ratios.as_dict().values(), candidate.poa_weight]
            for candidate in plan.search.warm_start
        ],
        # For whoever lists searches, which must not take as long as to replay one.
        "standing": {
            "is_finished": search.finished and search.failure is None,
            "failure": search.failure,
            "num_steps": search.num_steps,
            "num_pictures": plan.ledger.spent.num_pictures,
            "ratios": list(best.ratios.as_dict().values()) if best else None,
            "poa_weight": best.candidate.poa_weight if best else None,
        },
        "config": plan.config.model_dump(mode="json"),
    }
    plan.folder.write(RUN_FILE, (json.dumps(raw, indent=2) + "\n").encode())


# --- Ray Tune --------------------------------------------------------------------------------


def _fit(plan: Plan, command: str, settings: ClusterSettings) -> None:
    """Hand the evaluations' prompt batches to Ray Tune until there are no more, or Ctrl-C."""
    from ray import tune

    with (
        connect(settings) as resources,
        _drained_on_sigterm(plan.search),
        tempfile.TemporaryDirectory() as scratch,
    ):
        device = check_device(resources, settings, plan.model)
        workers = settings.num_workers or num_workers(resources)
        log.info("Ray is there", extra={"workers": workers, "of_each_trial": resources})
        plan.search.max_trials = workers
        if plan.search.ahead is None:
            plan.search.ahead = workers
            _record(plan, command)
        start_at_once(workers)
        setup = TrialSetup(
            model=plan.model,
            revision=plan.recipe.revision,
            resolution=plan.config.res,
            num_steps=plan.recipe.num_steps,
            guidance_scale=plan.recipe.guidance_scale,
            poa_weight=plan.recipe.poa_weight,
            size_conditioning=plan.recipe.told_size,
            negative_prompt=plan.recipe.negative_prompt,
            compile=plan.config.render.compile,
            reward=plan.recipe.reward,
            reward_options=reward_options(plan.config),
            reward_version=plan.recipe.reward_version,
            prompt_sets=plan.prompt_sets,
            device=device,
            num_threads=settings.cpus_per_trial,
        )
        trainable = tune.with_parameters(RatioTrial, setup=pickle.dumps(setup))
        tune.Tuner(
            tune.with_resources(trainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=plan.search,
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                # Ray's own records are never read again: the ledger is the only state.
                storage_path=scratch,
                # The search tries again by itself: Tune counts the death of a worker between two
                # trials twice, and fails the next trial by it. Preempted ones it does try again.
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[_deadline(plan)],
                stop=_stopper(plan.search),
                verbose=0,
            ),
        ).fit()


def _deadline(plan: Plan) -> Deadline:
    trial = plan.config.trial
    limits = {"timeout_s": trial.timeout_s, "load_timeout_s": trial.load_timeout_s}
    given = [f"trial.{name}={value:g}" for name, value in limits.items() if value is not None]
    reason = f"it took too long: see {' and '.join(given)}"
    return Deadline(
        trial.timeout_s,
        lambda trial_id: plan.search.give_up(trial_id, reason),
        math.inf if trial.load_timeout_s is None else trial.load_timeout_s,
    )


def _stopper(search: EvaluationSearch) -> Callable[[str, dict[str, Any]], bool]:
    """Say when to end the trials of workers that are not used, which end by nothing else."""
    return lambda trial_id, result: "is_idle" in result and search.is_ending


@contextmanager
def _drained_on_sigterm(search: EvaluationSearch) -> Iterator[None]:
    """Let a driver that is preempted finish, and write down, what is being drawn."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def drain(*_: object) -> None:
        log.warning("SIGTERM: what is being drawn is finished, then the search stops")
        search.stop()

    # Ray has just set one that exits at once.
    earlier = signal.signal(signal.SIGTERM, drain)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _follow(plan: Plan, command: str, tracked: TrackedSearch | None, progress: Progress) -> None:
    """Show, record and pass on every evaluation from now on, and those there are already."""
    search = plan.search
    was_mixed = False

    def tell(evaluation: Evaluation) -> None:
        nonlocal was_mixed
        progress.evaluation(search)
        _log(evaluation)
        if search.mixed and not was_mixed:
            was_mixed = True
            log.warning("%s", search.mixed)
        if search.num_drawn:
            try:  # The time taken so far, and the batch size once it is settled.
                _record(plan, command)
            except StorageError as broken:
                search.fail(str(broken))
        if tracked is not None:
            tracked.update()

    search.on_evaluation = tell
    if tracked is not None:
        tracked.update()


def _log(evaluation: Evaluation) -> None:
    what = f"{evaluation.kind} {evaluation.ratios}"
    fields = {
        "key": evaluation.key,
        "reward": evaluation.mean if evaluation.is_complete else None,
        "seconds": evaluation.seconds,
        "num_rendered": evaluation.num_rendered,
        "is_stopped": evaluation.is_stopped,
    }
    if evaluation.failure is not None:
        log.warning("%s failed: %s", what, evaluation.failure, extra=fields)
    else:
        log.info("%s", what, extra=fields)
