"""The Ray cluster a search runs on: one of its own, or one that is there already."""

from __future__ import annotations

import os
import secrets
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from crdiff_core.models import Model
from crdiff_core.numerics import make_reproducible
from search.config import ClusterSettings, ConfigError
from search.logs import take_over

LOCAL = "local"


def prepare_environment(settings: ClusterSettings) -> None:
    """Set what Ray and MKL read from the environment; call it before anything imports Ray.

    A cluster of our own listens on loopback alone and is closed by a random token;
    RAY_AUTH_MODE=disabled leaves the token out.
    """
    make_reproducible()
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if settings.address == LOCAL:
        # Linux as Ray has Windows and macOS by default; _node_ip_address takes no loopback.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Without one of ours Ray would make ~/.ray/auth_token, for everyone to read.
        if os.environ.setdefault("RAY_AUTH_MODE", "token").lower() == "token":
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def connect(settings: ClusterSettings) -> Iterator[dict[str, float]]:
    """Join or start the cluster, and leave it in the end; yields what one trial takes of it.

    Raises ConfigError if it cannot be reached, refuses us, is open to everyone and more than
    this machine, or has no GPU where one is asked for.
    """
    import ray

    take_over()
    # It would print the raylets' reports, whatever log_to_driver says; Tune logs what they mean.
    ray._private.worker._worker_logs_enabled = False
    local = settings.address == LOCAL
    if not local:
        _check_joinable(settings.address)
    _withhold_credentials()
    try:
        ray.init(
            address=settings.address,
            include_dashboard=False if local else None,
            configure_logging=False,
            log_to_driver=False,
        )
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise _unreachable(settings.address, error) from error
    try:
        num_gpus = ray.cluster_resources().get("GPU", 0)
        if settings.device == "cuda" and not num_gpus:
            raise ConfigError("the cluster has no GPU: set cluster.device=auto or cpu")
        resources = {"cpu": float(settings.cpus_per_trial)}
        if num_gpus and settings.device != "cpu":
            resources["gpu"] = settings.gpus_per_trial
        yield resources
    finally:
        ray.shutdown()


def num_workers(resources: dict[str, float]) -> int:
    """Return how many trials the connected cluster runs at once, each taking `resources`."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max(1, sum(_num_workers_of(node, resources) for node in nodes))


def _num_workers_of(node: dict[str, float], resources: dict[str, float]) -> int:
    """Return how many trials run on one node: none takes parts of two nodes, or of two GPUs."""
    count = int(node.get("CPU", 0) // resources["cpu"])
    share = resources.get("gpu")
    if share is None:
        return count
    num_gpus = int(node.get("GPU", 0))
    # Ray counts in ten-thousandths.
    of_gpus = num_gpus * (10_000 // round(share * 10_000)) if share < 1 else num_gpus // share
    return min(count, int(of_gpus))


def check_device(resources: dict[str, float], settings: ClusterSettings, model: Model) -> str:
    """Return the device that trials run on, cuda or cpu.

    Raises ConfigError for half precision on a CPU that nobody has asked for.
    """
    if "gpu" in resources:
        return "cuda"
    if settings.device == "auto" and model.dtype == "float16":
        raise ConfigError(
            f"the cluster has no GPU and {model.name} is in float16, in which a CPU takes hours "
            "for a picture: start a GPU node first, or set cluster.device=cpu if you mean it"
        )
    return "cpu"


def start_at_once(num_trials: int) -> None:
    """Let Ray Tune start so many trials side by side; else they would start one after the other.

    And then hardly any would: see search.trial.RatioTrial.
    """
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(num_trials)


def _withhold_credentials() -> None:
    """Keep Ray Tune from handing the driver's AWS credentials to trials, which need none.

    It would do so by their runtime environment, which Ray logs on every node for all to read.
    """
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.difference_update(
        [name for name in ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]
    )


def _unreachable(address: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:300]
    if address == LOCAL:
        return ConfigError(f"Ray does not start: {reason}: see /tmp/ray/session_latest/logs")
    return ConfigError(
        f"no Ray cluster at cluster.address={address}: {reason}: start one, or use cluster=local"
    )


def _check_joinable(address: str) -> None:
    """Raise ConfigError at once for what ray.init would report late, or not at all.

    Late is half a minute of log lines, and where a token is asked for and there is none,
    ray.init would abort the process. No public function of Ray asks first; ray is pinned to one
    minor version for this.
    """
    from ray._private.authentication.authentication_token_setup import (
        ensure_token_if_auth_enabled,
        maybe_enable_token_auth_if_token_available,
    )
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RayError

    try:
        head = canonicalize_bootstrap_address(address)
        host, _, port = head.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        _check_closed(address, _seen_without_token(head))
        if address == "auto":
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        _check_token_file()
        with _silent_stderr():
            GcsClient(address=head)
    except ConfigError:
        raise
    except AuthenticationError as error:
        raise ConfigError(
            f"cluster.address={address}: the Ray token is missing or not this cluster's: set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
        ) from error
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise _unreachable(address, error) from error


def _seen_without_token(head: str) -> set[str]:
    """Return the addresses of the nodes that a stranger finds; none if they are shut out."""
    from ray._raylet import Config, GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    mode = os.environ.get("RAY_AUTH_MODE")
    try:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        Config.initialize("")  # Ray's C++ side then reads the environment again.
        with _silent_stderr():
            nodes = GcsClient(address=head).get_all_node_info().values()
    except AuthenticationError:
        return set()
    finally:
        del os.environ["RAY_AUTH_MODE"]
        if mode is not None:
            os.environ["RAY_AUTH_MODE"] = mode
        Config.initialize("")
    return {node.node_manager_address for node in nodes}


def _check_closed(address: str, exposed: set[str]) -> None:
    """Raise ConfigError where everyone may use a cluster of more than this machine.

    Ray joins it without a word, and hands it our token if we have one.
    exposed: the nodes that a stranger finds.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return  # Somebody has decided so.
    ours = {each.address for card in psutil.net_if_addrs().values() for each in card}
    if others := sorted(exposed - ours):
        raise ConfigError(
            f"cluster.address={address}: whoever reaches it can run code on {others[0]}, as it "
            "asks for no token: start Ray with RAY_AUTH_MODE=token on every node, or set "
            "RAY_AUTH_MODE=disabled here if only you can reach it"
        )


def _check_token_file() -> None:
    """Raise ConfigError if others may read the token that Ray is about to read."""
    from ray._raylet import (  # type: ignore[attr-defined]
        AuthenticationMode,
        get_authentication_mode,
    )

    if get_authentication_mode() != AuthenticationMode.TOKEN or os.environ.get("RAY_AUTH_TOKEN"):
        return
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(given) if given else Path.home() / ".ray/auth_token"
    if file.stat().st_mode & 0o077:
        raise ConfigError(
            f"{file}: others on this machine may read the Ray token, with which one can run "
            f"code on the cluster: chmod 600 {shlex.quote(str(file))}"
        )


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what Ray's C++ side writes; it heeds neither logging nor RAY_BACKEND_LOG_LEVEL."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
