"""cluster/mlflow-server.sh: a real server, real logins, and a search's run on it."""

import base64
import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from search.tracking import Experiment, Tracker
from tests.processes import free_port, members, stop

SCRIPT = Path(__file__).parents[2] / "cluster" / "mlflow-server.sh"
SECRETS = "admin_password", "secret_key"
API = "/api/2.0/mlflow/experiments/search?max_results=1"


class Server:
    """The running server: its folder, its address, and its process."""

    def __init__(self, folder, port, process, log):
        self.folder, self.process, self.log = folder, process, log
        self.port, self.uri = port, f"http://127.0.0.1:{port}"

    @property
    def password(self):
        return (self.folder / "admin_password").read_text().strip()

    def status(self, path, login=None, **headers):
        """What the server answers to a request: a status of HTTP."""
        request = urllib.request.Request(self.uri + path, headers=headers)
        if login is not None:
            encoded = base64.b64encode(login.encode()).decode()
            request.add_header("Authorization", f"Basic {encoded}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code


@contextlib.contextmanager
def running(folder, log):
    """The server on a free port, until the end."""
    port = free_port()
    inherited = {name: value for name, value in os.environ.items() if "MLFLOW" not in name}
    # The MLflow beside this interpreter, even if nobody has activated its environment.
    inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
    with log.open("w") as out:
        process = subprocess.Popen(
            [SCRIPT, folder, "--port", str(port)],
            env={**inherited, "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(folder, port, process, log)
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(OSError):
                server.status("/health")
                break
            time.sleep(0.5)
        yield server
    finally:
        stop(process)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    parent = tmp_path_factory.mktemp("mlflow")
    with running(parent / "a folder", parent / "log") as server:
        yield server


@pytest.mark.parametrize("path", ["/", API], ids=["the dashboard", "the API"])
def test_only_the_right_password_is_let_in(server, path):
    assert server.status(path) == 401
    assert server.status(path, "admin:wrong") == 401
    assert server.status(path, "admin:password1234") == 401  # MLflow's own, once.
    assert server.status(path, f"admin:{server.password}") == 200


def test_a_request_to_another_host_is_refused(server):
    login = f"admin:{server.password}"
    assert server.status(API, login, Host="rebound.example") == 403
    assert server.status(API, login, Host="192.168.0.1") == 403
    assert server.status(API, login, Host=f"localhost:{server.port}") == 200


def test_it_listens_on_loopback_alone(server):
    places = {
        place.laddr
        for process in map(psutil.Process, members(server.process.pid))
        for place in process.net_connections("inet")
        if place.status == psutil.CONN_LISTEN
    }
    assert places == {("127.0.0.1", server.port)}


def test_what_it_keeps_is_the_operators_alone(server):
    assert {*SECRETS, "basic_auth.db", "mlflow.db"} <= set(os.listdir(server.folder))
    for file in (server.folder, *server.folder.rglob("*")):
        assert not file.stat().st_mode & 0o077, file
    for secret in SECRETS:
        assert (server.folder / secret).stat().st_mode & 0o777 == 0o600


def test_its_secrets_are_long_and_shown_nowhere(server):
    shown = server.log.read_text()
    for process in map(psutil.Process, members(server.process.pid)):
        shown += " ".join(process.cmdline())
    for secret in SECRETS:
        text = (server.folder / secret).read_text().strip()
        assert len(text) == 64
        assert text not in shown


def track(server, key):
    """Write a search's run, as the driver does."""
    experiment = Experiment(server.uri, "crdiff-test")
    tracker = Tracker(experiment, key, "a search", {"seed": 0}, {"model": "analytic"})
    tracker.chart(1, time.time(), {"reward": 0.5})
    files = {"best_ratios.json": b"{}"}
    tracker.finish("FINISHED", {}, {"verdict": "better"}, lambda: files, patience_s=60)
    return tracker


def test_a_search_with_the_password_writes_its_run(server, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.password)
    tracker = track(server, "key0")

    assert tracker.error is None
    client = MlflowClient(server.uri)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["reward"] == 0.5
    assert run.data.tags["verdict"] == "better"
    file = client.download_artifacts(tracker.run_id, "best_ratios.json", str(tmp_path))
    assert Path(file).read_bytes() == b"{}"
    assert list((server.folder / "artifacts").rglob("best_ratios.json"))


@pytest.mark.parametrize("password", ["", "only-i-know-it"])
def test_a_search_without_the_password_is_told_so(server, monkeypatch, password):
    for name, value in (("USERNAME", "admin"), ("PASSWORD", password)):
        if password:
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
        else:
            monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    tracker = track(server, "key1")

    assert "not authenticated" in tracker.error
    assert "only-i-know-it" not in tracker.error


def test_started_again_it_keeps_its_secrets_and_closes_their_files(server, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for secret in SECRETS:
        shutil.copy(server.folder / secret, folder)
        (folder / secret).chmod(0o644)
    subprocess.run([SCRIPT, folder, "--help"], capture_output=True, check=True, timeout=240)

    for secret in SECRETS:
        assert (folder / secret).read_bytes() == (server.folder / secret).read_bytes()
        assert (folder / secret).stat().st_mode & 0o777 == 0o600


def test_without_a_folder_it_says_what_is_missing():
    ended = subprocess.run([SCRIPT], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode != 0
    assert "FOLDER is missing: cluster/mlflow-server.sh FOLDER" in ended.stderr
