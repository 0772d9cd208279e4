import json
import logging
import warnings

import pytest

from search import logs
from search.logs import LOG_FILE, take_over, to_console, to_file
from search.storage import Storage, StorageError

OURS, THEIRS = logging.getLogger("search.driver"), logging.getLogger("others.package")


@pytest.fixture(autouse=True)
def root():
    """The root logger without the handlers of other tests, and as it was before in the end."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers.clear()
    yield root
    root.handlers[:], root.level = before
    logging.captureWarnings(False)


def say_all():
    for logger in (OURS, THEIRS):
        logger.info("an info of %s", logger.name)
        logger.warning("a warning of %s", logger.name)


def test_the_console_shows_warnings_of_ours_alone(capsys):
    to_console(is_verbose=False)
    say_all()

    assert capsys.readouterr().err == "WARNING: a warning of search.driver\n"


def test_verbose_shows_everything(capsys):
    to_console(is_verbose=True)
    say_all()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("of python's", stacklevel=1)

    shown = capsys.readouterr().err
    assert all(f"an info of {name}" in shown for name in ("search.driver", "others.package"))
    assert "of python's" in shown


def read(folder):
    return [json.loads(line) for line in folder.read(LOG_FILE).decode().splitlines()]


def test_the_file_has_a_line_of_json_for_each_record_of_every_session(place):
    folder = Storage.at(place)
    folder.make()
    to_console(is_verbose=False)
    for session in (1, 2):
        with to_file(folder):
            OURS.info("session", extra={"number": session, "reward": 0.5})
            THEIRS.warning("two\nlines")
    OURS.info("after it")
    lines = read(folder)

    assert [line["message"] for line in lines] == ["session", "two\nlines"] * 2
    assert lines[2] == {
        "at": lines[2]["at"],
        "level": "INFO",
        "logger": "search.driver",
        "message": "session",
        "number": 2,
        "reward": 0.5,
    }
    assert lines[0]["at"] <= lines[2]["at"]


def test_an_exception_is_in_the_file_with_its_traceback(tmp_path):
    with to_file(Storage.at(tmp_path)):
        try:
            raise ValueError("of ours")
        except ValueError:
            OURS.exception("it failed")
    (line,) = read(Storage.at(tmp_path))

    assert line["traceback"].endswith("ValueError: of ours")


def test_an_object_store_has_the_log_before_the_end(s3, monkeypatch):
    monkeypatch.setattr(logs, "_FLUSH_INTERVAL_S", 0)
    folder = Storage.at(s3)
    with to_file(folder):
        OURS.warning("so far")
        assert [line["message"] for line in read(folder)] == ["so far"]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, s3, monkeypatch, capsys):
    monkeypatch.setattr(logs, "_FLUSH_INTERVAL_S", 0)

    def broken(*_):
        raise StorageError("gone")

    far = Storage.at(s3)
    monkeypatch.setattr(Storage, "write", broken)
    for folder in (Storage.at(tmp_path / "not there"), far):
        with to_file(folder):
            OURS.warning("unheard")

    assert capsys.readouterr().err == ""


def test_packages_that_print_for_themselves_do_so_no_more(capsys):
    to_console(is_verbose=False)
    loud = logging.getLogger("optuna")
    loud.addHandler(logging.StreamHandler())
    loud.propagate = False
    take_over()
    loud.error("loud")

    assert capsys.readouterr().err == ""
