import os

import pytest

from search.cluster import prepare_environment
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
