"""The undecodable images of a run: named, counted once each over all ranks, and limited by ``data.max_bad``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from lars_train.data.loader import BadSample
from lars_train.errors import DataError
from lars_train.training.distributed import Group


def told_in(path: Path) -> set[str]:
    """The images that ``bad_images.jsonl`` names already; a line that a kill cut short names none."""
    told = set()
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            told.add(json.loads(line)["image"])
        except (ValueError, KeyError, TypeError):
            continue
    return told


class BadImages:
    """What all ranks have found so far; the same on every rank after `collect`."""

    def __init__(self, limit: int, group: Group, known: Iterable[tuple[str, str]] = ()) -> None:
        self._limit, self._group = limit, group
        self.known: dict[str, str] = dict(known)
        self._found: dict[str, str] = {}

    def note(self, samples: Iterable[BadSample]) -> None:
        """Remember what this rank has met."""
        for sample in samples:
            self._found[sample.where] = sample.reason

    def collect(self) -> dict[str, str]:
        """Join what the ranks have met; the new ones, as place and reason. Collective.

        Raises `DataError` on every rank when there are more than the limit.
        """
        everyone = self._group.gather(self._found)
        self._found = {}
        new = {w: r for part in everyone for w, r in sorted(part.items()) if w not in self.known}
        self.known.update(new)
        if len(self.known) > self._limit:
            shown = "; ".join(f"{where} ({reason})" for where, reason in list(self.known.items())[:5])
            raise DataError(
                f"{len(self.known)} images cannot be decoded, more than data.max_bad={self._limit}: {shown}. "
                "Mend the data set, or raise data.max_bad."
            )
        return new
