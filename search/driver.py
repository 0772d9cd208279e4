"""The driver: runs a plan on Ray Tune and alone writes ledger, MLflow and results."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from crdiff_core.errors import CRDiffError
from crdiff_core.ratios import GROUPS
from search.config import Config, ConfigError
from search.evaluations import Comparison, Evaluation
from search.export import HISTORY_FILE, RATIOS_FILE, validated, write_history, write_results
from search.plan import RUN_FILE, Plan
from search.progress import Progress
from search.searchers import AnnealingSearch
from search.tracking import Experiment, Tracker
from search.trial import RatioTrial, TrialSetup

log = logging.getLogger(__name__)


class SearchFailedError(CRDiffError):
    """A search ended without a result."""


@dataclass(frozen=True)
class Outcome:
    """What a finished search found.

    ratios_file:  the exported best ratios.
    winner:       its evaluation on the search prompts; dense: the dense model's.
    comparison:   of the two on the validation prompts; None if that evaluation failed.
    num_rendered: pictures drawn in this run; 0 when the ledger knew them all.
    tracker:      None if tracking is off.
    """

    ratios_file: Path
    winner: Evaluation
    dense: Evaluation
    comparison: Comparison | None
    num_rendered: int
    tracker: Tracker | None


def run(config: Config, command: str, progress: Progress) -> Outcome:
    """Search, going on from whatever the ledger holds, and write the results.

    command: the command line that starts this search, for the record.
    Raises a CRDiffError, in one line, if it cannot run or ends without a result, and
    KeyboardInterrupt after Ctrl-C; what was measured by then is in the ledger.
    """
    plan = Plan.make(config)
    search = plan.search
    _begin_folder(plan, command)
    tracker = _tracker(plan)
    status = "KILLED"
    try:
        _follow(plan, tracker, progress)
        if not search.replay():
            progress.begin(search)
            _fit(plan)
        if search.failure is not None:
            status = "FAILED"
            raise SearchFailedError(search.failure)
        if not search.finished:
            raise KeyboardInterrupt
        ratios_file = write_results(plan)
        status = "FINISHED"
    finally:
        progress.close()
        write_history(plan)
        if tracker is not None:
            _finish_tracking(plan, tracker, status)
    winner, dense = search.winner, search.of("dense")
    assert winner is not None
    assert dense is not None
    num_rendered = sum(evaluation.num_rendered for evaluation in search.evaluations)
    return Outcome(ratios_file, winner, dense, validated(plan), num_rendered, tracker)


def _begin_folder(plan: Plan, command: str) -> None:
    """Record the settings; keep the results of an earlier search with other settings."""
    folder = plan.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / RUN_FILE
        if record.exists():
            earlier = json.loads(record.read_text(encoding="utf-8"))
            if earlier.get("key") != plan.key:
                kept = folder / "earlier" / f"{datetime.now():%Y%m%d-%H%M%S}"
                kept.mkdir(parents=True)
                for name in (RUN_FILE, RATIOS_FILE, HISTORY_FILE):
                    if (folder / name).exists():
                        (folder / name).rename(kept / name)
                log.warning("the settings have changed; the earlier results are in %s", kept)
        raw = {
            "key": plan.key,
            "command": command,
            "batch_size": plan.batch_size,
            "config": plan.config.model_dump(mode="json"),
        }
        draft = folder / f".{RUN_FILE}"
        draft.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        draft.replace(record)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: {error}: set output to a folder you may write") from error


# --- Ray Tune --------------------------------------------------------------------------------


def _fit(plan: Plan) -> None:
    """Hand the evaluations' prompt batches to Ray Tune until there are no more, or Ctrl-C."""
    from ray import tune

    with _cluster(plan.config) as resources, tempfile.TemporaryDirectory() as scratch:
        settings = plan.config.cluster
        on_gpu = "gpu" in resources
        setup = TrialSetup(
            model=plan.model,
            revision=plan.recipe.revision,
            resolution=plan.config.res,
            num_steps=plan.recipe.num_steps,
            guidance_scale=plan.recipe.guidance_scale,
            poa_weight=plan.recipe.poa_weight,
            reward=plan.recipe.reward,
            prompt_sets=plan.prompt_sets,
            batch_size=plan.batch_size,
            device="cuda" if on_gpu else "cpu",
            num_threads=settings.cpus_per_trial,
        )
        trainable = tune.with_parameters(RatioTrial, setup=setup)
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
                failure_config=tune.FailureConfig(max_failures=plan.config.trial.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()


@contextmanager
def _cluster(config: Config) -> Iterator[dict[str, float]]:
    """Join or start the Ray cluster; yield what one trial takes of it."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    settings = config.cluster
    with ExitStack() as stack:
        if settings.address == "local":
            stack.enter_context(_private_token())
        else:
            _check_reachable(settings.address)
        try:
            ray.init(
                address=settings.address,
                include_dashboard=False if settings.address == "local" else None,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise _no_cluster(settings.address, error) from error
        stack.callback(ray.shutdown)
        gpus = ray.cluster_resources().get("GPU", 0)
        if settings.device == "cuda" and not gpus:
            raise ConfigError("the cluster has no GPU: set cluster.device=auto or cpu")
        resources = {"cpu": float(settings.cpus_per_trial)}
        if gpus and settings.device != "cpu":
            resources["gpu"] = settings.gpus_per_trial
        yield resources


def _no_cluster(address: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:300]
    if address == "local":
        return ConfigError(f"Ray does not start: {reason}: see /tmp/ray/session_latest/logs")
    return ConfigError(
        f"no Ray cluster at cluster.address={address}: {reason}: start one, or use cluster=local"
    )


def _check_reachable(address: str) -> None:
    """Raise ConfigError at once for what ray.init would report after half a minute of log lines.

    Ray itself aborts the process if a token is asked for and there is none.
    """
    from ray._private.authentication.authentication_token_setup import (
        ensure_token_if_auth_enabled,
        maybe_enable_token_auth_if_token_available,
    )
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RayError

    try:
        head = canonicalize_bootstrap_address(address)
        host, _, port = head.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        if address == "auto":
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        with _silent_stderr():
            GcsClient(address=head)
    except AuthenticationError as error:
        raise ConfigError(
            f"cluster.address={address}: the Ray token is missing or not this cluster's: set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
        ) from error
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise _no_cluster(address, error) from error


@contextmanager
def _private_token() -> Iterator[None]:
    """Close a cluster of our own to everyone else: Ray listens on every network interface.

    Whoever sets RAY_AUTH_MODE decides for themselves.
    """
    if os.environ.get("RAY_AUTH_MODE"):
        yield
        return
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    def use(variables: dict[str, str]) -> None:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            os.environ.pop(name, None)
        os.environ.update(variables)
        # Ray has read both when it was imported.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    earlier = os.environ.get("RAY_AUTH_TOKEN")
    use({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    try:
        yield
    finally:
        use({"RAY_AUTH_TOKEN": earlier} if earlier else {})


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what Ray's C++ side writes; it heeds neither logging nor RAY_BACKEND_LOG_LEVEL."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


# --- what the driver tells others --------------------------------------------------------------


def _tracker(plan: Plan) -> Tracker | None:
    settings = plan.config.tracking
    if settings.name == "none":
        return None
    output = plan.folder.parents[1]
    experiment = Experiment(settings.uri, settings.experiment)
    if not settings.uri:
        experiment = Experiment(
            f"sqlite:///{output / 'mlflow.db'}",
            settings.experiment,
            (output / "mlartifacts").as_uri(),
        )
    name = f"{plan.folder.parent.name} {plan.folder.name}"
    return Tracker(experiment, plan.key, name)


def _follow(plan: Plan, tracker: Tracker | None, progress: Progress) -> None:
    search = plan.search

    def tell(evaluation: Evaluation) -> None:
        progress.evaluation(search)
        if tracker is not None:
            tracker.evaluation(evaluation, _charts(plan, evaluation))

    search.on_evaluation = tell
    if tracker is not None:
        tracker.start(
            params=_flat(plan.config.model_dump(mode="json")),
            tags={
                "model": plan.model.name,
                "resolution": str(plan.config.res),
                "searcher": plan.config.searcher.name,
                "revision": plan.recipe.revision,
            },
        )
    for evaluation in search.evaluations:
        tell(evaluation)


def _charts(plan: Plan, evaluation: Evaluation) -> dict[str, float]:
    """Return the parent run's points for one evaluation."""
    if evaluation.kind == "dense":
        return {"dense_reward": evaluation.mean}
    if evaluation.kind != "search":
        return {}
    scored = [
        e.mean
        for e in plan.search.evaluations
        if e.kind == "search" and e.failure is None and e.index <= evaluation.index
    ]
    points = {"reward": evaluation.mean, "best_reward": max(scored, default=math.nan)}
    if isinstance(plan.searcher, AnnealingSearch):
        points["temperature"] = plan.searcher.state.temperature
    return points


def _finish_tracking(plan: Plan, tracker: Tracker, status: str) -> None:
    comparison = validated(plan)
    metrics: dict[str, float] = {}
    tags = {}
    if comparison is not None:
        metrics = {
            "validation_difference": comparison.difference,
            "validation_low": comparison.low,
            "validation_high": comparison.high,
        }
        tags = {"verdict": comparison.verdict}
    winner = plan.search.winner
    if winner is not None:
        metrics |= {f"best_ratio_{group}": winner.ratios[group] for group in GROUPS}
    names = (RUN_FILE, HISTORY_FILE, RATIOS_FILE)
    files = [plan.folder / name for name in names if (plan.folder / name).exists()]
    tracker.finish(status, metrics, tags, *files)


def _flat(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
