"""Print to a terminal: rank 0 speaks, text from elsewhere is made safe, and figures are rounded for people.

A terminal shows the text and acts on nothing in it. A reader that goes away (``| head``, a closed terminal) ends no
run.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

_COLOURS = {"red": 31, "yellow": 33}
_COLUMNS = 80
_NAME = "lars-train:"


def is_rank0() -> bool:
    """Whether this is the process that speaks, as far as the launcher's environment tells."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def say(text: str) -> None:
    """Print `text` once over all processes."""
    if is_rank0():
        with ignore_closed_output():
            print(f"{_fresh_line(sys.stdout)}{wrap_text(printable_lines(text), sys.stdout)}", flush=True)


def complain(text: str) -> None:
    """Print `text` to stderr once on each machine: what is wrong may be wrong on one of them only."""
    if is_rank0() or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        with ignore_closed_output():
            line = wrap_text(f"{_NAME} {printable_lines(text)}", sys.stderr).removeprefix(_NAME)
            print(f"{_fresh_line(sys.stderr)}{paint(_NAME, 'red', sys.stderr)}{line}", file=sys.stderr, flush=True)


def paint(text: str, colour: str, stream: TextIO) -> str:
    """`text` in ``red`` or ``yellow`` where `stream` is a terminal that has colours and nobody asked for none.

    NO_COLOR: https://no-color.org.
    """
    if os.environ.get("NO_COLOR") or not obeys(stream):
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def obeys(stream: TextIO) -> bool:
    """Return True if `stream` is a terminal that moves its cursor as it is told."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def terminal_width(stream: TextIO) -> int:
    """Return the width of the terminal that `stream` writes to; 80 where it has none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS


def wrap_text(text: str, stream: TextIO) -> str:
    """`text` with its lines folded to the width of `stream` where that is a terminal."""
    if not stream.isatty():
        return text
    width = terminal_width(stream)
    return "\n".join(part for line in text.split("\n") for part in wrap_line(line, width))


def _fresh_line(stream: TextIO) -> str:
    """Erase a progress bar, which may be another process's, before a line is printed."""
    return "\r\x1b[K" if obeys(stream) else ""


@contextmanager
def ignore_closed_output() -> Iterator[None]:
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
    """Open what a caller has closed of the standard streams (``>&-``) to nowhere, and have them take any text.

    Otherwise the next file that is opened takes its place, and gets what was meant for the terminal. Characters that
    the streams' encoding lacks are spelt as Python's escapes.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is the one that is taken.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


_LISTED = 5
_LABEL = 15
"""Characters of the label before a line of facts."""
# A command stays whole: no line ends before a setting or a flag, or between a short flag, or --logdir, and its value.
_WITHIN_COMMAND = re.compile(r"(?<![,;:.]) (?=--?\w|[\w.]+=)|(?<= -\w) |(?<=--logdir) ")


def printable(text: str | bytes) -> str:
    """`text` as one line that a terminal acts on nowhere.

    What is no visible character (control characters, line breaks, bidirectional marks, lone surrogates; by
    `str.isprintable`) is spelt as Python's escape for it. Bytes are read as UTF-8; one that is not becomes the
    escape of that byte, as in ``caf\\xe9``.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8, as Python decodes it
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def printable_lines(text: str) -> str:
    """The same for text whose line breaks are meant."""
    return "\n".join(map(printable, text.split("\n")))


def wrap_line(line: str, width: int) -> list[str]:
    """`line` in lines of at most `width` columns, folded between words; the rest stands below the text of a label.

    Words, such as paths, and settings in a row stay whole, to be copied. Rows of tables (``|``) are not folded.
    """
    if len(line) <= width or line.startswith("|"):
        return [line]
    behind_label = line[_LABEL - 2 : _LABEL] == "  " and line[_LABEL : _LABEL + 1] != " "
    parts = textwrap.wrap(
        _WITHIN_COMMAND.sub("\0", line),
        width,
        break_long_words=False,
        break_on_hyphens=False,
        subsequent_indent=" " * (_LABEL if behind_label else 2),
    )
    return [part.replace("\0", " ") for part in parts]


def first_line(error: object) -> str:
    """Return the first line of a text, or of an error: of its message, or the name of its class where that is empty."""
    empty = type(error).__name__ if isinstance(error, BaseException) else ""
    return next(iter(str(error).splitlines()), empty)


def utf8(text: str) -> bytes:
    """Encode `text` for a file, lone surrogates spelt as `printable` spells them."""
    return re.sub("[\ud800-\udfff]", lambda found: _escaped(found[0]), text).encode()


def not_empty(text: str) -> str:
    """Return `text`, an argument of a command; an empty one, as of a variable that is not set, is no folder ``.``."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a path")
    return text


def is_url(text: str | None) -> bool:
    """Whether `text` names a place by a URL, as fsspec has them: ``s3://bucket/key``."""
    return text is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)", text) is not None


def size(count: float) -> str:
    """Bytes, in three digits and a unit of 10**3, 10**6, 10**9 or 10**12 of them."""
    return _in_largest_unit(count, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3})


def operations(count: float) -> str:
    """Floating-point operations, in three digits and a unit of 10**6, 10**9 or 10**12 of them."""
    return _in_largest_unit(count, {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6})


def _in_largest_unit(count: float, units: dict[str, float]) -> str:
    # A count that three digits round up to a unit is shown in that unit.
    unit = next((unit for unit, of_it in units.items() if count >= 0.9995 * of_it), [*units][-1])
    return f"{count / units[unit]:.3g} {unit}"


def rate(per_s: float) -> str:
    """Whole numbers, and of small ones what they are made of."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """``1 epoch``, ``12 epochs``; `plural`: of a noun that takes more than an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def listed(names: Sequence[str | bytes], end: str = "") -> str:
    """Return the first five of `names`, each followed by `end`, and the number of the rest: ``a, b and 3 more``."""
    shown = ", ".join(f"{printable(name)}{end}" for name in names[:_LISTED])
    return f"{shown} and {len(names) - _LISTED:,} more" if len(names) > _LISTED else shown


def format_number(value: float) -> str:
    """A figure that was worked out, in three digits, or in two below 1: ``5``, ``2.22``, ``0.56``."""
    return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"


def format_duration(seconds: float) -> str:
    """A time as people say it, in its two largest units: ``3 d 4 h``, ``2 h 05 min``, ``7 min``, ``42 s``."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"
