import contextlib
import logging
import os
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
from filelock import FileLock

pytest.register_assert_rewrite("tests.searches")

from crdiff_core.numerics import make_reproducible  # noqa: E402
from tests import searches  # noqa: E402

TESTS = Path(__file__).parent
# The folders whose tests are a tier of their own, with the marker of the same name.
TIERS = {"services", "faults"}

# No test is timed: a busy machine would fail it. The default is the same for everyone; thorough
# (--hypothesis-profile=thorough) looks for what nobody has seen yet.
hypothesis.settings.register_profile(
    "quick", deadline=None, max_examples=30, derandomize=True, database=None
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=300)
hypothesis.settings.load_profile("quick")
# Before torch computes anything, and for every process that a test starts.
make_reproducible()
# Before torch is imported: the tests' processes share the cores, and threads that wait for one
# another cost several times what they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Ray is imported: quiet, no usage reports, no per-trial logs.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
# What a person has in the real one must not decide over a test.
os.environ["HF_HUB_CACHE"] = os.path.join(tempfile.gettempdir(), "crdiff-tests-without-hub-cache")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what lies in a tier's folder, but for what is of another tier."""
    for item in items:
        if not any(item.iter_markers("slow")) and not any(item.iter_markers("gpu")):
            for tier in TIERS.intersection(item.path.relative_to(TESTS).parts):
                item.add_marker(tier)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, worker_id):
    """A folder that all test processes of this run share, and a lock for whoever fills it."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def finished(shared_folder):
    """One real search of the embedded model, small. Whoever needs it first runs it for all."""
    folder = shared_folder / "finished"
    folder.mkdir(exist_ok=True)
    with FileLock(shared_folder / "finished.lock"):
        return searches.Finished.once(folder)


@pytest.fixture(autouse=True)
def log_levels():
    """Give the next test the log levels of this one: a command sets them for its process."""
    loggers = [logging.getLogger(name) for name in ("", "search", "crdiff_core")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command of ours in this process: its exit code, and what it printed."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with mock.patch.dict(os.environ):  # Commands set what Ray and Hydra read.
            code = main()
        return (code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def environment(ray_tmpdir):
    """The environment of a search in a process of its own."""
    return searches.environment(ray_tmpdir)


@pytest.fixture(scope="session")
def ray_tmpdir():
    """A folder of our own for Ray, with a short path: it holds Unix sockets."""
    folder = tempfile.mkdtemp(prefix="crd", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def ray_cluster(folder):
    import ray

    # Ray would write a token into the user's home, and ask for it in every later test.
    with mock.patch.dict(os.environ, RAY_AUTH_MODE="disabled"):
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


@pytest.fixture
def local_ray(ray_tmpdir):
    """A Ray cluster of this test's own."""
    with ray_cluster(ray_tmpdir):
        yield


@pytest.fixture(scope="module")
def module_ray(ray_tmpdir):
    """A Ray cluster of this module's own, for tests that leave nothing behind in it."""
    with ray_cluster(ray_tmpdir):
        yield


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory):
    """An empty database of MLflow's, to copy: making one takes it seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A small Stable Diffusion pipeline with random weights."""
    from tests.pipelines import save_sd

    return save_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    """A small Stable Diffusion XL pipeline with random weights."""
    from tests.pipelines import save_sdxl

    return save_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def s3_server():
    """An S3 of our own with one bucket; how a place in it ends."""
    from moto.server import ThreadedMotoServer

    # It is in this process: a log of ours that is kept there must not wait for its own.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    bucket = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
    urllib.request.urlopen(bucket).close()
    yield f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    server.stop()


@pytest.fixture
def s3(s3_server, tmp_path, monkeypatch):
    """A place in it for one test."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return f"s3://bucket/{tmp_path.name}{s3_server}"


@pytest.fixture(params=["a folder", "s3"])
def place(request, tmp_path):
    """Where results may be kept: a local folder, or an object store."""
    return (
        str(tmp_path / "a folder")
        if request.param == "a folder"
        else request.getfixturevalue("s3")
    )
