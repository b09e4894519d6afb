"""What a person sees while a run goes on: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from lars_train.monitoring.say import paint, unread
from lars_train.text import printable

QUIET, NORMAL, EVERY_LINE = 0, 1, 2
"""Levels of ``verbosity``: warnings and results; a line per epoch as well; one per log line as well."""

_SILENCE_S = 600.0
"""Where there is no bar, a run that goes on says so after so many seconds."""
_WARNING = "WARNING: "
# Short, so that 80 columns have room for what follows.
_BAR = "{desc}|{bar}|{n_fmt}/{total_fmt} [{remaining} left"


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar that the end of its terminal does not stop."""

    def display(self, *arguments: Any, **keywords: Any) -> None:
        with unread():
            super().display(*arguments, **keywords)


class Progress:
    """The display of rank 0; on other ranks (`shown` False) it says nothing.

    `verbosity`: a level, see `QUIET`. Bars want a terminal that can go back in its line, and `NORMAL` at least.
    """

    def __init__(self, *, shown: bool, epochs: int, verbosity: int = NORMAL) -> None:
        self._shown, self._verbosity = shown, verbosity
        self._bars = shown and verbosity >= NORMAL and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._epochs = epochs
        self._bar: Any = None
        self._said = time.monotonic()

    def say(self, text: str) -> None:
        """One line of text, above the bar if there is one; of a quiet run, only a warning."""
        warns = text.startswith(_WARNING)
        if self._shown and (warns or self._verbosity >= NORMAL):
            self._said = time.monotonic()
            line = printable(text)
            if warns:
                line = paint(_WARNING.rstrip(), "yellow", sys.stdout) + " " + line.removeprefix(_WARNING)
            with unread():
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

    def start_epoch(self, epoch: int, updates: int, done: int) -> None:
        """A bar for epoch `epoch` (from 0) of `updates` updates, `done` of them behind us."""
        if self._bars:
            self._bar = _Bar(
                total=updates,
                initial=done,
                desc=f"epoch {epoch + 1}/{self._epochs}",
                bar_format=f"{_BAR}]",
                leave=False,
                dynamic_ncols=True,
            )

    def advance(self, logged: dict[str, float], run_left: float | None = None) -> None:
        """One update further; the last logged values stand behind the bar.

        `run_left`: seconds until the whole run is done, None: not known yet.
        """
        if self._bar is None:
            return
        if logged:
            run = "" if run_left is None else f", run {tqdm.format_interval(run_left)}"
            values = (
                f"loss {logged['train/loss']:.3f} top1 {logged['train/top1']:.1f}% lr {logged['train/lr']:.3g} "
                f"{logged['train/images_per_s']:,.0f} img/s "
                f"wait {100 * logged['train/wait_share']:.0f}% MFU {100 * logged['train/mfu']:.0f}%"
            )
            self._bar.bar_format = f"{_BAR}{run}] {values}"
        self._bar.update()

    def log_line(self, text: str) -> None:
        """What a log line tells, where that is wanted, and else where nothing has been said for long and no bar is."""
        silent = self._bar is None and time.monotonic() - self._said > _SILENCE_S
        if self._verbosity >= EVERY_LINE or silent:
            self.say(text)

    def end_epoch(self, text: str) -> None:
        """Take the bar away and leave one line."""
        self.close()
        self.say(text)

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Any]:
        """A bar over `total` images; yields what to call with each batch's size."""
        if not self._bars:
            yield lambda count: None
            return
        with _Bar(total=total, desc=what, unit="image", leave=False, dynamic_ncols=True) as bar:
            yield bar.update

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def duration(seconds: float) -> str:
    """A time as people say it, in its two largest units: ``3 d 4 h``, ``2 h 05 min``, ``7 min``, ``42 s``."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"
