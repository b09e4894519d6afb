"""Helpers shared by the scripts: arguments, parts of pages, configs of lars-train, child processes.

Nothing here imports torch or another large package at the top, so that every script answers --help within a second.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lars_train.config import Config

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
GRACE_S = 10.0
"""Seconds from SIGTERM to SIGKILL. On SIGTERM a run of lars-train finishes its update and writes a checkpoint."""
# A terminal and a parent script may both report the same Ctrl-C.
_SAME_SIGNAL_S = 1.0


# Arguments


def make_parser(description: str | None, *markers: str) -> argparse.ArgumentParser:
    """Return a parser with a script's docstring as its help and, given `markers`, an option ``--write PAGE``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if markers:

        def page(text: str) -> Path:
            try:
                return check_page(Path(text), *markers)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        parser.add_argument("--write", type=page, metavar="PAGE", help="put the results between the page's markers")
    return parser


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not re.fullmatch(r"0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    """Parse a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of seconds, 0 or more")
    return value


def require_cuda(parser: argparse.ArgumentParser, device: str) -> None:
    """Exit with code 2 if `device` is cuda and torch finds none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")


def pin_to_one_core() -> None:
    """Restrict this process to one core, where the system supports it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def compose_config(keys: Sequence[str]) -> Config:
    """Compose the config of a lars-train command with the settings `keys`.

    Raises:
        ConfigError: lars-train rejects a setting; the message is the one that lars-train prints.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from lars_train.cli import explain
    from lars_train.config import config_dir, register, resolve
    from lars_train.config.arguments import prepare_arguments
    from lars_train.errors import ConfigError

    arguments = prepare_arguments(list(keys), None)
    register()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return resolve(compose("config", arguments))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, arguments)) from None


@contextmanager
def config_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn a ConfigError into exit code 2 and one line below the usage."""
    from lars_train.errors import ConfigError

    try:
        yield
    except ConfigError as error:
        parser.error(str(error))


# Pages


def cpu_name() -> str:
    """Return the processor's name, as far as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def software(*packages: str) -> str:
    """Return the versions of Python, torch, and the installed ones among `packages`."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", *packages):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def command_line(script: str, arguments: Sequence[str] | None = None) -> str:
    """Return the command that repeats a measurement: a script's ``__file__`` and its arguments, without ``--write``.

    Args:
        arguments: those of this process by default.
    """
    words = [f"scripts/{Path(script).resolve().relative_to(SCRIPTS)}"]
    rest = iter(sys.argv[1:] if arguments is None else arguments)
    for word in rest:
        name, equals, _ = word.partition("=")
        # argparse accepts any prefix of an option's name.
        if len(name) > 2 and "--write".startswith(name):
            if not equals:
                next(rest, None)
        else:
            words.append(word)
    return f"python {shlex.join(words)}"


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
    """Return `path` if it is writable and has all `markers`. Call it before a measurement of hours, not after.

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


def require_page(parser: argparse.ArgumentParser, page: Path | None, *markers: str) -> None:
    """Exit with code 2 if a page is given that is not writable or lacks one of `markers`."""
    if page:
        try:
            check_page(page, *markers)
        except ValueError as error:
            parser.error(f"argument --write: {error}")


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


class _Signals:
    """State of the signal handler: the process that installed it, and a signal that waits until a child has started."""

    process, last, pending, deferred = 0, -_SAME_SIGNAL_S, 0, False


def exit_on_signals() -> None:
    """Make SIGTERM, SIGINT and SIGHUP raise SystemExit(128 + number), so that contexts close without a traceback.

    A signal that was ignored before (``nohup``) stays ignored.
    """
    _Signals.process = os.getpid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _Signals.process:
        # A forked child, which has no contexts to close.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    now, before = time.monotonic(), _Signals.last
    if now - before < _SAME_SIGNAL_S:
        return
    _Signals.last = now
    if not _Signals.deferred:
        raise SystemExit(128 + number)
    _Signals.pending = number


@contextmanager
def running(command: Sequence[str], *, grace: float = GRACE_S, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command within the context. Wait for it at the end; stop it on an exception, including SystemExit.

    Args:
        grace: seconds from SIGTERM to SIGKILL; longer than the command's grace for its own children.
        options: of subprocess.Popen.
    """
    # Until `process` is assigned, no code could stop the child: defer signals.
    _Signals.deferred = True
    try:
        process: subprocess.Popen[bytes] = subprocess.Popen(command, **options)
    finally:
        _Signals.deferred = False
    try:
        if _Signals.pending:
            raise SystemExit(128 + _Signals.pending)
        yield process
        process.wait()
    except BaseException:
        stop(process, grace)
        raise


def stop(process: subprocess.Popen[bytes], grace: float = GRACE_S) -> None:
    """Send SIGTERM, and SIGKILL after `grace` seconds or at a second signal to this process."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(grace)
    except BaseException as error:
        process.kill()
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise


def run(command: Sequence[str], *, grace: float = GRACE_S, **options: Any) -> int:
    """Return the exit code of a command; arguments as those of `running`."""
    with running(command, grace=grace, **options) as process:
        return process.wait()


@contextmanager
def exit_with_ranks() -> Iterator[None]:
    """Exit as `exit_on_signals` does when a signal stops the processes of `lars_train.launch.start_processes`.

    The message of `Stopped` promises a checkpoint, which only a training run writes.
    """
    from lars_train.errors import Stopped

    try:
        yield
    except Stopped as stopped:
        name = re.match(r"SIG[A-Z0-9]+", str(stopped))
        raise SystemExit(128 + signal.Signals[name.group()] if name else stopped.code) from None
