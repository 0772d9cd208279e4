"""Completion of settings in bash: `eval "$(python -m search.completion bash)"`."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra

from search.run import CONF

_OPTIONS = ("--help", "-m", "-v")
# The part of a command line that is ours.
_OURS = re.compile(r"(?:^|\s)(?:(?:\S*/)?crdiff-search|-m\s+search\.run)\s+(.*)", re.DOTALL)
# Nothing else is looked at: no path, nothing that is quoted or interpolated.
_SETTING = re.compile(r"(?!hydra\b)[a-z]\w*(\.\w+)*=[\w.+-]*")
_BEGUN = re.compile(r"(?!hydra\b)([a-z][\w.]*(=[\w.+-]*)?)?")
_FOUND = re.compile(r"(?!hydra\b)[\w.]+[=.][\w.+:-]*")

# What is asked runs isolated from the folder that one happens to be in (-P): who presses TAB does
# not mean to run what lies there. In front of python's own completion, where there is one.
_BASH = """\
_crdiff_search() {
    local line=${COMP_LINE:0:COMP_POINT} IFS=$'\\n'
    local word=${line##*[[:space:]]}
    COMPREPLY=($(PYTHONPATH=@ROOT @PYTHON -P -m search.completion query "$line" 2>/dev/null))
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace 2>/dev/null
    # Of a word bash replaces what follows the last = alone.
    if [[ $COMP_WORDBREAKS == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
    fi
}
_crdiff_search_python() {
    if [[ ${COMP_LINE:0:COMP_POINT} =~ [[:space:]]-m[[:space:]]+search\\.run[[:space:]] ]]; then
        _crdiff_search
    elif [[ -n $_crdiff_search_before ]]; then
        "$_crdiff_search_before" "$@"
    fi
}
declare -F _completion_loader >/dev/null && _completion_loader python
if [[ $(complete -p python 2>/dev/null) =~ -F[[:space:]]+([^[:space:]]+) ]] &&
    [[ ${BASH_REMATCH[1]} != _crdiff_search_python ]]; then
    _crdiff_search_before=${BASH_REMATCH[1]}
fi
complete -o default -F _crdiff_search crdiff-search
complete -o default -F _crdiff_search_python python python3
"""


def script() -> str:
    """Return what bash is to evaluate."""
    root = str(Path(__file__).parents[1])
    return _BASH.replace("@ROOT", shlex.quote(root)).replace(
        "@PYTHON", shlex.quote(sys.executable)
    )


def candidates(line: str) -> list[str]:
    """Return the words that a command line's last one may become; runs and reads nothing else.

    line: up to the cursor, of `python -m search.run` or `crdiff-search`.
    """
    ours = _OURS.search(line)
    if ours is None:
        return []
    *given, word = re.split(r"\s+", ours[1]) or [""]
    if word.startswith("-"):
        return [option for option in _OPTIONS if option.startswith(word)]
    if not _BEGUN.fullmatch(word):
        return []
    settings = [each for each in given if _SETTING.fullmatch(each)]
    found = _asked(settings, word) or _asked([], word)  # Of settings that do not compose: none.
    return [each for each in found if _FOUND.fullmatch(each) and each.startswith(word)]


def _asked(settings: Sequence[str], word: str) -> list[str]:
    """Ask Hydra, which is to be asked by command line and environment."""
    sys.argv = ["crdiff-search", "-sc", "query=bash"]
    os.environ["COMP_LINE"] = " ".join(["crdiff-search", *settings, word])
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ask = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    answer = io.StringIO()
    # It raises anything of words that are only begun.
    with contextlib.redirect_stdout(answer), contextlib.suppress(Exception):
        ask(lambda _: None)()
    return answer.getvalue().split()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what completes the settings of python -m search.run, and of crdiff-search, in bash.

    Evaluate it in the shell, or in ~/.bashrc.
    """
    parser = argparse.ArgumentParser(prog="python -m search.completion", description=main.__doc__)
    parser.add_argument("shell", choices=["bash", "query"], help="query: asked by bash itself")
    parser.add_argument("line", nargs="?", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.shell == "bash":
        print(script(), end="")
    else:
        print("\n".join(candidates(options.line)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
