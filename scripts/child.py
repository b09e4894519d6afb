"""Processes that a script starts and that end with it, be it by a signal, Ctrl-C or an error."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE_S = 10.0
"""Seconds from SIGTERM to SIGKILL; a run of lars-train ends after its update, with a checkpoint."""
# A terminal and a script that started this one may both tell of the same end.
_SAME_END_S = 1.0


class _Ending:
    """Of the process that listens: when it last heard a signal, and the number of one that has to wait."""

    process, at, waiting, deferred = 0, -_SAME_END_S, 0, False


def end_on_signals() -> None:
    """From now on SIGTERM, SIGINT and SIGHUP raise SystemExit with 128 and their number, so that what is left open is
    closed, and no traceback is printed. What was ignored before (``nohup``) stays so.
    """
    _Ending.process = os.getpid()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _Ending.process:
        # A fork of it, which has nothing of its own to close.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    now, before = time.monotonic(), _Ending.at
    if now - before < _SAME_END_S:
        return
    _Ending.at = now
    if _Ending.deferred:
        _Ending.waiting = number
    else:
        raise SystemExit(128 + number)


@contextmanager
def started(command: Sequence[str], *, grace: float = GRACE_S, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Within it the command runs; at its end it is waited for, or ended if an exception (also SystemExit) passes.

    Args:
        grace: seconds that it then has to end by itself; more than those that it gives to its own children.
        options: of subprocess.Popen.
    """
    # Between the start of a process and the name for it nobody could end it: a signal waits.
    _Ending.deferred = True
    try:
        process: subprocess.Popen[bytes] = subprocess.Popen(command, **options)
    finally:
        _Ending.deferred = False
    try:
        if _Ending.waiting:
            raise SystemExit(128 + _Ending.waiting)
        yield process
        process.wait()
    except BaseException:
        stop(process, grace)
        raise


def stop(process: subprocess.Popen[bytes], grace: float = GRACE_S) -> None:
    """SIGTERM, and SIGKILL after `grace` seconds, or when a second signal does not want to wait for that."""
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
    """The exit code of a command, which has ended when this returns or raises; arguments as those of `started`."""
    with started(command, grace=grace, **options) as process:
        return process.wait()


@contextmanager
def ranks_end() -> Iterator[None]:
    """Within it `start_processes` is called: a signal to it ends this script as `end_on_signals` has it.

    What it says by itself, that the same command goes on from a checkpoint, is true of a training.
    """
    from lars_train.errors import Stopped

    try:
        yield
    except Stopped as stopped:
        name = re.match(r"SIG[A-Z0-9]+", str(stopped))
        raise SystemExit(128 + signal.Signals[name.group()] if name else stopped.code) from None
