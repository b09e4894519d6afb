"""Text that came from elsewhere (names of files and classes, checkpoints, configs), made fit to be shown. And URLs."""

from __future__ import annotations

import re


def printable(text: str | bytes) -> str:
    """`text` as one line that a terminal acts on nowhere.

    What is no visible character (control characters, line breaks, bidirectional marks, lone surrogates; by
    `str.isprintable`) is spelt as Python's escape for it. Bytes are read as UTF-8, and those that are not
    become U+FFFD.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    """The same for text whose line breaks are meant."""
    return "\n".join(map(printable, text.split("\n")))


def is_url(text: str | None) -> bool:
    """Whether `text` names a place by a URL, as fsspec has them: ``s3://bucket/key``."""
    return text is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)", text) is not None
