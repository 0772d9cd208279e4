"""The Ray cluster a search runs on: one of its own, or one that is there already."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from search.config import ClusterSettings, ConfigError

LOCAL = "local"


def prepare_environment(settings: ClusterSettings) -> None:
    """Set what Ray reads from the environment; call it before anything imports Ray.

    A cluster of our own listens on loopback alone and is closed by a random token;
    RAY_AUTH_MODE=disabled leaves the token out.
    """
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

    Raises ConfigError if it cannot be reached, refuses us, or has no GPU where one is asked for.
    """
    import ray

    local = settings.address == LOCAL
    if not local:
        _check_reachable(settings.address)
    try:
        ray.init(
            address=settings.address,
            include_dashboard=False if local else None,
            logging_level=logging.ERROR,
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

    total = ray.cluster_resources()
    names = {"cpu": "CPU", "gpu": "GPU"}
    return max(1, int(min(total.get(names[kind], 0) / n for kind, n in resources.items())))


def start_at_once(num_trials: int) -> None:
    """Let Ray Tune start so many trials side by side; else they would start one after the other.

    And then hardly any would: see search.trial.RatioTrial.
    """
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(num_trials)


def _unreachable(address: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:300]
    if address == LOCAL:
        return ConfigError(f"Ray does not start: {reason}: see /tmp/ray/session_latest/logs")
    return ConfigError(
        f"no Ray cluster at cluster.address={address}: {reason}: start one, or use cluster=local"
    )


def _check_reachable(address: str) -> None:
    """Raise ConfigError at once for what ray.init would report after half a minute of log lines.

    Where a token is asked for and there is none, ray.init would even abort the process. No
    public function of Ray asks first; ray is pinned to one minor version for this.
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
        if address == "auto":
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        with _silent_stderr():
            GcsClient(address=head)
    except AuthenticationError as error:
        raise ConfigError(
            f"cluster.address={address}: the Ray token is missing or not this cluster's: set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
        ) from error
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise _unreachable(address, error) from error


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
