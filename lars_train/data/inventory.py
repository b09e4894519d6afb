"""Record which splits are read from a data set, and count the skipped entries by reason.

The readers count; this module merges, formats, stores and parses the counts.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lars_train.data.splits import TEST, VALIDATION
from lars_train.messages import counted, printable

BESIDE = "folders beside the splits"
LOOSE = "images outside class folders"
UNSAFE = "entries with unsafe names"

# The most reasons in a line, the most reasons kept, and the longest suffix shown.
_SHOWN, _KEPT, _SUFFIX = 5, 30, 12
_OTHERS = "others"
_PLURALS = re.compile(r"\b(file|image|folder|link|shard|column|group|row|entrie)s\b")


@dataclass(frozen=True)
class Inventory:
    """The splits that are read from a data set, and counts of the skipped entries. Empty by default."""

    train: str = ""
    """The name of the training set; empty if the class folders lie in the root."""
    val: str = ""
    """The name of the validation set; empty if it is held out of the training set."""
    unused: tuple[str, ...] = ()
    """Names of further splits, which are not read."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Counts of skipped entries by reason: ``{".txt files": 3}``."""
    unvalidated: int = 0
    """Number of classes without validation images."""
    lookalikes: tuple[str, ...] = ()
    """Some classes whose names are easily confused, see `find_lookalikes`."""
    label_notes: tuple[str, ...] = ()
    """Notes on the source of labels in tars, if it is not obvious: ``labels from .json (category)``."""

    def lines(self) -> Iterator[str]:
        """Yield lines for the log: the validation split, notes, and skipped entries. An empty inventory yields none."""
        unused = f"; not used: {', '.join(map(printable, self.unused))}" if self.unused else ""
        if self.val.lower() == TEST:
            others = ", ".join(VALIDATION[:-1])
            yield f"NOTE: {printable(self.val)} is used for validation, because none of {others} exists{unused}"
        elif self.val:
            yield f"validation: {printable(self.val)}{unused}"
        elif unused:
            yield unused[2:]
        if self.unvalidated:
            yield f"NOTE: classes without validation images: {self.unvalidated:,}"
        if self.lookalikes:
            yield f"NOTE: classes whose names look alike: {', '.join(map(printable, self.lookalikes))}"
        yield from (f"NOTE: {note}" for note in self.label_notes)
        if self.skipped:
            yield f"skipped: {format_counts(self.skipped)}"

    def record(self) -> dict[str, Any]:
        """Return the inventory as plain values, for JSON."""
        return {
            "train": printable(self.train),
            "val": printable(self.val),
            "unused": list(map(printable, self.unused)),
            "skipped": dict(self.skipped),
            "classes_without_validation": self.unvalidated,
            "classes_alike": list(map(printable, self.lookalikes)),
            "labels": list(map(printable, self.label_notes)),
        }


def find_lookalikes(classes: Sequence[str]) -> tuple[str, ...]:
    """Return up to five classes whose names differ from others only in case, surrounding spaces or Unicode form."""
    keys = [unicodedata.normalize("NFC", name).casefold().strip() for name in classes]
    count = Counter(keys)
    return tuple(name for name, key in zip(classes, keys, strict=True) if count[key] > 1)[:_SHOWN]


def format_counts(skipped: Mapping[str, int]) -> str:
    """Format the five most frequent reasons and the sum of the rest: ``12 .txt files, 1 hidden folder, 3 others``."""
    frequent = sorted(skipped.keys() - {_OTHERS}, key=lambda reason: (-skipped[reason], reason))[:_SHOWN]
    shown = [_counted(skipped[reason], reason) for reason in frequent]
    rest = sum(skipped.values()) - sum(skipped[reason] for reason in frequent)
    return ", ".join([*shown, *([counted(rest, "other")] if rest else [])])


def _counted(count: int, reason: str) -> str:
    if count == 1:
        reason = _PLURALS.sub(lambda match: "entry" if match[1] == "entrie" else match[1], reason, count=1)
    return f"{count:,} {reason}"


def merge_counts(*parts: Mapping[str, int]) -> dict[str, int]:
    """Sum counts by reason, and sort them by reason. Keeps the 30 most frequent; the rest count as ``others``."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    kept = dict(sorted(total.items(), key=lambda pair: (pair[0] == _OTHERS, -pair[1], pair[0]))[:_KEPT])
    rest = sum(total.values()) - sum(kept.values())
    if rest:
        kept[_OTHERS] = kept.get(_OTHERS, 0) + rest
    return dict(sorted(kept.items()))


def suffix_reason(name: bytes) -> str:
    """Return the reason for skipping a file that is not an image, by its suffix: ``.txt files``."""
    stem, dot, suffix = name.rpartition(b"/")[2].rpartition(b".")
    if not dot or not stem or not suffix:
        return "files without a suffix"
    text = printable(suffix).lower()
    return f".{text} files" if len(text) <= _SUFFIX else "files of other kinds"


def parse_counts(content: Any) -> dict[str, int]:
    """Return counts from the JSON of an untrusted file. Raises ValueError if they are malformed."""
    if not isinstance(content, dict) or len(content) > _KEPT + 1:
        raise ValueError("the counts of skipped files are malformed")
    for reason, count in content.items():
        if not (isinstance(reason, str) and len(reason) <= 100 and type(count) is int and 0 <= count < 1 << 62):
            raise ValueError("the counts of skipped files are malformed")
    return {printable(reason): count for reason, count in content.items()}


def parse_inventory(content: Any) -> Inventory:
    """Return an inventory from the `Inventory.record` in an untrusted file.

    Raises ValueError, KeyError or TypeError if it is malformed.
    """
    # Stores of earlier versions have no notes on labels.
    names, notes = [content["train"], content["val"], *content["unused"]], [*content.get("labels", ())]
    if len(names) + len(notes) > 100 or not all(isinstance(text, str) and len(text) <= 1000 for text in names + notes):
        raise ValueError("the names of its splits are malformed")
    train, val, *unused = map(printable, names)
    skipped = parse_counts(content["skipped"])
    return Inventory(train, val, tuple(unused), skipped, label_notes=tuple(map(printable, notes)))
