"""Write the log of a run: a line of ``metrics.jsonl`` per logged update and per evaluation.

The same numbers go to TensorBoard, and LARS's trust ratios to ``trust_ratios.jsonl``. Only rank 0 has a log.
`tensorboard.py` adds the histograms, images and charts that only TensorBoard shows.
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
    """A JSON Lines file, opened to continue after `update`: lines of later updates are dropped.

    Lines that do not fit on a full disk wait in memory and are written later. `reason`: the error that keeps lines
    waiting; empty if none wait. `existing`: the names of the values that the file already has for `update`.
    """

    def __init__(self, path: Path, update: int) -> None:
        self.existing = drop_lines_after(path, update)
        self.file, self._path, self._name = path.open("ab", buffering=0), path, path.name
        self._written_bytes, self._pending = path.stat().st_size, list[bytes]()
        self.reason = ""

    def add(self, values: dict[str, Any]) -> None:
        """Append `values` as one line."""
        self._pending.append(json.dumps(values).encode() + b"\n")
        self._write_pending()

    def _write_pending(self) -> None:
        """Write the waiting lines; lines that do not fit on the disk keep waiting."""
        try:
            if self.reason:  # the last write may have written part of a line
                os.ftruncate(self.file.fileno(), self._written_bytes)
            while self._pending:
                written = self.file.write(self._pending[0])
                if written != len(self._pending[0]):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._written_bytes += written
                self._pending.pop(0)
        except OSError as error:
            self.reason = error.strerror or str(error)
        else:
            self.reason = ""

    def sync(self) -> None:
        """Write all lines and sync the file to disk. Raises `OSError`."""
        self._write_pending()
        if self._pending:
            raise OSError(f"{self._name}: {self.reason}")
        with name_in_errors(self._path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Write the waiting lines, as far as possible, and close the file."""
        self._write_pending()
        with contextlib.suppress(OSError):  # checkpoints rely only on lines that `sync` wrote
            self.file.close()


class RunLog:
    """The log of one run, opened to continue after `update`.

    Lines and events of later updates, which a killed run may have left, are dropped. Each update appears in the log
    once, even if a resumed run repeats the last evaluation. A value that is not finite is written as null. Raises
    `KeyError` for a field that is not in `FIELDS`.
    """

    def __init__(self, directory: Path, update: int) -> None:
        self._directory, self._start = directory, update
        write_atomic(directory / "metrics.fields.json", [json.dumps(_described(FIELDS), indent=1).encode() + b"\n"])
        self._metrics = JsonLinesFile(directory / "metrics.jsonl", update)
        self._ratios: JsonLinesFile | None = None
        if (directory / RATIOS_FILE).exists():
            self._ratios = JsonLinesFile(directory / RATIOS_FILE, update)
        self._described_layers: list[str] | None = None
        self._ratios_reason, self._pending_ratios = "", list[tuple[int, list[str], list[float]]]()
        self.board = TensorBoardWriter(directory / "tensorboard", update)

    @property
    def reason(self) -> str:
        """The error that keeps lines in memory or stopped TensorBoard's events; empty without an error."""
        ratios = self._ratios_reason or (self._ratios.reason if self._ratios else "")
        return self._metrics.reason or ratios or self.board.reason

    def write(self, update: int, epoch: float, values: dict[str, float | int]) -> None:
        """Write `values` as one line, and one TensorBoard point per value."""
        for name in values:
            FIELDS[name]
        if update == self._start and values.keys() <= self._metrics.existing:
            return
        self._metrics.add({"update": update, "epoch": round(epoch, 6), **_finite(values)})
        self.board.scalars(values, update)

    def write_ratios(self, update: int, layers: list[str], ratios: list[float]) -> None:
        """Write one line of trust ratios, one per layer. Does not raise if the disk is full."""
        if update == self._start and self._ratios is not None and self._ratios.existing:
            return
        self._pending_ratios.append((update, layers, ratios))
        self._write_waiting_ratios()

    def _write_waiting_ratios(self) -> None:
        """Write the waiting trust ratios. Lines that do not fit on the disk keep waiting."""
        try:
            while self._pending_ratios:
                update, layers, ratios = self._pending_ratios[0]
                if self._described_layers != layers:
                    described = {**_described(RATIO_FIELDS), "layers": layers}
                    text = json.dumps(described, indent=1) + "\n"
                    write_atomic(self._directory / "trust_ratios.fields.json", [text.encode()])
                    self._described_layers = layers
                if self._ratios is None:
                    self._ratios = JsonLinesFile(self._directory / RATIOS_FILE, update)
                self._add_ratios(self._ratios, update, ratios)
                self._pending_ratios.pop(0)
        except OSError as error:
            self._ratios_reason = error.strerror or str(error)
        else:
            self._ratios_reason = ""

    @staticmethod
    def _add_ratios(file: JsonLinesFile, update: int, ratios: list[float]) -> None:
        # Four digits are enough for a plot, and take a third of the space.
        kept = [float(f"{ratio:.4g}") if math.isfinite(ratio) else None for ratio in ratios]
        file.add({"update": update, "trust_ratios": kept})

    def finish(self, settings: dict[str, Any], fields: list[str]) -> None:
        """Show the run's settings in TensorBoard's hparams tab, with the last values of `fields` as its results."""
        self.board.results(settings, fields)

    def sync(self) -> None:
        """Write and sync the log to disk. Call before a checkpoint, which relies on earlier lines. Raises `OSError`."""
        self._metrics.sync()
        self._write_waiting_ratios()
        if self._ratios_reason:
            raise OSError(f"{RATIOS_FILE}: {self._ratios_reason}")
        if self._ratios is not None:
            self._ratios.sync()
        self.board.flush()

    def close(self) -> None:
        """Write the waiting lines, as far as possible, and close the files."""
        self._metrics.close()
        if self._ratios is not None:
            self._ratios.close()
        self.board.close()


def _described(fields: dict[str, tuple[str, str]]) -> dict[str, Any]:
    return {name: {"unit": unit, "meaning": meaning} for name, (unit, meaning) in fields.items()}


def _finite(values: dict[str, float | int]) -> dict[str, float | int | None]:
    # JSON has no NaN or infinity: strict readers reject the names that Python would write.
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def drop_lines_after(path: Path, update: int) -> set[str]:
    """Drop the lines of later updates, and a line that a kill cut short. Atomic.

    Returns the names of the values that the file has for `update` itself.
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
