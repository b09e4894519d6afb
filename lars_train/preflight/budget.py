"""The time of a check: what it may take in all, and of that each of its parts. Nothing is measured here.

A part looks at the clock between its single steps, and says less, or more roughly, where its time is up: it goes over
it by one step at most.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

PARTS = {"sample": 2.0, "step": 4.0, "input": 2.0, "exchange": 2.0, "disk": 2.0}
"""The most that each part takes, in the order in which they come, in units of `check.seconds`."""

TOTAL = 18.0
"""All of a check from the start of its process, likewise: a minute and a half with 5 s, of the two minutes promised.
What is left of them is for the launcher and the end."""

LEAST = 0.2
"""What a part gets, likewise, however late it is."""


class Budget:
    """From `began` (as of `time.monotonic`; the start of this process) on."""

    def __init__(self, seconds: float, began: float | None = None) -> None:
        self.seconds = seconds
        self._end = (_process_began() if began is None else began) + TOTAL * seconds

    def of(self, part: str) -> float:
        """Seconds that `part` may take now: less than its share in `PARTS` where what came before took too long."""
        names = list(PARTS)
        to_come = sum(PARTS[name] for name in names[names.index(part) :])
        left = self._end - time.monotonic()
        return max(LEAST * self.seconds, PARTS[part] * min(self.seconds, left / to_come))


def _process_began() -> float:
    now = time.monotonic()
    try:
        # Field 22 of proc_pid_stat(5), in clock ticks since the system's start, as uptime is.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return now
    return now - max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
