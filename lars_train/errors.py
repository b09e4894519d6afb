"""The errors that a user can cause, and mend. The command line ends with exit code 2 on them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from lars_train.messages import printable


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


_LEAST_LIKENESS = 0.7


def closest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that `word` is a misspelling or the beginning of, or None: no answer beats a wrong one.

    Case does not count. A choice with other digits is another thing and no misspelling: ``fp8`` is not ``fp64``.
    """
    lowered, digits = word.casefold(), re.findall(r"\d", word)
    best, likeness, begun = None, 0.0, []
    for choice in choices:
        other = choice.casefold()
        if other == lowered:
            return choice
        theirs = re.findall(r"\d", choice)
        if (len(lowered) >= 3 and other.startswith(lowered)) or (len(other) >= 4 and lowered.startswith(other)):
            begun += [choice] if not theirs else []
        if theirs == digits:
            ratio = difflib.SequenceMatcher(None, lowered, other).ratio()
            if ratio > likeness:
                best, likeness = choice, ratio
    if likeness >= _LEAST_LIKENESS:
        return best
    return begun[0] if len(begun) == 1 else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the `closest` choice, or an empty string."""
    close = closest(word, choices)
    return f" Did you mean {close!r}?" if close else ""
