"""Errors that a user can cause and fix. `cli.py` turns them into exit codes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from lars_train.messages import printable


class _OneLine(Exception):
    # Messages often contain text from files and configs.
    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConfigError(_OneLine, ValueError):
    """Bad input, found before a device is touched.

    The message says in one printable line what is wrong, where (config key or file) and what to do.
    """


class DataError(_OneLine, RuntimeError):
    """Damaged data beyond ``data.max_bad``, or a failed disk, download or worker. The message is one line."""


class NotReady(RuntimeError):
    """``mode=check`` found problems. The message states how many."""


class Diverged(RuntimeError):
    """A loss that is too large or not finite, or gradients that stay non-finite. The message may have several lines."""


class Stopped(Exception):
    """A termination signal ended the run. The same command resumes from the last checkpoint.

    `code` is the exit code: 75 (EX_TEMPFAIL of sysexits.h, "try again"). If a second signal ended the run at once, the
    code is 128 plus the number of that signal.
    """

    def __init__(self, message: str, code: int = 75) -> None:
        super().__init__(message)
        self.code = code


_MIN_SIMILARITY = 0.7


def closest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that `word` misspells or abbreviates, or None: a wrong suggestion is worse than none.

    Case is ignored. Different digits mean a different thing, not a misspelling: ``fp8`` is not ``fp64``.
    """
    lowered, digits = word.casefold(), re.findall(r"\d", word)
    best, similarity, abbreviated = None, 0.0, []
    for choice in choices:
        other = choice.casefold()
        if other == lowered:
            return choice
        choice_digits = re.findall(r"\d", choice)
        if (len(lowered) >= 3 and other.startswith(lowered)) or (len(other) >= 4 and lowered.startswith(other)):
            abbreviated += [choice] if not choice_digits else []
        if choice_digits == digits:
            ratio = difflib.SequenceMatcher(None, lowered, other).ratio()
            if ratio > similarity:
                best, similarity = choice, ratio
    if similarity >= _MIN_SIMILARITY:
        return best
    return abbreviated[0] if len(abbreviated) == 1 else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the `closest` choice, or an empty string."""
    close = closest(word, choices)
    return f" Did you mean {close!r}?" if close else ""
