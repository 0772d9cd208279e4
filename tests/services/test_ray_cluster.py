"""cluster=ray against a real Ray head that asks for a token."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from search.cluster import connect
from search.config import ClusterSettings, ConfigError
from tests.pipelines import save_sd
from tests.processes import free_port, stop

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


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    file = tmp_path_factory.mktemp("token") / "token"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    return file


@contextlib.contextmanager
def ray_start(*arguments, **variables):
    """A node of our own with one CPU, until the end."""
    folder = tempfile.mkdtemp(prefix="crh", dir="/tmp")  # Its path holds sockets: keep it short.
    command = [RAY, "start", "--block", *arguments, "--num-cpus=1", "--num-gpus=0"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats"]
    if "--head" in arguments:
        command += [f"--temp-dir={folder}", "--include-dashboard=false"]
    log = Path(folder) / "node.log"
    with log.open("w") as out:
        node = subprocess.Popen(
            command,
            env=environment(**variables),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        stop(node)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def address(token):
    """A head open only to who has the token."""
    port = free_port()
    with ray_start(
        *("--head", f"--port={port}"), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token)
    ):
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def open_address():
    """A head open to everyone."""
    port = free_port()
    with ray_start("--head", f"--port={port}", RAY_AUTH_MODE="disabled"):
        yield f"127.0.0.1:{port}"


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
    (tmp_path / "token").touch(mode=0o600)
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


JOIN = """
import sys
from search.cluster import connect
from search.config import ClusterSettings, ConfigError

settings = ClusterSettings(
    name="ray", address=sys.argv[1], device="cpu", cpus_per_trial=1, gpus_per_trial=1.0,
    num_workers=None, gpu_hour_price=None,
)
try:
    with connect(settings):
        import ray

        print("joined", len(ray.nodes()))
except ConfigError as error:
    print(error)
"""


def join(address, **variables):
    """What comes of joining a cluster, in one line."""
    ended = subprocess.run(
        [sys.executable, "-c", JOIN, address],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    (line,) = ended.stdout.splitlines()
    return line


@pytest.mark.parametrize("place", ["RAY_AUTH_TOKEN_PATH", "the home folder"])
def test_a_token_file_that_others_may_read_is_refused(place, address, token, tmp_path):
    file = tmp_path / ".ray/auth_token"
    file.parent.mkdir()
    file.write_text(token.read_text())
    file.chmod(0o640)
    variables = {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    if place == "RAY_AUTH_TOKEN_PATH":
        variables |= {"RAY_AUTH_TOKEN_PATH": str(file), "HOME": "/"}

    refused = join(address, **variables)
    assert refused.startswith(f"{file}: others on this machine may read the Ray token")
    assert refused.endswith(f": chmod 600 {file}")
    # Ray reads no file where the token itself is given.
    assert join(address, **variables, RAY_AUTH_TOKEN=token.read_text()) == "joined 1"


def test_a_cluster_open_to_everyone_is_joined_only_while_it_is_this_machine(
    open_address, token, tmp_path
):
    nobody = {"HOME": str(tmp_path)}
    assert join(open_address, **nobody) == "joined 1"
    # To us an address that no interface lists is another machine.
    with ray_start(
        f"--address={open_address}", "--node-ip-address=127.0.0.2", RAY_AUTH_MODE="disabled"
    ):
        refused = join(open_address, **nobody)
        assert refused.startswith(f"cluster.address={open_address}: whoever reaches it can run ")
        assert "on 127.0.0.2, as it asks for no token" in refused
        # Whether we have a token does not make it any safer.
        asked = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        assert join(open_address, **asked) == refused
        assert join(open_address, **nobody, RAY_AUTH_MODE="disabled") == "joined 2"


OWN = """
import json, os, subprocess, sys
import psutil
from search.cluster import connect, prepare_environment
from search.config import ClusterSettings

settings = ClusterSettings(
    name="local", address="local", device="cpu", cpus_per_trial=1, gpus_per_trial=1.0,
    num_workers=None, gpu_hour_price=None,
)
prepare_environment(settings)
with connect(settings) as resources:
    import ray

    @ray.remote
    class Worker:
        def name(self):
            return "worker"

    worker = Worker.remote()
    assert ray.get(worker.name.remote()) == "worker"
    knock = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
    stranger = subprocess.run(
        [sys.executable, "-c", knock, ray.get_runtime_context().gcs_address],
        env={name: value for name, value in os.environ.items() if "RAY_AUTH" not in name},
        capture_output=True,
        text=True,
    )
    us = psutil.Process()
    processes = [us, *us.children(recursive=True)]
    found = {
        "resources": resources,
        "knock": stranger.stderr,
        "listens": [
            [process.name(), place.laddr.ip]
            for process in processes
            for place in process.net_connections("inet")
            if place.status == psutil.CONN_LISTEN
        ],
        "commands": [process.cmdline() for process in processes],
        "token": os.environ["RAY_AUTH_TOKEN"],
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """What is seen of a local cluster, and its folder and home.

    RAY_AUTH_MODE is as it has to be for other clusters: the one way in which Ray writes a token.
    """
    home = tmp_path_factory.mktemp("home")
    folder = tempfile.mkdtemp(prefix="cro", dir="/tmp")
    ended = subprocess.run(
        [sys.executable, "-c", OWN],
        env=environment(RAY_TMPDIR=folder, HOME=str(home), RAY_AUTH_MODE="token"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    yield {**json.loads(ended.stdout), "folder": Path(folder), "home": home}
    shutil.rmtree(folder)


def test_a_cluster_of_our_own_refuses_who_has_no_token(own):
    assert own["resources"] == {"cpu": 1.0}
    assert "AuthenticationError" in own["knock"]


def test_a_cluster_of_our_own_listens_on_loopback_alone(own):
    assert {"gcs_server", "raylet", "ray::Worker"} <= {name for name, _ in own["listens"]}
    assert {ip.removeprefix("::ffff:") for _, ip in own["listens"]} == {"127.0.0.1"}


def test_the_token_of_our_own_cluster_is_written_nowhere(own):
    token = own["token"].encode()
    assert not any(own["token"] in word for command in own["commands"] for word in command)
    assert list(own["folder"].rglob("raylet.out"))
    for folder in (own["folder"], own["home"]):
        for file in folder.rglob("*"):
            assert not (file.is_file() and token in file.read_bytes()), file
    assert not (own["home"] / ".ray").exists()


def test_nobody_at_the_address_is_one_line():
    nobody = f"127.0.0.1:{free_port()}"
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
