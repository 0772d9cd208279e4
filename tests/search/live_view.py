"""Searches of analytic rewards, shown on this terminal: `python -m tests.search.live_view 80 60`.

arguments: widths of the terminal, in columns; 80-60 is made narrower in the middle of a search.
"""

import fcntl
import logging
import struct
import sys
import tempfile
import termios
import time

from rich.console import Console

from search.logs import to_console
from search.progress import Progress
from tests.search.landscapes import make_search, measure, work

HEIGHT = 24
_SECONDS_EACH = 0.005
_FAILURE = "NaN\x1b[2J pictures [bold]" + 40 * " and so on"


def resized(width):
    """What tells the emulator from where on the terminal has another width."""
    return f"\x1b]width {width}\x07"


def _resize(width):
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, width, 0, 0))
    print(resized(width), end="", file=sys.__stdout__, flush=True)


def show(folder, first_width, last_width):
    _resize(first_width)
    search = make_search(folder)
    search.max_trials = 3
    console = Console(highlight=False, soft_wrap=True)
    progress = Progress(console, gpu_hour_price=36.0)
    search.on_evaluation = lambda _: progress.evaluation(search)
    num_trials = 0

    def draw(ratios, prompts):
        nonlocal num_trials
        num_trials += 1
        if num_trials == 20:
            logging.getLogger("search.here").warning("a node was lost; its batch is drawn again")
        if num_trials == 22 and last_width != first_width:
            _resize(last_width)
        if num_trials == 30:
            return {"failure": _FAILURE, "transient": False}
        time.sleep(_SECONDS_EACH * len(prompts))
        return {"measured": measure(ratios, prompts)}

    progress.begin(search)
    work(search, num_workers=3, outcome=draw)
    progress.close()
    console.print("against dense   what follows stands below")


if __name__ == "__main__":
    to_console(is_verbose=False)
    for argument in sys.argv[1:]:
        first, _, last = argument.partition("-")
        with tempfile.TemporaryDirectory() as folder:
            show(folder, int(first), int(last or first))
