"""Handle termination signals, the signals that ask a run to end. The only module that installs signal handlers.

A signal that was ignored when the program started (``nohup``) stays ignored.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
"""Sent by schedulers (Slurm, submitit, Kubernetes, spot machines), by Ctrl-C, and when a terminal closes."""
# A terminal and a launcher may both deliver the same signal. Within this time, a repeat is not a second signal.
_SAME_SIGNAL_S = 1.0

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


def handle_termination(
    handler: Handler, numbers: Iterable[signal.Signals] = TERMINATION_SIGNALS
) -> dict[signal.Signals, Any]:
    """Install `handler` for each of these signals that is not ignored. Return the handlers that it replaces.

    Outside the main thread, where Python handles no signals, install nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in handled}


@contextmanager
def termination_handler(handler: Handler) -> Iterator[dict[signal.Signals, Any]]:
    """Handle termination signals with `handler` within the context, then restore the previous handlers.

    Yield the previous handlers.
    """
    previous = handle_termination(handler)
    try:
        yield previous
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def blocked(*numbers: signal.Signals) -> Iterator[None]:
    """Block these signals within the context. A process started within it begins with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SignalHandler:
    """Record the first termination signal within the context in `received` (its number, or 0).

    The run then ends after its current update, with a checkpoint. A second signal ends the process at once. If
    both are Ctrl-C and the handler before was Python's own, the second raises KeyboardInterrupt instead. Outside the
    main thread, where Python handles no signals, nothing is recorded.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._stack = ExitStack()

    def __enter__(self) -> SignalHandler:
        self._previous = self._stack.enter_context(termination_handler(self._record))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _record(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
        elif now - self._received_at > _SAME_SIGNAL_S:
            if self.received == number and self._previous[signal.Signals(number)] is signal.default_int_handler:
                signal.default_int_handler(number, frame)
            os._exit(128 + number)
