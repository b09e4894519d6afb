"""The notice that a run has to end: SIGTERM and SIGUSR1 (Slurm, Kubernetes, spot machines), SIGINT (Ctrl-C), SIGHUP (a
terminal that is gone). What was ignored when the program was started (``nohup``) stays so.

The first one is only noted: the run ends after its current update, with a checkpoint. A second one ends the
process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# A terminal and a launcher may both pass on the same notice: what comes so soon after it is not a second one.
_SAME_NOTICE_S = 1.0


class Notice:
    """Within it the signals are noted in `given` (a signal number, or 0); afterwards they do what they did before.

    Outside the main thread, where Python takes no signals, it notes none.
    """

    def __init__(self) -> None:
        self.given = 0
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Notice:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.given:
            self.given, self._at = number, now
        elif now - self._at > _SAME_NOTICE_S:
            os._exit(128 + number)
