"""Helpers shared by the scripts: arguments, parts of pages, child processes.

Nothing here imports torch or another large package at the top, so that every script answers --help within a second.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from lars_train.config import Config

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
LARS_TRAIN = [sys.executable, "-m", "lars_train"]
GRACE_S = 10.0
"""Seconds from SIGTERM to SIGKILL. On SIGTERM a run of lars-train finishes its update and writes a checkpoint."""


# Arguments


def make_parser(description: str | None, *markers: str) -> argparse.ArgumentParser:
    """Return a parser with a script's docstring as its help and, given `markers`, an option ``--write PAGE``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if markers:
        parser.add_argument("--write", type=page_with(*markers), metavar="PAGE", help="put the results between markers")
    return parser


def page_with(*markers: str) -> Callable[[str], Path]:
    """Return an argument's type: the path of a page that passes `check_page`."""

    def page(text: str) -> Path:
        try:
            return check_page(Path(text), *markers)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return page


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not re.fullmatch(r"0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return int(text)


def require_cuda(parser: argparse.ArgumentParser, device: str) -> None:
    """Exit with code 2 if `device` is cuda and torch finds none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")


def pin_to_cores(count: int) -> None:
    """Restrict this thread to `count` of the cores that the process had at its start, where the system supports it."""
    if CORES:
        os.sched_setaffinity(0, CORES[-count:])


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def compose(settings: Sequence[str]) -> Config:
    """Return the config of a run with these settings, as on the command line. Raises `ConfigError`."""
    from hydra import compose, initialize_config_dir

    from lars_train.config import config_dir, register, resolve
    from lars_train.config.arguments import prepare_arguments

    register()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return resolve(compose("config", prepare_arguments(list(settings), None)))


# Pages


def cpu_name() -> str:
    """Return the processor's name, as far as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Return the name of the GPU if `device` is cuda, else of the processor."""
    if device != "cuda":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name()


def software(*packages: str) -> str:
    """Return the versions of Python, torch, and the installed ones among `packages`."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", *packages):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def command_line(script: str, arguments: Sequence[str] | None = None) -> str:
    """Return the command that repeats a measurement: a script's ``__file__`` and its arguments, without ``--write``."""
    words = [f"scripts/{Path(script).resolve().relative_to(SCRIPTS)}"]
    rest = iter(sys.argv[1:] if arguments is None else arguments)
    for word in rest:
        if word == "--write":
            next(rest, None)
        elif not word.startswith("--write="):
            words.append(word)
    return f"python {shlex.join(words)}"


def table(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Return a Markdown table; the first column is aligned to the left, the others to the right."""
    head, *lines = (f"| {' | '.join(map(str, cells))} |" for cells in (heads, *rows))
    return [head, f"|---|{'---:|' * (len(heads) - 1)}", *lines]


def spread(values: Sequence[float] | NDArray[Any], form: str, low: float = 10, high: float = 90) -> str:
    """Return the median of `values`, with their percentiles `low` and `high`: ``2.0 (1.5 to 3.1)`` for `form` .1f."""
    import numpy as np

    least, middle, most = np.percentile(values, [low, 50, high])
    return f"{middle:{form}} ({least:{form}} to {most:{form}})"


def between_markers(text: str, name: str, lines: list[str]) -> str:
    """Return `text` with `lines` between the two marker comments of `name`, replacing the former lines.

    Raises:
        ValueError: `text` does not have both markers, in order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{begin} and {end} are missing")
    return "\n".join([before + begin, "", *lines, "", end + after])


def check_page(path: Path, *markers: str) -> Path:
    """Return `path` if it is writable and has all `markers`. Call it before a measurement that takes hours.

    Raises:
        ValueError: the page is missing or not writable, or lacks a marker. The message is one line.
    """
    try:
        # Opened for writing, but not changed.
        with path.open("r+", encoding="utf-8") as file:
            text = file.read()
        for name in markers:
            between_markers(text, name, [])
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; pass an existing, writable page") from None
    except ValueError as error:  # not UTF-8, or no markers
        raise ValueError(f"{path}: {error}") from None
    return path


def publish(lines: list[str], page: Path | None, marker: str) -> None:
    """Print `lines`, and put them between the markers of `page`, if there is one."""
    print("\n".join(lines), flush=True)
    write_page(lines, page, marker)


def write_page(lines: list[str], page: Path | None, marker: str) -> None:
    """Put `lines` between the markers of `page`, if there is one."""
    if page:
        text = between_markers(page.read_text(encoding="utf-8"), marker, lines)
        page.write_text(text, encoding="utf-8")


def save_figure(figure: Figure, stem: Path) -> None:
    """Write a figure as `stem`.png and `stem`.svg; equal figures give equal files."""
    figure.savefig(stem.with_name(f"{stem.name}.png"), dpi=160, metadata={"Software": None})
    figure.savefig(stem.with_name(f"{stem.name}.svg"), metadata={"Date": None})


# Child processes


def exit_on_signals() -> None:
    """Make SIGTERM, SIGINT and SIGHUP raise SystemExit(128 + number), so that contexts close without a traceback.

    Only the first signal counts: a terminal and a parent script may both report the same Ctrl-C. A signal that was
    ignored before (``nohup``) stays ignored.
    """
    process = os.getpid()
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked child, which has no contexts to close
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, leave)


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in the context, with Popen's `options`. Wait for its end; stop it on an exception or SystemExit."""
    process: subprocess.Popen[bytes] = subprocess.Popen(command, **options)
    try:
        yield process
        process.wait()
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], grace: float = GRACE_S) -> None:
    """Send SIGTERM to a process that still runs, and SIGKILL after `grace` seconds."""
    process.terminate()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
