"""The errors that a user can cause, and mend. The command line ends with exit code 2 on them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lars_train.text import printable


class _OneLine(Exception):
    # What is wrong is often named as a file or a config names it.
    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConfigError(_OneLine, ValueError):
    """Bad input, found before a device is touched.

    The message says what is wrong, where (config key or file) and what to do, in one line of printable text.
    """


class DataError(_OneLine, RuntimeError):
    """Damaged data that the run's policy (``data.on_error``, ``data.max_bad``) does not tolerate; told in one line."""


class NotReady(RuntimeError):
    """``mode=check`` has found something to mend; the message says how much."""


class Diverged(RuntimeError):
    """The training loss has left what ``guard`` allows; the message is the report."""


class Stopped(Exception):
    """A signal has asked the run to end, and it has ended with a checkpoint; the message says how to go on.

    `code`: the exit code, 75 (EX_TEMPFAIL of sysexits.h: try again), or 128 and the signal's number where a second
    one has ended it at once.
    """

    def __init__(self, message: str, code: int = 75) -> None:
        super().__init__(message)
        self.code = code


def nearest(word: str, choices: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the choice closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
