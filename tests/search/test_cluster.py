import os

import pytest

from search.cluster import num_workers, prepare_environment
from search.config import ClusterSettings


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """The environment, without what says how Ray is guarded, and as it was in the end."""
    guards = ("RAY_AUTH", "RAY_ENABLE_WINDOWS")
    monkeypatch.setattr(
        os, "environ", {k: v for k, v in os.environ.items() if not k.startswith(guards)}
    )
    return os.environ


SETTINGS = ClusterSettings(
    name="any",
    address="local",
    device="auto",
    cpus_per_trial=1,
    gpus_per_trial=1.0,
    num_workers=None,
    gpu_hour_price=None,
)


def prepare(address):
    prepare_environment(SETTINGS.model_copy(update={"address": address}))


@pytest.mark.parametrize("given", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "known"}])
def test_each_cluster_of_our_own_has_a_new_token(variables, given):
    variables |= given
    tokens = set()
    for _ in range(2):
        prepare("local")
        assert variables["RAY_AUTH_MODE"] == "token"
        tokens.add(variables["RAY_AUTH_TOKEN"])
    assert len(tokens) == 2
    assert all(len(token) == 64 for token in tokens)


def test_who_turns_tokens_off_has_none(variables):
    variables["RAY_AUTH_MODE"] = "disabled"
    prepare("local")
    assert variables["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in variables


def test_how_another_cluster_is_guarded_is_left_to_its_operator(variables):
    prepare("auto")
    assert not any(name.startswith("RAY_AUTH") for name in variables)
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in variables


@pytest.mark.parametrize(
    ("nodes", "resources", "expected"),
    [
        # Two trials of .4 share a GPU; the rest of it is nobody's.
        ([{"CPU": 16, "GPU": 3}], {"cpu": 1, "gpu": 0.4}, 6),
        ([{"CPU": 16, "GPU": 1}, {"CPU": 16, "GPU": 2}], {"cpu": 1, "gpu": 0.4}, 6),
        ([{"CPU": 16, "GPU": 3}], {"cpu": 1, "gpu": 0.3333}, 9),
        ([{"CPU": 16, "GPU": 1}], {"cpu": 1, "gpu": 0.1}, 10),
        # A trial of two GPUs needs them on one node.
        ([{"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 3}], {"cpu": 1, "gpu": 2.0}, 2),
        ([{"CPU": 2, "GPU": 8}], {"cpu": 1, "gpu": 1.0}, 2),
        # A head without processors draws nothing, and what has no GPU neither.
        ([{"GPU": 1}, {"CPU": 4, "GPU": 1}, {"CPU": 64}], {"cpu": 1, "gpu": 1.0}, 1),
        ([{"CPU": 3}, {"CPU": 3}], {"cpu": 2}, 2),
        ([{}], {"cpu": 1}, 1),
    ],
)
def test_workers_are_counted_by_node_and_gpu(monkeypatch, nodes, resources, expected):
    found = [{"Alive": True, "Resources": node} for node in nodes]
    found.append({"Alive": False, "Resources": {"CPU": 99, "GPU": 99}})
    monkeypatch.setattr("ray.nodes", lambda: found)

    assert num_workers(resources) == expected
