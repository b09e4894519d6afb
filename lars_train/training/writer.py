"""Checkpoints from the background: the run waits for a copy to host memory, and not for the disk."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lars_train.training import checkpoint
from lars_train.training.checkpoint import DamagedCheckpoint
from lars_train.training.prepare import SAVED


class CheckpointWriter:
    """Writes the checkpoints of one run, one after another, in a thread.

    What cannot be written does not end the run: it is counted in `failures`, and the last whole checkpoint
    stays. `reason` says why the newest could not be written; empty if it could. `seconds`: what the newest that is
    whole took to write and verify; None before the first.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        self.failures, self.reason = 0, ""
        self.seconds: float | None = None

    def save(self, update: int, content: dict[str, Any]) -> None:
        """Begin to write the checkpoint of `update`; the one before it is waited for."""
        self.wait()
        self._pending.append(self._thread.submit(self._write, update, host_copy(content)))

    def refuse(self, update: int, reason: str) -> None:
        """Count the checkpoint of `update` as one that could not be written."""
        self.wait()
        self.failures += 1
        self.reason = f"the checkpoint of update {update} cannot be written: {reason}"

    def keep_best(self, update: int) -> None:
        """Keep the checkpoint of `update`, which was given to `save`, as ``best.pt`` too."""
        self._pending.append(self._thread.submit(self._keep_best, update))

    def wait(self) -> None:
        """Return when all that was begun is on disk, or has failed."""
        for future in self._pending:
            future.result()
        self._pending.clear()

    def close(self) -> None:
        """Wait, and end the thread."""
        self.wait()
        self._thread.shutdown()

    def _write(self, update: int, content: dict[str, Any]) -> None:
        started = time.perf_counter()
        try:
            checkpoint.save(self._folder, update, content, self._keep)
            (self._folder.parent / SAVED).touch()
        except (OSError, RuntimeError, DamagedCheckpoint) as error:  # torch tells of a full disk as RuntimeError
            self.failures += 1
            self.reason = (
                f"the checkpoint of update {update} cannot be written: {next(iter(str(error).splitlines()), '')}"
            )
        else:
            self.reason, self.seconds = "", time.perf_counter() - started

    def _keep_best(self, update: int) -> None:
        if not self.reason:
            try:
                checkpoint.keep_best(self._folder, update)
            except OSError as error:
                self.failures += 1
                self.reason = f"best.pt cannot be written: {error}"


def host_copy(value: Any) -> Any:
    """`value` with copies of its tensors in host memory; dicts, lists and tuples of them included."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: host_copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(host_copy(item) for item in value)
    return value
