import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from search.lease import Lease, LeaseError
from search.storage import Storage

FILE = "driver.json"


@pytest.fixture
def storage(place):
    storage = Storage.at(place)
    storage.make()
    return storage


def left_by(storage, **changed):
    """The lease of this process, with something else in it, as if its driver had died."""
    with Lease(storage):
        raw = json.loads(storage.read(FILE))
    storage.write(FILE, json.dumps(raw | {"id": "another"} | changed).encode())


def test_a_second_driver_is_refused_until_the_first_has_ended(storage):
    with Lease(storage):
        with pytest.raises(LeaseError, match=r"^another driver works on this search \(process"):
            Lease(storage).__enter__()
    with Lease(storage):
        pass

    assert storage.files() == {}


def test_a_driver_that_was_killed_on_this_machine_is_replaced_at_once(tmp_path):
    storage = Storage.at(tmp_path)
    code = (
        "import sys, time; from search.lease import Lease; from search.storage import Storage\n"
        "Lease(Storage.at(sys.argv[1])).__enter__(); print('taken', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"taken\n"
        with pytest.raises(LeaseError, match=f"process {other.pid} on"):
            Lease(storage).__enter__()
        other.kill()
    assert FILE in storage.files()
    with Lease(storage):
        pass


def test_another_process_of_the_same_number_is_not_the_driver(tmp_path):
    storage = Storage.at(tmp_path)
    left_by(storage, began=psutil.Process().create_time() - 100)

    with Lease(storage):
        assert json.loads(storage.read(FILE))["id"] != "another"


def test_a_driver_on_another_machine_counts_until_it_is_silent_for_long(storage):
    left_by(storage, place="elsewhere", host="elsewhere")
    with pytest.raises(LeaseError, match="on elsewhere"):
        Lease(storage, lapse_s=60).__enter__()
    time.sleep(2.1)  # Object stores keep whole seconds.
    with Lease(storage, lapse_s=1):
        pass


def test_a_lease_is_kept_young(tmp_path):
    storage = Storage.at(tmp_path)
    with Lease(storage, beat_s=0.02):
        first = storage.files()[FILE]
        deadline = time.monotonic() + 20
        while storage.files()[FILE] == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert storage.files()[FILE] > first


def test_a_driver_that_was_taken_for_dead_is_told(tmp_path):
    storage, told = Storage.at(tmp_path), []
    with Lease(storage, beat_s=0.02) as lease:
        lease.on_lost = told.append
        raw = json.loads(storage.read(FILE))
        # Again until it has looked: it may have been about to write.
        deadline = time.monotonic() + 20
        while not told and time.monotonic() < deadline:
            storage.write(FILE, json.dumps(raw | {"id": "another"}).encode())
            time.sleep(0.05)
    assert told[0].startswith("another driver works on this search")
    assert FILE in storage.files()  # The other's.


def test_a_torn_lease_keeps_nobody_off(storage):
    storage.write(FILE, b'{"id": "tor')

    with Lease(storage):
        assert json.loads(storage.read(FILE))["process"] == os.getpid()
