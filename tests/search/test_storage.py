import os
import stat
import time

import pytest

from search.storage import Storage, StorageError


@pytest.fixture
def storage(place):
    storage = Storage.at(place)
    storage.make()
    return storage


def test_what_is_written_is_read_and_replaced(storage):
    assert storage.read("a.json") is None
    storage.write("a.json", b"first")
    storage.write("a.json", b"second")

    assert storage.read("a.json") == b"second"
    assert list(storage.files()) == ["a.json"]


def test_files_know_when_they_were_written(storage):
    storage.write("a.json", b"")

    assert storage.files()["a.json"] == pytest.approx(time.time(), abs=60)


def test_a_file_moves_to_another_folder(storage):
    storage.write("a.json", b"it")
    earlier = storage / "earlier"
    earlier.make()
    storage.move("a.json", earlier)

    assert storage.files() == {}
    assert earlier.read("a.json") == b"it"
    assert (earlier.name, earlier.parent) == ("earlier", storage)


def test_what_is_deleted_is_gone_and_may_be_gone_already(storage):
    storage.write("a.json", b"")
    storage.delete("a.json")
    storage.delete("a.json")

    assert storage.files() == {}


def test_a_folder_that_is_not_there_has_no_files(place):
    assert (Storage.at(place) / "nowhere").files() == {}


def test_folders_are_those_in_it_by_name(storage):
    for name in ("b", "a"):
        (storage / name).make()
        (storage / name).write("file", b"")
    storage.write("file", b"")

    assert storage.folders() == [storage / "a", storage / "b"]
    assert (storage / "not there").folders() == []


def test_a_place_is_found_again_by_its_text(storage):
    storage.write("a.json", b"it")

    assert Storage.at(str(storage)).read("a.json") == b"it"


def test_only_a_folder_of_this_machine_has_a_path(tmp_path, s3):
    assert Storage.at(tmp_path).local == tmp_path
    assert Storage.at(s3).local is None


def test_drafts_of_a_writer_that_died_do_not_count(tmp_path):
    (tmp_path / ".a.json.1234").write_bytes(b"half")

    assert Storage.at(tmp_path).files() == {}


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    storage = Storage.at(tmp_path)
    storage.write("a.json", b"first")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"a\.json: No space left on device: free space there"):
        storage.write("a.json", b"second")
    monkeypatch.undo()

    assert storage.read("a.json") == b"first"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_is_on_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    storage, synced = Storage.at(tmp_path), []

    def note(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(("folder" if is_folder else "file", "a.json" in os.listdir(tmp_path)))

    monkeypatch.setattr("os.fsync", note)
    storage.write("a.json", b"first")

    assert synced == [("file", False), ("folder", True)]


@pytest.mark.parametrize("secret", ["s3://key:secret@bucket/x", "s3://bucket/x?secret_key=secret"])
def test_credentials_in_a_place_are_refused_and_not_repeated(secret):
    with pytest.raises(StorageError, match="credentials do not belong") as refused:
        Storage.at(secret)
    assert ":secret" not in str(refused.value)
    assert "=secret" not in str(refused.value)


@pytest.mark.parametrize("place", ["nope://bucket/x", "s3://", "s3://bucket/x?nope=1"])
def test_a_place_that_nobody_understands_is_one_line(place):
    with pytest.raises(StorageError, match=r"^[^\n]*give a path or s3://"):
        Storage.at(place)


def test_a_bucket_that_is_not_there_is_one_line(s3):
    nowhere = Storage.at(s3.replace("bucket", "nobucket"))

    for attempt in (nowhere.make, lambda: nowhere.write("a", b"")):
        with pytest.raises(StorageError, match=r"^s3://nobucket[^\n]*set output to"):
            attempt()
