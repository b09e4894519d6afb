"""What the scripts that measure have in common: the machine's name, the command, the page's part that each writes."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent


def cpu_name() -> str:
    """The processor's name, as well as the system tells it."""
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command_line(script: str, arguments: Sequence[str] | None = None, *, takes_page: bool = True) -> str:
    """How to measure the same again: `script`, by its path in the checkout, with its arguments less ``--write``.

    Args:
        script: its ``__file__``.
        arguments: by default those that this process was started with.
        takes_page: whether its ``--write`` is followed by a page.
    """
    words = [f"scripts/{Path(script).resolve().relative_to(SCRIPTS)}"]
    rest = iter(sys.argv[1:] if arguments is None else arguments)
    for word in rest:
        name, equals, _ = word.partition("=")
        # argparse takes beginnings of an option's name, too.
        if len(name) > 2 and "--write".startswith(name):
            if takes_page and not equals:
                next(rest, None)
        else:
            words.append(word)
    return f"python {shlex.join(words)}"


def between_markers(text: str, name: str, lines: list[str]) -> str:
    """`text` with `lines` between the two marker comments of `name`, in place of what was there.

    Raises:
        ValueError: it does not have both, in order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, found_too, after = rest.partition(end)
    if not (found and found_too):
        raise ValueError(f"{begin} and {end} are not there")
    return "\n".join([before + begin, "", *lines, "", end + after])


def check_page(path: Path, *names: str) -> None:
    """That `path` can be written and has the markers of `names`: looked at before hours of measuring, not after them.

    Raises:
        ValueError: what is in the way, in one line.
    """
    try:
        # Opened for writing, but nothing of it is changed.
        with path.open("r+", encoding="utf-8") as file:
            text = file.read()
        for name in names:
            between_markers(text, name, [])
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"{path}: {why}; a page that is there and can be written is wanted") from None
    except ValueError as error:  # no text, or no markers
        raise ValueError(f"{path}: {error}") from None


def writable_page(*names: str) -> Callable[[str], Path]:
    """The type, for argparse, of a page that `check_page` finds fit for the parts `names`."""

    def page(text: str) -> Path:
        path = Path(text)
        try:
            check_page(path, *names)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return path

    return page
