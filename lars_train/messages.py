"""Print messages from rank 0, escape text from files for terminals, and format numbers for people.

Printed text cannot trigger terminal actions. A closed output (``| head``, a closed terminal) never ends a run.
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

_COLORS = {"red": 31, "yellow": 33}
_COLUMNS = 80
_NAME = "lars-train:"


def is_rank0() -> bool:
    """Return True if this process is rank 0, according to the launcher's environment variables."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def say(text: str) -> None:
    """Print `text` on rank 0."""
    if is_rank0():
        with ignore_closed_output():
            print(f"{_erase_line(sys.stdout)}{wrap_text(printable_lines(text), sys.stdout)}", flush=True)


def complain(text: str) -> None:
    """Print `text` to stderr once per machine, because an error may affect a single machine."""
    if is_rank0() or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        with ignore_closed_output():
            line = wrap_text(f"{_NAME} {printable_lines(text)}", sys.stderr).removeprefix(_NAME)
            print(f"{_erase_line(sys.stderr)}{paint(_NAME, 'red', sys.stderr)}{line}", file=sys.stderr, flush=True)


def paint(text: str, color: str, stream: TextIO) -> str:
    """Return `text` in ``red`` or ``yellow`` if `stream` is a terminal with colors, unless NO_COLOR is set.

    NO_COLOR: https://no-color.org.
    """
    if os.environ.get("NO_COLOR") or not _supports_escapes(stream):
        return text
    return f"\x1b[{_COLORS[color]}m{text}\x1b[0m"


def _supports_escapes(stream: TextIO) -> bool:
    """Return True if `stream` is a terminal that supports escape sequences."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def terminal_width(stream: TextIO) -> int:
    """Return the width of the terminal that `stream` writes to; 80 if it is not a terminal."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS


def wrap_text(text: str, stream: TextIO) -> str:
    """Wrap the lines of `text` to the width of `stream` if it is a terminal."""
    if not stream.isatty():
        return text
    width = terminal_width(stream)
    return "\n".join(part for line in text.split("\n") for part in wrap_line(line, width))


def _erase_line(stream: TextIO) -> str:
    """Return the sequence that erases a progress bar, possibly another process's, before a line is printed."""
    return "\r\x1b[K" if _supports_escapes(stream) else ""


@contextmanager
def ignore_closed_output() -> Iterator[None]:
    """Ignore print errors within the block. After an error, discard output to a closed pipe or terminal."""
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
    """Open standard streams that the caller closed (``>&-``) to the null device, and let them accept any text.

    Otherwise the next file that is opened gets the number of the closed stream, and text for the terminal ends up in
    it. Characters that the encoding lacks are printed as Python's escapes.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # `os.open` returns the lowest free descriptor, which is `number`.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


_LISTED = 5
_LABEL = 15
"""Width of the label in front of a line."""
# Spaces within a command where a line must not break: before a setting or a flag, and after a short flag or --logdir,
# which a value follows.
_WITHIN_COMMAND = re.compile(r"(?<![,;:.]) (?=--?\w|[\w.]+=)|(?<= -\w) |(?<=--logdir) ")


def printable(text: str | bytes) -> str:
    """Return `text` as one line that triggers no actions of a terminal.

    Characters that `str.isprintable` rejects (control characters, line breaks, bidirectional marks, lone surrogates)
    become Python's escapes. Bytes are decoded as UTF-8; an invalid byte becomes its escape, as in ``caf\\xe9``.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # Python decodes an invalid byte to this range
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def printable_lines(text: str) -> str:
    """Apply `printable` to each line of `text`, and keep the line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def wrap_line(line: str, width: int) -> list[str]:
    """Wrap `line` between words to at most `width` columns.

    If `line` begins with a label, the later lines are aligned with the text after the label. Paths and other words are
    not broken, and consecutive settings of a command stay on one line, so that they can be copied. Table rows (``|``)
    are not wrapped.
    """
    if len(line) <= width or line.startswith("|"):
        return [line]
    has_label = line[_LABEL - 2 : _LABEL] == "  " and line[_LABEL : _LABEL + 1] != " "
    parts = textwrap.wrap(
        _WITHIN_COMMAND.sub("\0", line),
        width,
        break_long_words=False,
        break_on_hyphens=False,
        subsequent_indent=" " * (_LABEL if has_label else 2),
    )
    return [part.replace("\0", " ") for part in parts]


def first_line(error: object) -> str:
    """Return the first line of a text or of an error's message; for an empty message, the name of the error's class."""
    empty = type(error).__name__ if isinstance(error, BaseException) else ""
    return next(iter(str(error).splitlines()), empty)


def utf8(text: str) -> bytes:
    """Encode `text` for a file, with lone surrogates escaped as by `printable`."""
    return re.sub("[\ud800-\udfff]", lambda found: _escaped(found[0]), text).encode()


def not_empty(text: str) -> str:
    """Return a command's argument if it is not empty: an unset shell variable must not mean the folder ``.``."""
    if not text:
        raise argparse.ArgumentTypeError("is empty. Pass a path")
    return text


def is_url(text: str | None) -> bool:
    """Return True if `text` is a URL in the syntax of fsspec: ``s3://bucket/key``."""
    return text is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)", text) is not None


def size(count: float) -> str:
    """Format a number of bytes with three digits, in kB, MB, GB or TB (powers of 1000)."""
    return _in_largest_unit(count, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3})


def operations(count: float) -> str:
    """Format a number of floating-point operations with three digits, in MFLOP, GFLOP or TFLOP."""
    return _in_largest_unit(count, {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6})


def _in_largest_unit(count: float, units: dict[str, float]) -> str:
    # At three digits, 0.9995 of a unit already rounds up to 1.
    unit = next((unit for unit, value in units.items() if count >= 0.9995 * value), [*units][-1])
    return f"{count / units[unit]:.3g} {unit}"


def rate(per_s: float) -> str:
    """Format a rate: as a whole number if it is at least 100, else with three digits."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Format a count with its noun: ``1 epoch``, ``12 epochs``. `plural`: the plural if it is not noun + s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def listed(names: Sequence[str | bytes], end: str = "") -> str:
    """Return the first five of `names`, each followed by `end`, and the number of the rest: ``a, b and 3 more``."""
    shown = ", ".join(f"{printable(name)}{end}" for name in names[:_LISTED])
    return f"{shown} and {len(names) - _LISTED:,} more" if len(names) > _LISTED else shown


def format_number(value: float) -> str:
    """Format a computed number with three digits, or two if it is below 1: ``5``, ``2.22``, ``0.56``."""
    return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"


def format_duration(seconds: float) -> str:
    """Format a duration in its largest units: ``3 d 4 h``, ``2 h 05 min``, ``7 min``, ``42 s``."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"
