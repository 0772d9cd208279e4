"""MLflow, filled from complete evaluations; a search never waits for it and never fails by it."""

from __future__ import annotations

import logging
import math
import os
import queue
import shlex
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crdiff_core.ratios import GROUPS
from search.evaluations import Evaluation

log = logging.getLogger(__name__)

# Tags by which a later run of the same search finds what is there already.
RUN_TAG = "crdiff.run"
EVALUATION_TAG = "crdiff.evaluation"

Status = str  # FINISHED, FAILED or KILLED, as MLflow has them.


@dataclass(frozen=True)
class Experiment:
    """Where runs go: the tracking URI, the experiment, and a folder for its artifacts or ''."""

    uri: str
    name: str
    artifacts: str = ""


class Tracker:
    """One MLflow parent run for a search, with a child run for each evaluation.

    Everything is written by one background thread. Writing the same search again adds only what
    is missing, so a replay from the ledger fills in whatever MLflow missed. If MLflow cannot be
    reached, `error` says why, and the search goes on.
    """

    def __init__(self, experiment: Experiment, run_key: str, name: str) -> None:
        self.error: str | None = None
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._experiment = experiment
        self._run_key = run_key
        self._name = name
        self._known: set[str] = set()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Open the parent run, or the one this search had before."""
        self._jobs.put(lambda: self._open(params, tags))
        self._thread.start()

    def evaluation(self, evaluation: Evaluation) -> None:
        """Add an evaluation's child run."""
        self._jobs.put(lambda: self._add(evaluation))

    def chart(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to each of the parent's charts."""
        self._jobs.put(lambda: self._chart(step, metrics))

    def finish(
        self,
        status: Status,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        files: Mapping[str, bytes],
    ) -> None:
        """Close the parent run, with its last metrics and files, and wait for the thread."""
        self._jobs.put(lambda: self._close(status, metrics, tags, files))
        self._jobs.put(None)
        self._thread.join(timeout=60)
        if self._thread.is_alive():
            self.error = "it did not answer within a minute"

    @property
    def dashboard_command(self) -> str:
        """The shell command, or the address, that opens the dashboard."""
        uri = self._experiment.uri
        if uri.startswith("sqlite:"):
            return shlex.join(["mlflow", "ui", "--backend-store-uri", uri, "--port", "5000"])
        return uri

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self.error is not None:
                continue
            try:
                job()
            except Exception as error:  # Whatever MLflow raises, the search must not notice.
                self.error = " ".join(str(error).split())[:300]
                log.warning("MLflow: %s", self.error)

    def _open(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        # At MLflow's defaults a server that is down is asked again for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        _make_database(self._experiment.uri)
        self._client = MlflowClient(self._experiment.uri)
        found = self._client.get_experiment_by_name(self._experiment.name)
        self.experiment_id = (
            found.experiment_id
            if found
            else self._client.create_experiment(
                self._experiment.name, artifact_location=self._experiment.artifacts or None
            )
        )
        runs = self._client.search_runs(
            [self.experiment_id], f"tags.`{RUN_TAG}` = '{self._run_key}'", max_results=1
        )
        run = (
            runs[0]
            if runs
            else self._client.create_run(
                self.experiment_id, run_name=self._name, tags={**tags, RUN_TAG: self._run_key}
            )
        )
        self.run_id = run.info.run_id
        self._client.update_run(self.run_id, status="RUNNING")
        self._client.log_batch(
            self.run_id,
            params=[
                # One that is there could not be changed.
                Param(key, str(value))
                for key, value in params.items()
                if key not in run.data.params
            ],
        )
        self._known = self._children()

    def _children(self) -> set[str]:
        known: set[str] = set()
        token = None
        while True:
            page = self._client.search_runs(
                [self.experiment_id],
                f"tags.`mlflow.parentRunId` = '{self.run_id}'",
                max_results=1000,
                page_token=token,
            )
            for run in page:
                if run.info.status == "RUNNING":  # Its driver was killed as it wrote it.
                    self._client.delete_run(run.info.run_id)
                else:
                    known.add(run.data.tags.get(EVALUATION_TAG, ""))
            token = page.token
            if not token:
                return known

    def _chart(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self.run_id,
            metrics=[Metric(k, v, now, step) for k, v in metrics.items() if math.isfinite(v)],
        )

    def _add(self, evaluation: Evaluation) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        name = f"{evaluation.kind}:{evaluation.key}:{evaluation.prompts.digest}"
        name += f":{len(evaluation.rewards)} drawn" if evaluation.is_stopped else ""
        if name in self._known:
            return
        self._known.add(name)
        values = {
            "reward": evaluation.mean,
            "reward_standard_error": evaluation.standard_error,
            "seconds": evaluation.seconds,
            **{f"sparsity_{group}": value for group, value in evaluation.sparsity.items()},
        }
        child = self._client.create_run(
            self.experiment_id,
            run_name=f"{evaluation.kind} {evaluation.ratios}",
            tags={
                "mlflow.parentRunId": self.run_id,
                EVALUATION_TAG: name,
                "kind": evaluation.kind,
                **({"stopped": "true"} if evaluation.is_stopped else {}),
                **({"failure": evaluation.failure} if evaluation.failure else {}),
            },
        )
        self._client.log_batch(
            child.info.run_id,
            metrics=[
                Metric(k, v, now, 0)
                for k, v in values.items()
                if v is not None and math.isfinite(v)
            ],
            params=[Param(f"ratio_{group}", str(evaluation.ratios[group])) for group in GROUPS]
            + [
                Param("poa_weight", str(evaluation.candidate.poa_weight)),
                Param("num_prompts", str(len(evaluation.rewards) or len(evaluation.prompts))),
            ],
        )
        status = "FAILED" if evaluation.failure else "FINISHED"
        self._client.set_terminated(child.info.run_id, status)

    def _close(
        self,
        status: Status,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        files: Mapping[str, bytes],
    ) -> None:
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        self._client.log_batch(
            self.run_id,
            metrics=[Metric(k, v, now, 0) for k, v in metrics.items() if math.isfinite(v)],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                path = Path(folder) / name
                path.write_bytes(data)
                self._client.log_artifact(self.run_id, str(path))
        self._client.set_terminated(self.run_id, status)


def _make_database(uri: str) -> None:
    """Make a SQLite database that is not there, whole: MLflow never mends one half made."""
    from mlflow import MlflowClient

    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    MlflowClient(f"sqlite:///{draft}")
    if path.exists():  # Another search has made it meanwhile.
        draft.unlink()
    else:
        draft.replace(path)
