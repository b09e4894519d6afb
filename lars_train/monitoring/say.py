"""Lines for the person who started the program: of several processes, the first one speaks.

Whatever the text holds, a terminal shows it and does nothing else with it. A reader who goes away (``| head``, a
terminal that is closed) ends no run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from lars_train.text import printable_lines

_COLOURS = {"red": 31, "yellow": 33}


def first_process() -> bool:
    """Whether this is the process that speaks, as far as the launcher's environment tells."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def say(text: str) -> None:
    """Print `text` once over all processes."""
    if first_process():
        with unread():
            print(printable_lines(text), flush=True)


def complain(text: str) -> None:
    """Print `text` to stderr once on each machine: what is wrong may be wrong on one of them only."""
    if first_process() or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        with unread():
            print(f"{paint('lars-train:', 'red', sys.stderr)} {printable_lines(text)}", file=sys.stderr, flush=True)


def paint(text: str, colour: str, stream: TextIO) -> str:
    """`text` in ``red`` or ``yellow`` where `stream` is a terminal that has colours and nobody asked for none.

    NO_COLOR: https://no-color.org.
    """
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


@contextmanager
def unread() -> Iterator[None]:
    """What is printed within it may be lost: to a pipe or terminal that is gone nothing is printed any more."""
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_standard_streams() -> None:
    """Open what a caller has closed of the standard streams (``>&-``) to nowhere.

    Otherwise the next file that is opened takes its place, and gets what was meant for the terminal.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is the one that is taken.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
