"""What a person sees of a search: a live view in a terminal, plain lines elsewhere."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pyte
import pytest
from rich.console import Console

from search.progress import Progress, Standing
from tests.search.landscapes import make_search, work
from tests.search.live_view import HEIGHT, resized

ROOT = Path(__file__).parents[2]
WIDTHS = ("80", "60", "40", "80-50")


def follow(search, console=None, **arguments):
    """Show a search to its end; return what was printed."""
    console = console or Console(file=io.StringIO(), width=200)
    progress = Progress(console, **arguments)
    progress.begin(search)
    search.on_evaluation = lambda _: progress.evaluation(search)
    work(search, num_workers=2)
    progress.close()
    return console.file.getvalue()


# --- a terminal ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screens():
    """What a terminal shows in the end, line by line, and of each width that it had."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    environment = {k: v for k, v in environment.items() if k not in {"COLUMNS", "LINES"}}
    command = (sys.executable, "-m", "tests.search.live_view", *WIDTHS)
    written = b""
    with subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment
    ):
        os.close(follower)
        while chunk := _read(leader):
            written += chunk
    os.close(leader)
    shown, screen = {}, None
    pieces = re.split(resized(r"(\d+)").replace("]", r"\]", 1), written.decode())
    sessions = iter(zip(pieces[1::2], pieces[2::2], strict=True))
    for session in WIDTHS:
        screen = pyte.HistoryScreen(80, HEIGHT)
        for width in session.split("-"):
            given, piece = next(sessions)
            assert given == width
            screen.resize(HEIGHT, int(width))
            pyte.Stream(screen).feed(piece)
        assert not screen.history.top  # Nothing was pushed off the screen by being drawn again.
        shown[session] = [line.rstrip() for line in screen.display]
    return shown


def _read(leader):
    try:
        return os.read(leader, 65536)
    except OSError:  # Its last process has ended.
        return b""


@pytest.mark.parametrize("width", ["80", "60"])
def test_a_terminal_ends_with_one_whole_view(screens, width):
    lines = [line for line in screens[width] if line]
    names = [line[:12].strip() for line in lines]

    assert names == [
        "WARNING: a n",
        *("evaluations", "best", "difference", "", "workers", "annealing", "failed", "time"),
        *("money", "against dens"),
    ]
    view = dict(zip(names, (line[12:] for line in lines), strict=True))
    assert re.fullmatch("━+ 26/26", view["evaluations"])
    assert re.fullmatch(r"0\.\d{3} at [\d./ ]+, dense -?0\.\d{3}", view["best"])
    assert re.fullmatch(
        r"\+[\d.]+, 95% interval \[\+[\d.]+, \+[\d.]+\], on the", view["difference"]
    )
    assert view[""] == "search prompts, which flatter the best"
    assert re.fullmatch(r"0 of 3 at work, \d+ pictures, \d+\S*/s", view["workers"])
    assert re.fullmatch(
        r"temperature [\d.]+, last (accept|reject|fail), \d+/19 accepted", view["annealing"]
    )
    assert re.fullmatch(r"\d\.\d\d so far", view["money"])
    # Neither markup nor an escape sequence.
    assert view["failed"].startswith("1, the last: NaN?[2J pictures [bold] and so on")
    assert view["failed"].endswith("…")


def test_a_warning_goes_above_the_view(screens):
    for lines in screens.values():
        assert lines[0].startswith("WARNING: a node was lost; its batch is")
        assert sum("evaluations" in line for line in lines) == 1


def test_no_line_is_wider_than_the_terminal(screens):
    for width, lines in screens.items():
        assert max(map(len, lines)) <= int(width.split("-")[0])
    assert screens["40"][2].startswith("evaluations")


def test_a_terminal_made_narrower_keeps_one_view(screens):
    lines = [line for line in screens["80-50"] if line]

    assert [line[:12].strip() for line in lines].count("money") == 1
    assert lines[-1].startswith("against dense")
    assert max(map(len, lines)) <= 50


# --- elsewhere -------------------------------------------------------------------------------


def test_elsewhere_there_are_plain_lines(tmp_path):
    written = follow(make_search(tmp_path))
    lines = written.splitlines()

    assert "\x1b" not in written
    assert lines[0] == "0/26 evaluations, loading the model"
    assert re.fullmatch(
        r"26/26 evaluations, best 0\.\d+ at [\d./ ]+, dense -?0\.\d+, 0 s left", lines[-1]
    )


def test_a_dumb_terminal_gets_plain_lines(tmp_path):
    console = Console(
        file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"}, width=200
    )
    assert "26/26 evaluations" in follow(make_search(tmp_path), console)


@pytest.mark.parametrize(
    ("steps", "arguments", "total"),
    [
        (20, {}, 26),
        (2, {}, 1 + 2 + 2 + 2),
        (1, {}, 1 + 1 + 2),
        (5, {"rerank_top": 1}, 1 + 5 + 2),
        (5, {"rerank_top": 9}, 1 + 5 + 5 + 2),
        (6, {"searcher": "random"}, 1 + 6 + 3 + 2),
        (20, {"budget": {"pictures": 90}}, None),
    ],
)
def test_the_count_ends_where_it_said(tmp_path, steps, arguments, total):
    search = make_search(tmp_path, steps=steps, **arguments)
    counted = []
    search.on_evaluation = lambda _: counted.append((*search.progress, search.num_coming))
    num_trials = work(search, num_workers=3)
    done, last_total, coming = counted[-1]

    assert num_trials
    assert done == last_total == (total or last_total)
    assert coming == 0
    assert all(done <= total for done, total, _ in counted)
    # What is compared again is known before the first of it is done.
    reranking = [total for _, total, _ in counted[-4:]]
    assert len(set(reranking)) == 1


def test_what_is_to_come_is_what_will_be_drawn(tmp_path):
    search = make_search(tmp_path, searcher="random", steps=20)
    coming = []
    search.on_evaluation = lambda _: coming.append(search.num_coming + search.num_drawn)
    work(search)

    assert set(coming) == {search.num_drawn}


def test_money_is_spent_by_the_hour_of_drawing(tmp_path):
    search = make_search(tmp_path, batch_size=1)
    work(search)
    standing = Standing.of(search)

    assert standing.gpu_hours == pytest.approx(search.num_drawn / 3600)
    assert standing.gpu_hours_left == 0
    assert standing.comparison is not None
    assert standing.comparison.num_prompts == 7
