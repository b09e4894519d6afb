"""Writes what a run measures: one line of ``metrics.jsonl`` per logged update and per evaluation, and the
same numbers to TensorBoard. Only rank 0 makes one.
"""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from lars_train.monitoring.fields import FIELDS
from lars_train.text import printable


class RunLog:
    """The log of one run, opened so that it goes on at `update`.

    Lines and events of later updates, which a killed run may have left, are taken back: each update
    stands in the log once, also if the last evaluation is made again. A value that is not finite stands as
    null. Raises `KeyError` for a field that `FIELDS` does not describe.
    """

    def __init__(self, directory: Path, update: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        path = directory / "metrics.jsonl"
        self._start, self._there = update, keep_up_to(path, update)
        self._lines = path.open("ab", buffering=0)
        self._whole, self._pending = path.stat().st_size, list[bytes]()
        self.reason = ""
        """Why lines wait in memory for the disk, or why TensorBoard's events have ended; empty if all is well."""
        units = {name: {"unit": unit, "meaning": meaning} for name, (unit, meaning) in FIELDS.items()}
        (directory / "metrics.fields.json").write_text(json.dumps(units, indent=1) + "\n")
        self._board: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=update + 1)

    def write(self, update: int, epoch: float, values: dict[str, float | int]) -> None:
        """One line, and one TensorBoard point per value."""
        for name in values:
            FIELDS[name]
        if update == self._start and values.keys() <= self._there:
            return
        line = json.dumps({"update": update, "epoch": round(epoch, 6), **_finite(values)}) + "\n"
        self._pending.append(line.encode())
        self._put()
        for name, value in values.items():
            self._show("add_scalar", name, value, update)

    def finish(self, settings: dict[str, Any], results: dict[str, float]) -> None:
        """Show the run's settings with its results in TensorBoard's hparams tab."""
        simple = {
            printable(k): v if isinstance(v, bool | int | float) else printable(str(v)) for k, v in settings.items()
        }
        self._show("add_hparams", simple, results, run_name=".")

    def sync(self) -> None:
        """Put what was written so far on disk: a checkpoint that follows relies on it. Raises `OSError`."""
        self._put()
        if self._pending:
            raise OSError(f"metrics.jsonl: {self.reason}")
        os.fsync(self._lines.fileno())
        self._show("flush")

    def close(self) -> None:
        """Write out what can be, and close the files."""
        self._put()
        self._lines.close()
        self._show("close")

    def _put(self) -> None:
        """Write the lines that wait; those that do not fit on the disk go on waiting."""
        try:
            if self.reason:  # a line may have been cut short
                os.ftruncate(self._lines.fileno(), self._whole)
            while self._pending:
                written = self._lines.write(self._pending[0])
                if written != len(self._pending[0]):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._whole += written
                self._pending.pop(0)
        except OSError as error:
            self.reason = error.strerror or str(error)
        else:
            self.reason = "" if self._board is not None else self.reason

    def _show(self, method: str, *arguments: Any, **keywords: Any) -> None:
        """Do it on TensorBoard's writer, which is given up when it fails: it has no way to go on."""
        if self._board is None:
            return
        try:
            getattr(self._board, method)(*arguments, **keywords)
        except Exception as error:  # of its thread, whatever it was
            self._board, self.reason = None, f"TensorBoard: {error}"


def _finite(values: dict[str, float | int]) -> dict[str, float | int | None]:
    # JSON has no word for NaN and infinity; strict readers refuse what Python would write.
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def keep_up_to(path: Path, update: int) -> set[str]:
    """Drop the lines of later updates and a line that a kill cut short; atomically.

    Returns the names of what stands there for `update` itself.
    """
    kept: list[str] = []
    names: set[str] = set()
    if not path.exists():
        return names
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
            if values["update"] <= update:
                kept.append(line)
            if values["update"] == update:
                names.update(values)
        except (ValueError, KeyError, TypeError):
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    partial.replace(path)
    return names
