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
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from crdiff_core.ratios import GROUPS
from search.evaluations import Evaluation
from search.logs import take_over

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

# Tags by which a later run of the same search finds what is there already.
RUN_TAG = "crdiff.run"
EVALUATION_TAG = "crdiff.evaluation"

Status = Literal["FINISHED", "FAILED", "KILLED"]
# The same in words, as a tag: MLflow's own columns and searches have no room for "stopped".
STATUS_TAG = "status"
_IN_WORDS = {
    "RUNNING": "running",
    "FINISHED": "finished",
    "FAILED": "failed",
    "KILLED": "stopped",
}
# Where MLflow's log_image puts pictures, and the name of ours.
_PICTURES = "images"
_PICTURE = "best"
_PREVIEW, _PREVIEW_SIDE = "+compressed.webp", 256
# So that MLflow's pages begin with runs and charts, not with traces of language models.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

# MLflow refuses longer values, and more of them at once.
_LONGEST = 6000
_MOST_PARAMS = 100
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0


@dataclass(frozen=True)
class Experiment:
    """Where runs go: the tracking URI, the experiment, and a folder for its artifacts or ''."""

    uri: str
    name: str
    artifacts: str = ""


class Tracker:
    """One MLflow parent run for a search, with a child run for each evaluation.

    A background thread writes. While MLflow is out of reach or answers wrongly, `error` says why
    and the thread tries again, ever later, beginning with what it then finds there: a request
    that failed may have come through all the same. So nothing is written twice, in this session
    or a later one, and whatever was missed is filled in.

    abandoned: returns the run keys of searches whose driver is gone: their runs are closed.
    """

    def __init__(
        self,
        experiment: Experiment,
        run_key: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        abandoned: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.error: str | None = None
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._experiment = experiment
        self._run_key = run_key
        self._name = name
        self._params = {key: str(value)[:_LONGEST] for key, value in params.items()}
        self._tags = {key: value[:_LONGEST] for key, value in tags.items()}
        self._abandoned = abandoned
        self._client: Any = None
        self._known: set[str] = set()
        self._charted: set[int] = set()
        # Pictures by their step, still to be written; and the steps that have theirs in MLflow,
        # None: to be looked up.
        self._waiting: dict[int, Callable[[], Image.Image | None]] = {}
        self._shown: set[int] | None = None
        self._metrics: dict[str, float] = {}
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_last_try = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def evaluation(
        self, evaluation: Evaluation, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Add an evaluation's child run; metrics: others than its own."""
        self._jobs.put(lambda: self._add(evaluation, metrics or {}))

    def chart(self, step: int, at: float, metrics: Mapping[str, float]) -> None:
        """Add a point to each of the parent's charts; at: its time, in seconds since 1970."""
        self._jobs.put(lambda: self._chart(step, at, metrics))

    def picture(self, step: int, draw: Callable[[], Image.Image | None]) -> None:
        """Add the parent's picture of a step; draw: called by the thread, None: there is none.

        A picture that MLflow does not take holds nothing else up.
        """
        self._jobs.put(lambda: self._show(step, draw))

    def finish(
        self,
        status: Status,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        files: Callable[[], Mapping[str, bytes]],
        patience_s: float,
    ) -> None:
        """Close the parent run, with its last metrics and files; wait that long for it at most.

        files: read by the thread.
        """
        self._jobs.put(lambda: self._close(status, metrics, tags, files))
        self._jobs.put(None)
        self._is_last_try.set()
        self._thread.join(timeout=patience_s)
        if self._thread.is_alive() and self.error is None:
            self.error = f"it was not done after {patience_s:.0f} s more"

    @property
    def num_waiting(self) -> int:
        """About how many entries are still to be written."""
        return self._jobs.qsize()

    @property
    def dashboard_command(self) -> str:
        """The shell command, or the address, that opens the dashboard."""
        uri = self._experiment.uri
        if uri.startswith("sqlite:"):
            return shlex.join(["mlflow", "ui", "--backend-store-uri", uri, "--port", "5000"])
        return uri

    # --- the thread --------------------------------------------------------------------------

    def _work(self) -> None:
        job: Callable[[], None] | None = self._close_abandoned
        while job is not None:
            if not self._does(job):
                return
            job = self._jobs.get()

    def _does(self, job: Callable[[], None]) -> bool:
        """Do it, however often it takes; False if time is up first."""
        pause_s = _FIRST_PAUSE_S
        while True:
            is_last = self._is_last_try.is_set()
            try:
                if self._client is None:
                    self._client = self._open()
                job()
            except Exception as error:  # Whatever MLflow raises, the search must not notice.
                self._client = None
                self._say(self._reason(error))
            else:
                self.error = None
                return True
            if is_last:
                return False
            self._is_last_try.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _reason(self, error: Exception) -> str:
        root: BaseException = error
        while (cause := root.__cause__ or root.__context__) is not None:
            root = cause
        if isinstance(root, OSError):  # MLflow, requests and urllib3 wrap it in a line each.
            return f"{self._experiment.uri}: {root.strerror or root}"
        return " ".join(str(error).split())[:300] or type(error).__name__

    def _say(self, error: str) -> None:
        if self.error is None:
            log.warning("MLflow: %s: the search goes on, and MLflow is tried again", error)
        self.error = error

    def _open(self) -> Any:
        """Find or make the parent run, and note what it has already."""
        # At MLflow's defaults a server that is down is asked again for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        # A server's client would print two lines for every run.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        # It would tell its makers what is called, over the internet.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        take_over()
        _make_database(self._experiment.uri)
        client = MlflowClient(self._experiment.uri)
        found = client.get_experiment_by_name(self._experiment.name)
        self.experiment_id = (
            found.experiment_id
            if found
            else client.create_experiment(
                self._experiment.name,
                artifact_location=self._experiment.artifacts or None,
                tags=_EXPERIMENT_TAGS,
            )
        )
        runs = self._search(client, f"tags.`{RUN_TAG}` = '{self._run_key}'")
        if runs:
            parent, *doubles = runs
            for double in doubles:
                client.delete_run(double.info.run_id)
            client.update_run(parent.info.run_id, status="RUNNING")
            client.set_tag(parent.info.run_id, STATUS_TAG, _IN_WORDS["RUNNING"])
        else:
            tags = {**self._tags, RUN_TAG: self._run_key, STATUS_TAG: _IN_WORDS["RUNNING"]}
            parent = client.create_run(self.experiment_id, run_name=self._name, tags=tags)
        self.run_id = parent.info.run_id
        self._log_params(client, parent.data.params)
        self._metrics = parent.data.metrics
        histories = (client.get_metric_history(self.run_id, key) for key in self._metrics)
        self._charted = {point.step for history in histories for point in history}
        self._known = self._complete_children(client)
        self._shown = None
        return client

    def _search(self, client: Any, query: str) -> list[Any]:
        """Return the runs, oldest first."""
        found: list[Any] = []
        token = None
        while True:
            page = client.search_runs(
                [self.experiment_id],
                query,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            found += page
            token = page.token
            if not token:
                return found

    def _log_params(self, client: Any, known: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        # Those of the first session stay: MLflow takes no other value for a parameter it has.
        missing = iter([Param(k, v) for k, v in self._params.items() if k not in known])
        while batch := list(islice(missing, _MOST_PARAMS)):
            client.log_batch(self.run_id, params=batch)

    def _children(self, client: Any, parent: str | None) -> list[Any]:
        return self._search(client, f"tags.`mlflow.parentRunId` = '{parent}'")

    def _complete_children(self, client: Any) -> set[str]:
        """Return the names of the complete children; the others, and doubles, are deleted."""
        names: set[str] = set()
        for run in self._children(client, self.run_id):
            name = run.data.tags.get(EVALUATION_TAG, "")
            if name in names or run.info.status not in {"FINISHED", "FAILED"}:
                client.delete_run(run.info.run_id)
            else:
                names.add(name)
        return names

    def _close_abandoned(self) -> None:
        """Close the runs that drivers left open when they were killed."""
        abandoned = set(self._abandoned()) - {self._run_key}
        for run in self._search(self._client, "attributes.status = 'RUNNING'"):
            if run.data.tags.get(RUN_TAG) in abandoned:
                for child in self._children(self._client, run.info.run_id):
                    if child.info.status == "RUNNING":
                        self._end(child.info.run_id, "KILLED")
                self._end(run.info.run_id, "KILLED")

    def _end(self, run_id: str | None, status: Status) -> None:
        self._client.set_tag(run_id, STATUS_TAG, _IN_WORDS[status])
        self._client.set_terminated(run_id, status)

    def _chart(self, step: int, at: float, metrics: Mapping[str, float]) -> None:
        if step not in self._charted:
            self._client.log_batch(self.run_id, metrics=_points(metrics, at, step))
            self._charted.add(step)

    def _show(self, step: int, draw: Callable[[], Image.Image | None]) -> None:
        self._waiting[step] = draw
        try:
            self._write_pictures()
        except Exception as error:  # The next one tries again, and at last the end does.
            self._shown = None
            log.info("MLflow: a picture has to wait: %s", self._reason(error))

    def _write_pictures(self) -> None:
        """Write those that wait, if they are not there."""
        if self._shown is None:
            self._shown = self._complete_pictures() if self._waiting else None
        for step, draw in sorted(self._waiting.items()):
            assert self._shown is not None
            image = None if step in self._shown else draw()
            if image is not None:
                self._client.log_image(self.run_id, image, key=_PICTURE, step=step)
                self._shown.add(step)
            del self._waiting[step]

    def _complete_pictures(self) -> set[int]:
        """Return the steps whose picture is there; where its preview is not, make that."""
        paths = {file.path for file in self._client.list_artifacts(self.run_id, _PICTURES)}
        found: set[int] = set()
        for path in paths:
            if path.startswith(f"{_PICTURES}/{_PICTURE}+step+") and path.endswith(".png"):
                found.add(int(path.split("+")[2]))
                if path.removesuffix(".png") + _PREVIEW not in paths:
                    self._add_preview(path)
        return found

    def _add_preview(self, path: str) -> None:
        """Add what log_image writes last, and MLflow's pages show first."""
        from PIL import Image

        with tempfile.TemporaryDirectory() as folder:
            file = Path(self._client.download_artifacts(self.run_id, path, folder))
            preview = file.with_name(file.stem + _PREVIEW)
            with Image.open(file) as image:
                image.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
                image.save(preview)
            self._client.log_artifact(self.run_id, str(preview), _PICTURES)
        self._client.set_tag(self.run_id, "mlflow.loggedImages", "True")

    def _add(self, evaluation: Evaluation, more: Mapping[str, float]) -> None:
        from mlflow.entities import Param

        name = f"{evaluation.kind}:{evaluation.key}:{evaluation.prompts.digest}"
        name += f":{len(evaluation.rewards)} drawn" if evaluation.is_stopped else ""
        name += ":failed" if evaluation.failure else ""
        if name in self._known:
            return
        status: Status = "FAILED" if evaluation.failure else "FINISHED"
        child = self._client.create_run(
            self.experiment_id,
            start_time=_ms(evaluation.measured_at - evaluation.seconds),
            run_name=_name(evaluation),
            tags={
                "mlflow.parentRunId": self.run_id,
                EVALUATION_TAG: name,
                "kind": evaluation.kind,
                STATUS_TAG: _IN_WORDS["KILLED" if evaluation.is_stopped else status],
                **({"failure": evaluation.failure} if evaluation.failure else {}),
            },
        )
        params = {
            **{f"ratio_{group}": evaluation.ratios[group] for group in GROUPS},
            "poa_weight": evaluation.candidate.poa_weight,
            "num_prompts": len(evaluation.rewards) or len(evaluation.prompts),
        }
        metrics = {
            "reward": evaluation.mean,
            "reward_standard_error": evaluation.standard_error,
            "seconds": evaluation.seconds,
            **{f"seconds_{stage}": taken for stage, taken in evaluation.stages.items()},
            **{f"sparsity_{group}": value for group, value in evaluation.sparsity.items()},
            **({} if evaluation.memory_gib is None else {"memory_gib": evaluation.memory_gib}),
            **more,
        }
        self._client.log_batch(
            child.info.run_id,
            metrics=_points(metrics, evaluation.measured_at),
            params=[Param(key, str(value)) for key, value in params.items()],
        )
        self._client.set_terminated(child.info.run_id, status, _ms(evaluation.measured_at))
        self._known.add(name)

    def _close(
        self,
        status: Status,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        files: Callable[[], Mapping[str, bytes]],
    ) -> None:
        from mlflow.entities import RunTag

        new = {key: value for key, value in metrics.items() if self._metrics.get(key) != value}
        told = {**tags, STATUS_TAG: _IN_WORDS[status]}
        self._client.log_batch(
            self.run_id,
            metrics=_points(new, time.time()),
            tags=[RunTag(key, value[:_LONGEST]) for key, value in told.items()],
        )
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files().items():
                path = Path(folder) / name
                path.write_bytes(data)
                self._client.log_artifact(self.run_id, str(path))
        self._client.set_terminated(self.run_id, status)
        self._write_pictures()


def _name(evaluation: Evaluation) -> str:
    if evaluation.kind == "resized":
        return f"dense, resized from {evaluation.candidate.drawn_at}"
    if evaluation.ratios.is_dense:
        return evaluation.kind
    # MLflow's list shows about so many letters; what kind it is has a column.
    ratios = "/".join(f"{evaluation.ratios[group]:.2f}" for group in GROUPS)
    return ratios if evaluation.kind == "search" else f"{ratios} {evaluation.kind}"


def _make_database(uri: str) -> None:
    """Make a SQLite database that is not there, whole: MLflow never mends one half made."""
    from mlflow import MlflowClient

    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder:
        draft = Path(folder) / path.name
        MlflowClient(f"sqlite:///{draft}")
        with suppress(FileExistsError):  # Another search has made it meanwhile.
            os.link(draft, path)


def _points(metrics: Mapping[str, float], at: float, step: int = 0) -> list[Any]:
    """Return MLflow's metrics, without those that are no number."""
    from mlflow.entities import Metric

    return [
        Metric(key, value, _ms(at), step) for key, value in metrics.items() if math.isfinite(value)
    ]


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
