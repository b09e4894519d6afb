"""The undecodable images of a run: named, counted once each over all ranks, and limited by ``data.max_bad``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
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

    def report(self, path: Path, update: int, say: Callable[[str], None]) -> None:
        """`collect`; the first rank tells the new ones and adds them to `path`, also where that raises. Collective.

        Args:
            path: ``bad_images.jsonl``, in which an image stands once however often the run is continued.
            update: the one that the run is at.
            say: takes a line for people.
        """
        before = len(self.known)
        try:
            self.collect()
        finally:
            if self._group.first:
                told = told_in(path)
                with path.open("a") as file:
                    for where, reason in list(self.known.items())[before:]:
                        if where in told:
                            continue
                        say(f"WARNING: image {where} cannot be decoded: {reason}")
                        file.write(json.dumps({"image": where, "reason": reason, "update": update}) + "\n")
