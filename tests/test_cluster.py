"""cluster/: the files that start clusters are held to the validators of what reads them."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

FILES = Path(__file__).parents[1] / "cluster"
AWS = yaml.safe_load((FILES / "ray-up-aws.yaml").read_text(encoding="utf-8"))


def validate(cluster):
    validate_config(prepare_config(deepcopy(cluster)))
    for name, node_type in cluster["available_node_types"].items():
        lowest, highest = node_type.get("min_workers", 0), node_type.get("max_workers", 0)
        if lowest > highest:  # Ray looks at the sum over all types only.
            raise ValueError(f"{name}: min_workers {lowest} > max_workers {highest}")


def changed(path, value):
    cluster = deepcopy(AWS)
    *parents, last = path.split(".")
    part = cluster
    for parent in parents:
        part = part[parent]
    part[last] = value
    return cluster


def test_rays_validator_accepts_the_file():
    validate(AWS)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("head_node_type", "haed", "head_node_type"),
        ("available_node_types.gpu.resources.GPU", "one", "is not of type"),
        ("available_node_types.gpu.min_workers", 9, "max_workers"),
        ("available_node_types.gpu.max_workers", 0, "min_workers 1 > max_workers 0"),
        ("max_wrokers", 3, "Additional properties"),
        ("idle_timeout_minutes", -1, "minimum"),
    ],
)
def test_a_mistake_in_the_file_is_caught(path, value, message):
    with pytest.raises((ValueError, ValidationError), match=message):
        validate(changed(path, value))


def test_the_head_takes_no_trial_and_has_no_gpu():
    head = AWS["available_node_types"][AWS["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    (start,) = (line for line in AWS["head_start_ray_commands"] if "ray start" in line)
    assert "--num-gpus=0" in start


def test_workers_are_spot_machines_with_gpus_that_are_given_back():
    gpu = AWS["available_node_types"]["gpu"]
    assert gpu["resources"]["GPU"] >= 1
    assert gpu["max_workers"] <= AWS["max_workers"]
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert 0 < AWS["idle_timeout_minutes"] <= 30


def test_every_node_asks_for_the_token_and_keeps_its_file_private():
    assert "--env RAY_AUTH_MODE=token" in AWS["docker"]["run_options"]
    (token,) = (path for path in AWS["file_mounts"] if path.endswith(".ray/auth_token"))
    assert "chmod 600 ~/.ray/auth_token" in AWS["setup_commands"]
    assert token == "/home/ray/.ray/auth_token"


def test_the_dashboard_listens_on_loopback():
    (start,) = (line for line in AWS["head_start_ray_commands"] if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in start


def test_nodes_run_the_python_and_ray_that_the_package_asks_for():
    project = (FILES.parent / "pyproject.toml").read_text(encoding="utf-8")
    lowest, bound = re.search(r"ray\[tune\]>=([\d.]+),<([\d.]+)", project).groups()
    (install,) = (line for line in AWS["setup_commands"] if "pip install" in line)
    assert f"ray[default]>={lowest},<{bound}" in install
    assert "--editable ~/crdiff-search" in install
    assert AWS["file_mounts"]["/home/ray/crdiff-search"] == "."
    assert AWS["docker"]["image"].startswith(f"rayproject/ray:{lowest}")
    assert 'requires-python = ">=3.11"' in project
    assert "-py311-" in AWS["docker"]["image"]


@pytest.mark.parametrize("file", sorted(FILES.iterdir()), ids=lambda file: file.name)
def test_files_hold_no_secret_no_host_and_no_path_of_ours(file):
    text = file.read_text(encoding="utf-8")
    for kind, pattern in {
        "address": r"\b(?!127\.0\.0\.1)\d+\.\d+\.\d+\.\d+\b",
        "secret": r"AKIA|[0-9a-fA-F]{32}|PRIVATE KEY|(?i:password)\s*[=:]\s*['\"]?\w|hf_\w{8}",
        "account's id": r"\bami-[0-9a-f]{8}|\bsubnet-|\bsg-[0-9a-f]|arn:",
        "path of ours": r"/(work|root|tmp|Users|home/(?!ray/))",
    }.items():
        assert not re.search(pattern, text), kind
