"""An emulator of the terminal features that the program uses: line ends, cursor up, erase, and colors."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_PART = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(.)", re.DOTALL)


class Screen:
    """A screen of `columns` columns and any number of lines.

    After a character in the last column, the cursor moves to the next line only when another character follows.
    """

    def __init__(self, columns: int) -> None:
        self.columns, self._row, self._column = columns, 0, 0
        self._cells: list[list[str]] = [[]]

    @property
    def lines(self) -> list[str]:
        """Return the visible lines, without trailing blanks."""
        lines = ["".join(cells).rstrip() for cells in self._cells]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def feed(self, text: str) -> None:
        """Update the screen as a terminal does for `text`."""
        for number, command, character in _PART.findall(text):
            if command == "A":
                self._row = max(0, self._row - int(number or 1))
            elif command == "K":
                del self._cells[self._row][self._column :]
            elif command:
                assert command == "m", f"ESC[{number}{command}"
            elif character == "\r":
                self._column = 0
            elif character == "\n":
                self._down()
            else:
                assert character.isprintable(), repr(character)
                self._put(character)

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self._cells):
            self._cells.append([])

    def _put(self, character: str) -> None:
        if self._column == self.columns:
            self._down()
            self._column = 0
        cells = self._cells[self._row]
        cells.extend(" " * (self._column + 1 - len(cells)))
        cells[self._column] = character
        self._column += 1


class Terminal(Screen):
    """A screen that shows what is written to `file`, the other end of a pseudo-terminal."""

    def __init__(self, columns: int) -> None:
        super().__init__(columns)
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self._master, False)
        self.file = os.fdopen(slave, "w", encoding="utf-8")

    def read(self) -> list[str]:
        """Show the output since the last call, and return the lines of the screen."""
        self.file.flush()
        found = b""
        while True:
            try:
                found += os.read(self._master, 1 << 16)
            except (BlockingIOError, OSError):
                break
        self.feed(found.decode())
        return self.lines

    def close(self) -> None:
        """Close both ends of the pseudo-terminal."""
        self.file.close()
        os.close(self._master)


@contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Replace standard output and error by a terminal with `columns` columns."""
    monkeypatch.setenv("TERM", "xterm")
    found = Terminal(columns)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", found.file)
            patch.setattr(sys, "stderr", found.file)
            yield found
    finally:
        found.close()
