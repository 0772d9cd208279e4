"""Searches by the analytic program: their sessions, and what these leave behind."""

import io
import json
import multiprocessing
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from mlflow import MlflowClient

from search import sync
from search.storage import Storage
from tests.faults import program

SMALL = (
    *("budget.steps=12", "render.batch_size=2"),
    *("prompts.search=8", "prompts.rerank=4", "prompts.validation=8"),
)
# A session is forked from a process that has imported all this: most of its time otherwise.
SESSIONS = multiprocessing.get_context("forkserver")
SESSIONS.set_forkserver_preload(
    [
        *(program.__name__, "search.driver", "search.run", "search.progress", "torch"),
        *("crdiff_core.rewards.shapes", "mlflow.store.tracking.sqlalchemy_store"),
    ]
)
PATIENCE_S = 400


@dataclass
class Searching:
    """One search on a cluster, in any number of sessions.

    folder: of MLflow's database and our notes; place: of its results, if elsewhere.
    lethal: ratios and prompts of a batch that kills its worker.
    batch_s: seconds that one takes; load_s: that a worker's first takes more.
    """

    folder: Path
    address: str
    arguments: tuple[str, ...] = ()
    place: str = ""
    lethal: list | None = None
    batch_s: float = 0.05
    load_s: float = 0.0

    def __post_init__(self):
        self.holds = self.folder / "holds"
        self.holds.mkdir(parents=True, exist_ok=True)
        self.place = self.place or str(self.folder / "runs")
        self.mlflow = f"sqlite:///{self.folder / 'mlflow.db'}"
        self.ledger = Storage.at(self.place) / "shapes_24x40" / "ledger"
        self._files = {}
        self._sessions = []

    def start(self):
        """Begin a session; returns its process."""
        arguments = [
            *SMALL,
            *("cluster=ray", f"cluster.address={self.address}"),
            *(f'output="{self.place}"', f"tracking.uri={self.mlflow}"),
            *self.arguments,
        ]
        # What it is forked from began in another test's environment.
        environment = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
        worker = {
            "begun": str(self._begun),
            "holds": str(self.holds),
            "lethal": self.lethal,
            "batch_s": self.batch_s,
            "load_s": self.load_s,
        }
        session = SESSIONS.Process(
            target=program.run, args=(arguments, environment, str(self.folder / "log"), worker)
        )
        session.start()
        self._sessions.append(session)
        return session

    def kill(self):
        """End its sessions, if there are any left."""
        for session in self._sessions:
            session.kill()
            session.join()

    def finish(self):
        """Run a session to its end."""
        session = self.start()
        session.join(PATIENCE_S)
        assert session.exitcode == 0, self.printed

    def wait(self, session, until):
        """Wait until something is so; returns whether it came before the session's end."""
        deadline = time.monotonic() + PATIENCE_S
        while not until():
            if not session.is_alive():
                return until()
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.01)
        return True

    @property
    def results(self):
        """The folder of its answer."""
        cell = self.ledger.parent
        racing = "-racing" if "racing=on" in self.arguments else ""
        return cell / f"annealing{racing}-seed0"

    @property
    def printed(self):
        """What its sessions printed."""
        return (self.folder / "log").read_text()

    @property
    def _begun(self):
        return self.folder / "begun"

    @property
    def begun(self):
        """The batches that workers have begun, in all sessions: ratios and prompts."""
        lines = self._begun.read_text().splitlines() if self._begun.exists() else []
        return [json.loads(line) for line in lines]

    @property
    def num_files(self):
        """How many batches are in the ledger."""
        return len(self.ledger.files())

    def rows(self):
        """Every row of the ledger; a file that cannot be read is an error."""
        return [row for data in self._read().values() for row in rows_of(data)]

    def _read(self):
        return {name: self.ledger.read(name) for name in sorted(self.ledger.files())}

    def lost(self):
        """How many rows are gone or other than when last asked, or are there twice."""
        before, self._files = self._files, self._read()
        gone = [data for name, data in before.items() if self._files.get(name) != data]
        times = Counter((row["key"], row["prompt"], row["seed"]) for row in self.rows())
        return sum(len(rows_of(data)) for data in gone) + times.total() - len(times)

    def course(self):
        """The steps, and the evaluations before and after them."""
        history = rows_of(self.results.read("history.parquet"))
        named = [row for row in history if row["step"] or row["kind"] != "search"]
        # How many of a lost race's prompts were drawn depends on the workers.
        drawn = dict.fromkeys(("reward", "standard_error", "num_prompts"))
        return [row | {"seconds": None} | (drawn if row["lost_race"] else {}) for row in named]

    def answer(self):
        """best_ratios.json, but for what it took."""
        answer = json.loads(self.results.read("best_ratios.json"))
        del answer["provenance"]["use"]
        return answer

    def tracked(self):
        """MLflow's runs: the parents, and the children."""
        client = MlflowClient(self.mlflow)
        of = [client.get_experiment_by_name("crdiff-search").experiment_id]
        runs = client.search_runs(of)
        children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
        return [run for run in runs if run not in children], children


def rows_of(data):
    return pq.read_table(io.BytesIO(data)).to_pylist()


def check(search, alone):
    """Compare a search that was disturbed with one that was not, whole as its ledger is."""
    assert search.course() == alone.course()
    assert search.answer() == alone.answer()
    complete = {row["ledger_key"] for row in alone.course() if not row["lost_race"]}
    assert measured(search, complete) == measured(alone, complete)


def measured(search, keys):
    return sorted(
        (row["key"], row["prompt"], row["seed"], row["reward"])
        for row in search.rows()
        if row["key"] in keys
    )


def check_tracked(search):
    """MLflow has one run for the search, and one for each of its evaluations, all closed.

    On a host so slow that the last session did not wait for it, after the command it then named.
    """
    if "MLflow          not filled" in search.printed.rpartition(": starting")[2]:
        assert sync.main([search.place]) == 0
    (parent,), children = search.tracked()
    named = Counter(run.data.tags["crdiff.evaluation"] for run in children)
    assert parent.info.status == "FINISHED"
    assert {run.info.status for run in children} == {"FINISHED"}
    assert set(named.values()) == {1}
    whole = [row for row in search.course() if not row["lost_race"]]
    complete = [run for run in children if run.data.tags["status"] == "finished"]
    kinds = Counter(run.data.tags["kind"] for run in complete)
    assert kinds == kinds | Counter(row["kind"] for row in whole)
    assert all("reward" in run.data.metrics for run in complete)
