"""``divergence.jsonl``: the divergences of a run, and what was done about each. Only rank 0 writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lars_train.durable import write_whole
from lars_train.training.guard import Divergence

NAME = "divergence.jsonl"


def record(directory: Path, divergence: Divergence, action: dict[str, Any]) -> None:
    """One more line, with `action`: what is done now, and where the run goes on."""
    with (directory / NAME).open("a") as file:
        file.write(json.dumps({**divergence.record(), **action}) + "\n")


def take_back(directory: Path, rollbacks: int) -> None:
    """Leave the first `rollbacks` rollbacks, those that a continued run knows of: one that a kill undid is made again.

    A line that a kill cut short goes, too.
    """
    path = directory / NAME
    if not path.exists():
        return
    kept, found, whole = [], 0, path.read_bytes()
    for line in whole.splitlines(keepends=True):
        is_rollback = b'"action": "rollback"' in line
        found += is_rollback
        if line.endswith(b"\n") and not (is_rollback and found > rollbacks):
            kept.append(line)
    if b"".join(kept) != whole:
        write_whole(path, kept)
