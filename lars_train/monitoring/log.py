"""Writes what a run measures: one line of ``metrics.jsonl`` per logged update and per evaluation, the same numbers
to TensorBoard, and LARS's trust ratios to ``trust_ratios.jsonl``. Only rank 0 makes one. What TensorBoard has beyond
these numbers is in `board`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from lars_train.fsutil import name_in_errors, write_atomic
from lars_train.monitoring.fields import FIELDS, RATIO_FIELDS
from lars_train.monitoring.tensorboard import TensorBoardWriter

RATIOS_FILE = "trust_ratios.jsonl"


class JsonLinesFile:
    """A file of JSON lines that goes on at `update`: lines of later ones are taken back.

    Lines that the disk refuses wait in memory until it takes them; `reason` says why they do, and is empty if none do.
    `there`: the names of what stands in the file for `update` itself.
    """

    def __init__(self, path: Path, update: int) -> None:
        self.there = drop_lines_after(path, update)
        self.file, self._path, self._name = path.open("ab", buffering=0), path, path.name
        self._whole, self._pending = path.stat().st_size, list[bytes]()
        self.reason = ""

    def add(self, values: dict[str, Any]) -> None:
        """One more line."""
        self._pending.append(json.dumps(values).encode() + b"\n")
        self.put()

    def put(self) -> None:
        """Write the lines that wait; those that do not fit on the disk go on waiting."""
        try:
            if self.reason:  # a line may have been cut short
                os.ftruncate(self.file.fileno(), self._whole)
            while self._pending:
                written = self.file.write(self._pending[0])
                if written != len(self._pending[0]):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._whole += written
                self._pending.pop(0)
        except OSError as error:
            self.reason = error.strerror or str(error)
        else:
            self.reason = ""

    def sync(self) -> None:
        """Put what was written so far on disk. Raises `OSError`."""
        self.put()
        if self._pending:
            raise OSError(f"{self._name}: {self.reason}")
        with name_in_errors(self._path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Write out what can be, and close the file."""
        self.put()
        with contextlib.suppress(OSError):  # what `sync` did not put on disk, no checkpoint relies on
            self.file.close()


class RunLog:
    """The log of one run, opened so that it goes on at `update`.

    Lines and events of later updates, which a killed run may have left, are taken back: each update
    stands in the log once, also if the last evaluation is made again. A value that is not finite stands as
    null. Raises `KeyError` for a field that `FIELDS` does not describe.
    """

    def __init__(self, directory: Path, update: int) -> None:
        self._directory, self._start = directory, update
        self._metrics = JsonLinesFile(directory / "metrics.jsonl", update)
        self._ratios: JsonLinesFile | None = None
        if (directory / RATIOS_FILE).exists():
            self._ratios = JsonLinesFile(directory / RATIOS_FILE, update)
        self._ratios_of: list[str] | None = None
        self._no_ratios, self._ratios_waiting = "", list[tuple[int, list[str], list[float]]]()
        write_atomic(directory / "metrics.fields.json", [json.dumps(_described(FIELDS), indent=1).encode() + b"\n"])
        self.board = TensorBoardWriter(directory / "tensorboard", update)

    @property
    def reason(self) -> str:
        """Why lines wait in memory for the disk, or why TensorBoard's events have ended; empty if all is well."""
        ratios = self._no_ratios or (self._ratios.reason if self._ratios else "")
        return self._metrics.reason or ratios or self.board.reason

    def write(self, update: int, epoch: float, values: dict[str, float | int]) -> None:
        """One line, and one TensorBoard point per value."""
        for name in values:
            FIELDS[name]
        if update == self._start and values.keys() <= self._metrics.there:
            return
        self._metrics.add({"update": update, "epoch": round(epoch, 6), **_finite(values)})
        self.board.scalars(values, update)

    def write_ratios(self, update: int, layers: list[str], ratios: list[float]) -> None:
        """One line of trust ratios, one for each of the `layers`. Raises nothing for a disk that is full."""
        if update == self._start and self._ratios is not None and self._ratios.there:
            return
        self._ratios_waiting.append((update, layers, ratios))
        self._put_ratios()

    def _put_ratios(self) -> None:
        """Write the trust ratios that wait for their files; those that the disk refuses go on waiting."""
        try:
            while self._ratios_waiting:
                update, layers, ratios = self._ratios_waiting[0]
                if self._ratios_of != layers:
                    described = {**_described(RATIO_FIELDS), "layers": layers}
                    text = json.dumps(described, indent=1) + "\n"
                    write_atomic(self._directory / "trust_ratios.fields.json", [text.encode()])
                    self._ratios_of = layers
                if self._ratios is None:
                    self._ratios = JsonLinesFile(self._directory / RATIOS_FILE, update)
                self._add_ratios(self._ratios, update, ratios)
                self._ratios_waiting.pop(0)
        except OSError as error:
            self._no_ratios = error.strerror or str(error)
        else:
            self._no_ratios = ""

    @staticmethod
    def _add_ratios(file: JsonLinesFile, update: int, ratios: list[float]) -> None:
        # Four digits are what a picture can show, and a third of the size.
        kept = [float(f"{ratio:.4g}") if math.isfinite(ratio) else None for ratio in ratios]
        file.add({"update": update, "trust_ratios": kept})

    def finish(self, settings: dict[str, Any], fields: list[str]) -> None:
        """Show the run's settings in TensorBoard's hparams tab, with the last values of `fields` as its results."""
        self.board.results(settings, fields)

    def sync(self) -> None:
        """Put what was written so far on disk: a checkpoint that follows relies on it. Raises `OSError`."""
        self._metrics.sync()
        self._put_ratios()
        if self._no_ratios:
            raise OSError(f"{RATIOS_FILE}: {self._no_ratios}")
        if self._ratios is not None:
            self._ratios.sync()
        self.board.flush()

    def close(self) -> None:
        """Write out what can be, and close the files."""
        self._metrics.close()
        if self._ratios is not None:
            self._ratios.close()
        self.board.close()


def _described(fields: dict[str, tuple[str, str]]) -> dict[str, Any]:
    return {name: {"unit": unit, "meaning": meaning} for name, (unit, meaning) in fields.items()}


def _finite(values: dict[str, float | int]) -> dict[str, float | int | None]:
    # JSON has no word for NaN and infinity; strict readers refuse what Python would write.
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def drop_lines_after(path: Path, update: int) -> set[str]:
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
    write_atomic(path, ["".join(line + "\n" for line in kept).encode()])
    return names
