"""dry_run=true: what a search would cost, without starting it."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import ray

from crdiff_core.errors import ModelError
from search import estimate as module
from search import run
from search.config import ConfigError
from search.estimate import Timing, estimate
from search.plan import Plan
from tests.conf.test_config import composed

SMALL = (
    "budget.steps=3",
    "prompts.search=4",
    "prompts.rerank=4",
    "prompts.validation=6",
    "rerank.top=2",
)


@pytest.fixture
def plan(tmp_path):
    return Plan.make(composed(f"output={tmp_path}", *SMALL))


def test_it_counts_every_picture_that_a_search_may_draw(plan):
    found = estimate(plan)

    # Dense and three triples on 4 prompts, the best two on 4, winner and dense on 6, and for the
    # report the pruned model alone on 6.
    assert found.num_pictures == 4 * 4 + 2 * 4 + 2 * 6 + 6
    assert found.num_known == 0
    assert (found.timing.num_timed, found.timing.batch_size) == (4, 4)
    assert found.hours == pytest.approx(found.num_pictures * found.timing.trial_s / 4 / 3600)


def test_it_leaves_nothing_behind(plan, tmp_path):
    estimate(plan)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(plan, monkeypatch):
    monkeypatch.setattr(module, "_free_bytes", lambda device: 1 << 20)

    with pytest.raises(ModelError, match=r"^shapes in float32 takes 0.0 GiB and cpu has 0.0 GiB"):
        estimate(plan)


def test_too_little_disk_is_refused(plan, monkeypatch):
    usage = module.shutil.disk_usage("/")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))

    with pytest.raises(ConfigError, match="free and the results may take"):
        estimate(plan)


TIMING = Timing("NVIDIA H200", 1, 1, 3600.0, 10.0, 5.0, 100.0)


@pytest.mark.parametrize(
    ("share", "line"),
    [
        (1.0, "price      about 105.00, at 2.5 a GPU hour"),
        (0.25, "price      about 26.25, at 2.5 a GPU hour, with 0.25 GPUs for a worker"),
        (2.0, "price      about 210.00, at 2.5 a GPU hour, with 2 GPUs for a worker"),
    ],
)
def test_the_price_is_of_the_gpus_that_a_worker_takes(tmp_path, monkeypatch, share, line):
    monkeypatch.setattr(module, "time_trial", lambda *_: TIMING)  # 42 pictures of an hour each.
    overrides = ("cluster.gpu_hour_price=2.5", f"cluster.gpus_per_trial={share}")
    plan = Plan.make(composed(f"output={tmp_path}", *SMALL, *overrides))

    assert line in estimate(plan).lines()


# --- on a cluster --------------------------------------------------------------------------------


class FakeRay:
    """Runs tasks at once, in this process, and notes what they asked for."""

    exceptions = ray.exceptions

    def __init__(self):
        self.asked = []

    def remote(self, function):
        self.function = function
        return self

    def options(self, **options):
        self.asked.append(options)
        return SimpleNamespace(remote=lambda *arguments: lambda: self.function(*arguments))

    def get(self, task, timeout):
        return task()


@pytest.fixture
def joined(monkeypatch):
    """A cluster whose workers have half a GPU each."""

    @contextlib.contextmanager
    def connect(settings):
        yield joined.resources

    joined = FakeRay()
    joined.resources = {"cpu": 1.0, "gpu": 0.5}
    monkeypatch.setattr(module, "connect", connect)
    monkeypatch.setitem(sys.modules, "ray", joined)
    return joined


def on_cluster(tmp_path, *overrides):
    return Plan.make(composed(f"output={tmp_path}", *SMALL, "cluster=ray", *overrides))


def test_on_a_cluster_a_worker_of_it_is_timed(tmp_path, joined, monkeypatch):
    devices = []

    def timed(config, recipe, prompts, device):
        devices.append(device)
        return TIMING

    monkeypatch.setattr(module, "time_trial", timed)
    found = estimate(on_cluster(tmp_path))

    assert found.timing == TIMING
    assert devices == ["cuda"]
    assert joined.asked == [{"num_cpus": 1.0, "num_gpus": 0.5, "max_retries": 0}]


def test_what_is_wrong_on_the_worker_is_said_as_here(tmp_path, joined, monkeypatch):
    def refused(*_):
        raise ModelError("no weights on this node")

    monkeypatch.setattr(module, "time_trial", refused)
    with pytest.raises(ModelError, match=r"^no weights on this node$"):
        estimate(on_cluster(tmp_path))


def test_a_cluster_without_a_free_worker_is_one_line(tmp_path, joined, monkeypatch):
    def late(task, timeout):
        raise ray.exceptions.GetTimeoutError

    monkeypatch.setattr(joined, "get", late)
    with pytest.raises(ConfigError) as raised:
        estimate(on_cluster(tmp_path))

    assert str(raised.value) == (
        "a trial cannot be timed on cluster.address=auto: no worker has drawn one within 15 "
        "minutes: try again when a worker is free"
    )


def test_half_precision_is_not_timed_on_a_cluster_without_a_gpu(tmp_path, joined):
    joined.resources = {"cpu": 1.0}
    with pytest.raises(ConfigError, match="the cluster has no GPU and shapes is in float16"):
        estimate(on_cluster(tmp_path, "model.dtype=float16"))


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_it_and_starts_no_trial(tmp_path, monkeypatch, capsys):
    # Else a cluster of our own would get a token, which this process would keep.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", ["search.run", "dry_run=true", f"output={tmp_path}", *SMALL])
    assert run.main() == 0
    printed = capsys.readouterr()

    assert printed.out.startswith("model      shapes (embedded), revision ")
    assert "one trial  4 pictures of 8 steps" in printed.out
    assert "search     at most 3 evaluations, 42 pictures" in printed.out
    assert printed.err == "loading the model and timing a trial ...\n"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
