"""Show the progress of a run: bars on a terminal and in a notebook, plain lines elsewhere."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from lars_train.messages import format_duration, ignore_closed_output, paint, printable, terminal_width, wrap_text
from lars_train.monitoring.fields import format_fields

QUIET, NORMAL, EVERY_LINE = 0, 1, 2
"""Levels of ``verbosity``: warnings and results only; plus a line per epoch; plus a line per log point."""

_SILENCE_S = 600.0
"""Without a bar, a run that has been silent for this many seconds prints a line at the next log point."""
_WARNING = "WARNING: "
_BAR_FIELDS = ("train/loss", "train/top1", "train/images_per_s", "train/lr", "train/wait_share", "train/mfu")
_MIN_CELLS, _MAX_CELLS = 10, 40
# Characters from an empty to a full cell.
_BLOCKS, _ASCII = " ▏▎▍▌▋▊▉█", " 123456789#"


class _Bar(tqdm):  # type: ignore[type-arg]
    """A one-line bar that ignores errors of the terminal.

    The cursor stays at the start of the line. A ``^C`` echoed by the terminal, or a line printed by another process,
    then overwrites part of the bar, which the next update redraws.
    """

    fields: tuple[str, ...] = ()
    """Texts after the bar, most important first. Texts that do not fit are left out."""
    run_left: float | None = None
    """Seconds until the end of the run."""

    def display(self, *arguments: Any, **keywords: Any) -> None:
        with ignore_closed_output():
            super().display(*arguments, **keywords)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        # tqdm pads with blanks. ESC[K would be shorter, but a notebook's command output does not support it.
        show_padded = tqdm.status_printer(file)

        def show(text: str) -> None:
            show_padded(text)
            file.write("\r")
            file.flush()

        return show

    def __str__(self) -> str:
        state = self.format_dict
        # The last column stays free: some terminals move to the next line once it is filled.
        return bar_line(
            f"{state['prefix']} ",
            state["n"],
            state["total"],
            (*self._times(state), *self.fields),
            terminal_width(self.fp) - 1,
            _ASCII if state["ascii"] else _BLOCKS,
        )

    def _times(self, state: Mapping[str, Any]) -> Iterator[str]:
        advanced = state["n"] - state["initial"]
        rate = state["rate"] or (advanced / state["elapsed"] if advanced and state["elapsed"] else None)
        if rate:
            yield f"{format_duration((state['total'] - state['n']) / rate)} left"
        if self.run_left is not None:
            yield f"run {format_duration(self.run_left)}"


def bar_line(title: str, done: int, total: int, fields: Iterable[str], width: int, cells: str = _BLOCKS) -> str:
    """Return a bar of at most `width` characters: title, cells, counts, and fields.

    The bar has as many of `fields`, in order, as leave room for at least ten cells. Without room for a single cell,
    return only title and counts.
    `cells`: the characters from an empty to a full cell.
    """
    share, text = done / total if total else 1.0, f" {done:,}/{total:,}"
    room = width - len(title) - len("||")
    text += fitting_fields(fields, room - _MIN_CELLS - len(text))
    size = min(room - len(text), _MAX_CELLS)
    if size < 1:
        return f"{title}{text.lstrip()}"[: max(0, width)]
    steps = len(cells) - 1
    full, rest = divmod(int(min(share, 1.0) * size * steps), steps)
    return f"{title}|{(cells[-1] * full + cells[rest])[:size]:{size}}|{text}"


def fitting_fields(fields: Iterable[str], room: int) -> str:
    """Return the first `fields` that together fit into `room` characters, each after two blanks."""
    text = ""
    for field in fields:
        if len(text) + len("  ") + len(field) > room:
            break
        text += f"  {field}"
    return text


def _notebook_bar() -> Any:
    """Return tqdm's class of bars for notebooks; None outside a notebook, or without the package ipywidgets."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None or "IPKernelApp" not in shell.config:
        return None
    if importlib.import_module("tqdm.notebook").IProgress is None:
        return None
    return importlib.import_module("tqdm.auto").tqdm


class Progress:
    """The progress display of a run. `shown`: False on ranks other than 0, which print nothing.

    `verbosity`: a level, see `QUIET`. Bars require at least `NORMAL`, and a notebook, or a terminal that can move the
    cursor back.
    """

    def __init__(self, *, shown: bool, epochs: int, verbosity: int = NORMAL) -> None:
        self._shown, self._verbosity = shown, verbosity
        self._bar_class: Any = None
        if shown and verbosity >= NORMAL:
            on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
            self._bar_class = _notebook_bar() or (_Bar if on_terminal else None)
        self._epochs = epochs
        self._bar: Any = None
        self._last_printed = time.monotonic()

    def say(self, text: str) -> None:
        """Print `text`, above any bar. At `QUIET`, print only warnings."""
        warns = text.startswith(_WARNING)
        if self._shown and (warns or self._verbosity >= NORMAL):
            self._last_printed = time.monotonic()
            line = wrap_text(printable(text), sys.stdout)
            if warns:
                line = paint(_WARNING.rstrip(), "yellow", sys.stdout) + " " + line.removeprefix(_WARNING)
            with ignore_closed_output():
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

    def start_epoch(self, epoch: int, updates: int, done: int) -> None:
        """Show a bar for epoch `epoch` (from 0) with `updates` updates, of which `done` are done."""
        if self._bar_class is not None:
            title = f"epoch {epoch + 1}/{self._epochs}"
            self._bar = self._bar_class(total=updates, initial=done, desc=title, leave=False)

    def advance(self, logged: dict[str, float], run_left: float | None = None) -> None:
        """Advance the bar by one update, and show the last logged values after it.

        `run_left`: seconds until the end of the run; None if not known yet.
        """
        if self._bar is None:
            return
        if logged:
            fields = tuple(format_fields(logged, *_BAR_FIELDS))
            if isinstance(self._bar, _Bar):
                self._bar.run_left, self._bar.fields = run_left, fields
            else:
                self._bar.set_postfix_str(", ".join(fields), refresh=False)
        self._bar.update()

    def log_line(self, *fields: str) -> None:
        """Print a line at a log point: at `EVERY_LINE`, or without a bar after a long silence.

        `fields`: most important first. On a terminal, fields that do not fit its width are left out.
        """
        silent = self._bar is None and time.monotonic() - self._last_printed > _SILENCE_S
        if self._verbosity >= EVERY_LINE or silent:
            self._print_fields(fields)

    def end_epoch(self, *fields: str) -> None:
        """Remove the bar and print one line of `fields`, as `log_line` does."""
        self.close()
        self._print_fields(fields)

    def _print_fields(self, fields: Sequence[str]) -> None:
        first, *others = fields
        room = terminal_width(sys.stdout) if sys.stdout.isatty() else sys.maxsize
        self.say(first + fitting_fields(others, room - len(first)))

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Any]:
        """Replace the epoch's bar by a bar over `total` images. Yields a function to call with each batch's size."""
        self.close()
        if self._bar_class is None:
            yield lambda count: None
            return
        with self._bar_class(total=total, desc=what, leave=False) as bar:
            yield bar.update

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
