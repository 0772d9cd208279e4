"""Servers that tests start: where they may listen, and how they end."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


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


def stop(leader):
    """End a process that we started in a session of its own, then whatever is left of it."""
    leader.terminate()
    try:
        leader.wait(timeout=40)
    except subprocess.TimeoutExpired:
        leader.kill()
        leader.wait()
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 10
        for pid in members(leader.pid):
            os.kill(pid, number)
        while members(leader.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not members(leader.pid)
