"""cluster=ray against a real Ray head that asks for a token."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from search.cluster import connect
from search.config import ClusterSettings, ConfigError
from tests.pipelines import save_sd

RAY = Path(sys.executable).with_name("ray")
TINY = (
    *("res=24x24", "budget.steps=3", "tracking=none", "render.num_steps=2"),
    "render.batch_size=2",
    *("prompts.search=2", "prompts.rerank=2", "prompts.validation=2", "rerank.top=1"),
)


def environment(**variables):
    """This process's, without anything that tells Ray where or what to be."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**inherited, "RAY_USAGE_STATS_ENABLED": "0", **variables}


def members(session):
    """Process ids of a session, zombies left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # It ended while we looked.
            continue
        if int(of) == session and state != "Z":
            found.append(int(folder.name))
    return found


def stop(head):
    """End a head that we started: the process, then whatever is left of its session."""
    head.terminate()
    try:
        head.wait(timeout=40)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 10
        for pid in members(head.pid):
            os.kill(pid, number)
        while members(head.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not members(head.pid)


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    file = tmp_path_factory.mktemp("token") / "token"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    return file


@pytest.fixture(scope="module")
def address(token):
    """A head of our own with one CPU, open only to who has the token."""
    folder = tempfile.mkdtemp(prefix="crh", dir="/tmp")  # Its path holds sockets: keep it short.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--temp-dir={folder}"]
    command += ["--num-cpus=1", "--num-gpus=0", "--object-store-memory=100000000"]
    command += ["--include-dashboard=false", "--disable-usage-stats"]
    log = Path(folder) / "head.log"
    with log.open("w") as out:
        head = subprocess.Popen(
            command,
            env=environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token)),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        stop(head)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def search(address, tmp_path_factory):
    """Run the tiny search on the head under some variables; the finished process."""
    model = save_sd(tmp_path_factory.mktemp("model"))
    output = tmp_path_factory.mktemp("output")

    def call(*arguments, **variables):
        command = [sys.executable, "-m", "search.run", f"model.path={model}", *TINY]
        command += [f"output={output}", "cluster=ray", f"cluster.address={address}", *arguments]
        return subprocess.run(
            command, env=environment(**variables), capture_output=True, text=True, timeout=240
        )

    call.output = output
    return call


@pytest.fixture(scope="module")
def finished(search, token):
    """The tiny search, run with the right token."""
    return search(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))


def test_a_search_runs_on_a_cluster_that_asks_for_a_token(finished, search):
    assert finished.returncode == 0, finished.stderr
    assert "pictures drawn in this run" in finished.stdout
    assert (search.output / "shapes_24x24/annealing-seed0/best_ratios.json").is_file()


@pytest.mark.parametrize("given", ["a wrong token", "no token"])
def test_without_the_token_a_search_ends_with_one_line(given, finished, search, tmp_path):
    (tmp_path / "token").write_text("f" * 64)
    variables = {
        "a wrong token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": tmp_path / "token"},
        "no token": {"RAY_AUTH_MODE": "token", "HOME": tmp_path},
    }[given]
    results = search.output / "shapes_24x24"
    before = {file: file.read_bytes() for file in results.rglob("*") if file.is_file()}

    # Another resolution, so that the ledger does not answer before the cluster is asked.
    refused = search("res=24x32", **{name: str(value) for name, value in variables.items()})

    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: cluster.address=127.0.0.1:")
    assert "RAY_AUTH_TOKEN_PATH" in line
    assert "Traceback" not in refused.stdout
    assert {file: file.read_bytes() for file in before} == before


OWN = """
import os, subprocess, sys
from search.cluster import connect, prepare_environment
from search.config import ClusterSettings

settings = ClusterSettings(
    name="local", address="local", device="cpu", cpus_per_trial=1, gpus_per_trial=1.0,
    num_workers=None, gpu_hour_price=None,
)
prepare_environment(settings)
with connect(settings) as resources:
    import ray

    assert resources == {"cpu": 1.0}
    knock = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
    stranger = subprocess.run(
        [sys.executable, "-c", knock, ray.get_runtime_context().gcs_address],
        env={name: value for name, value in os.environ.items() if "RAY_AUTH" not in name},
        capture_output=True,
        text=True,
    )
print(stranger.stderr)
"""


def test_a_cluster_of_our_own_refuses_who_has_no_token(ray_tmpdir, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", OWN],
        env=environment(RAY_TMPDIR=ray_tmpdir, HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    assert "AuthenticationError" in ended.stdout


def test_nobody_at_the_address_is_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    settings = ClusterSettings(
        name="ray",
        address=nobody,
        device="auto",
        cpus_per_trial=1,
        gpus_per_trial=1.0,
        num_workers=None,
        gpu_hour_price=None,
    )
    message = f"no Ray cluster at cluster.address={nobody}: .*refused"
    with pytest.raises(ConfigError, match=message), connect(settings):
        pass
