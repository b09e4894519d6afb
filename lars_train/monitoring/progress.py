"""What a person sees while a run goes on: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from lars_train.messages import format_duration, ignore_closed_output, paint, printable, terminal_width, wrap_text
from lars_train.monitoring.fields import on_a_line

QUIET, NORMAL, EVERY_LINE = 0, 1, 2
"""Levels of ``verbosity``: warnings and results; a line per epoch as well; one per log line as well."""

_SILENCE_S = 600.0
"""Where there is no bar, a run that goes on says so after so many seconds."""
_WARNING = "WARNING: "
_BEHIND_BAR = ("train/loss", "train/top1", "train/images_per_s", "train/lr", "train/wait_share", "train/mfu")
_LEAST_CELLS, _MOST_CELLS = 10, 40
# From an empty to a full cell.
_BLOCKS, _ASCII = " ▏▎▍▌▋▊▉█", " 123456789#"


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar of one line that a failing terminal does not stop.

    The cursor rests at the line's start: the ``^C`` that a terminal echoes there, and a line that another process
    prints, replace a part of the bar, which the next update restores.
    """

    fields: tuple[str, ...] = ()
    """Texts behind the bar, the most important first. Those that do not fit are left out."""
    run_left: float | None = None
    """Seconds until the whole run is done."""

    def display(self, *arguments: Any, **keywords: Any) -> None:
        with ignore_closed_output():
            super().display(*arguments, **keywords)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        # Blanks erase what was longer before: a notebook that runs a command knows no ESC[K.
        show_behind = tqdm.status_printer(file)

        def show(text: str) -> None:
            show_behind(text)
            file.write("\r")
            file.flush()

        return show

    def __str__(self) -> str:
        state = self.format_dict
        # The last column stays free: some terminals move to the next line after it.
        return bar_line(
            f"{state['prefix']} ",
            state["n"],
            state["total"],
            (*self._times(state), *self.fields),
            terminal_width(self.fp) - 1,
            _ASCII if state["ascii"] else _BLOCKS,
        )

    def _times(self, state: Mapping[str, Any]) -> Iterator[str]:
        made = state["n"] - state["initial"]
        rate = state["rate"] or (made / state["elapsed"] if made and state["elapsed"] else None)
        if rate:
            yield f"{format_duration((state['total'] - state['n']) / rate)} left"
        if self.run_left is not None:
            yield f"run {format_duration(self.run_left)}"


def bar_line(title: str, done: int, total: int, fields: Iterable[str], width: int, cells: str = _BLOCKS) -> str:
    """A bar with its title and, behind it, the first of the `fields` that leave it at least ten cells.

    `cells`: the characters from an empty to a full cell. At most `width` characters.
    """
    share, text = done / total if total else 1.0, f" {done:,}/{total:,}"
    room = width - len(title) - len("||")
    text += first_fields(fields, room - _LEAST_CELLS - len(text))
    size = min(room - len(text), _MOST_CELLS)
    if size < 1:
        return f"{title}{text.lstrip()}"[: max(0, width)]
    steps = len(cells) - 1
    full, rest = divmod(int(min(share, 1.0) * size * steps), steps)
    return f"{title}|{(cells[-1] * full + cells[rest])[:size]:{size}}|{text}"


def first_fields(fields: Iterable[str], room: int) -> str:
    """The first of the `fields`, each behind two blanks, that have room in so many characters together."""
    text = ""
    for field in fields:
        if len(text) + len("  ") + len(field) > room:
            break
        text += f"  {field}"
    return text


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
        """Text above the bar if there is one; of a quiet run, only a warning."""
        warns = text.startswith(_WARNING)
        if self._shown and (warns or self._verbosity >= NORMAL):
            self._said = time.monotonic()
            line = wrap_text(printable(text), sys.stdout)
            if warns:
                line = paint(_WARNING.rstrip(), "yellow", sys.stdout) + " " + line.removeprefix(_WARNING)
            with ignore_closed_output():
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

    def start_epoch(self, epoch: int, updates: int, done: int) -> None:
        """A bar for epoch `epoch` (from 0), in which the run makes `updates` updates, `done` of them behind us."""
        if self._bars:
            self._bar = _Bar(total=updates, initial=done, desc=f"epoch {epoch + 1}/{self._epochs}", leave=False)

    def advance(self, logged: dict[str, float], run_left: float | None = None) -> None:
        """One update further; the last logged values stand behind the bar.

        `run_left`: seconds until the whole run is done, None: not known yet.
        """
        if self._bar is None:
            return
        if logged:
            self._bar.run_left = run_left
            self._bar.fields = tuple(on_a_line(logged, *_BEHIND_BAR))
        self._bar.update()

    def log_line(self, *fields: str) -> None:
        """A line at a log point: at `EVERY_LINE`, and where there is no bar and nothing was said for long.

        `fields`: the most important first. A terminal gets those that fit its width.
        """
        silent = self._bar is None and time.monotonic() - self._said > _SILENCE_S
        if self._verbosity >= EVERY_LINE or silent:
            self._say_fields(fields)

    def end_epoch(self, *fields: str) -> None:
        """Take the bar away and leave one line of `fields`, as `log_line` does."""
        self.close()
        self._say_fields(fields)

    def _say_fields(self, fields: Sequence[str]) -> None:
        first, *others = fields
        room = terminal_width(sys.stdout) if sys.stdout.isatty() else sys.maxsize
        self.say(first + first_fields(others, room - len(first)))

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Any]:
        """A bar over `total` images in place of the epoch's; yields what to call with each batch's size."""
        self.close()
        if not self._bars:
            yield lambda count: None
            return
        with _Bar(total=total, desc=what, leave=False) as bar:
            yield bar.update

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
