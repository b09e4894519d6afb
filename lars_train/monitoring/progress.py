"""What a person sees while a run goes on: bars on a terminal, one plain line per epoch elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from lars_train.monitoring.say import unread
from lars_train.text import printable


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar that the end of its terminal does not stop."""

    def display(self, *arguments: Any, **keywords: Any) -> None:
        with unread():
            super().display(*arguments, **keywords)


class Progress:
    """The display of rank 0; on other ranks (`shown` False) it says nothing."""

    def __init__(self, *, shown: bool, epochs: int) -> None:
        self._shown = shown
        self._bars = shown and sys.stderr.isatty()
        self._epochs = epochs
        self._bar: Any = None

    def say(self, text: str) -> None:
        """One line of text, above the bar if there is one."""
        if self._shown:
            with unread():
                tqdm.write(printable(text), file=sys.stdout)
                sys.stdout.flush()

    def start_epoch(self, epoch: int, updates: int, done: int) -> None:
        """A bar for epoch `epoch` (from 0) of `updates` updates, `done` of them behind us."""
        if self._bars:
            self._bar = _Bar(
                total=updates,
                initial=done,
                desc=f"epoch {epoch + 1}/{self._epochs}",
                unit="update",
                leave=False,
                dynamic_ncols=True,
            )

    def advance(self, logged: dict[str, float]) -> None:
        """One update further; the last logged values stand behind the bar."""
        if self._bar is None:
            return
        if logged:
            self._bar.set_postfix(
                {
                    "loss": f"{logged['train/loss']:.3f}",
                    "top1": f"{logged['train/top1']:.1f}%",
                    "lr": f"{logged['train/lr']:.3g}",
                    "img/s": f"{logged['train/images_per_s']:,.0f}",
                },
                refresh=False,
            )
        self._bar.update()

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
