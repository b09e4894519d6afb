"""Termination signals: which ones ask a run to end, and how a process notes, handles or delays them.

A signal that was ignored when the program started (``nohup``) stays ignored.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
"""The signals that ask a run to end: of schedulers (Slurm, submitit, Kubernetes, spot machines), Ctrl-C, a closed
terminal."""
# A terminal and a launcher may both deliver the same signal: one that follows so soon is not a second one.
_SAME_SIGNAL_S = 1.0

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


def handle_termination(handler: Handler) -> dict[signal.Signals, Any]:
    """Handle termination signals with `handler`, except ignored ones; return the handlers that it replaces."""
    heard = [number for number in TERMINATION_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def restore_handlers(handlers: dict[signal.Signals, Any]) -> None:
    """Undo `handle_termination`, which returned `handlers`."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextmanager
def blocked(*numbers: signal.Signals) -> Iterator[None]:
    """Delay these signals within the context; a process that is started there begins with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SignalHandler:
    """Note the first termination signal within the context in `received` (its number, or 0).

    The run ends after its current update, with a checkpoint. A second signal ends the process at once. Outside the main
    thread, where Python handles no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.received = 0
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():
            self._before = handle_termination(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        restore_handlers(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._at = number, now
        elif now - self._at > _SAME_SIGNAL_S:
            os._exit(128 + number)
