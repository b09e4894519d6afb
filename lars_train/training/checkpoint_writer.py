"""Write checkpoints in the background. Training waits for the copy to host memory, but not for the disk."""

from __future__ import annotations

import errno
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lars_train.messages import first_line
from lars_train.training import checkpoint
from lars_train.training.checkpoint import DamagedCheckpoint
from lars_train.training.prepare import SAVED


class CheckpointWriter:
    """Writes the checkpoints of one run, one after another, in a thread.

    Only rank 0 writes. On the other ranks, only `begin` has an effect.

    A failed write does not end the run, and the last complete checkpoint stays.

    Attributes:
        failures: the number of failed writes.
        last_failure: the reason for the latest failure, even if a later write succeeded.
        seconds: the time to write and verify the newest complete checkpoint; None before the first.
        best_lost: the update of the best checkpoint, if ``best.pt`` could not be written; otherwise None.
        saved_update: the update of the last checkpoint that was started.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        self.failures, self.last_failure, self._reason, self._best_reason = 0, "", "", ""
        self._best: int | None = None
        self.best_lost: int | None = None
        self.seconds: float | None = None
        self._directory = _identity(folder.parent)
        self.begin(0)

    @property
    def reason(self) -> str:
        """The reason why the newest checkpoint or ``best.pt`` is not on disk; empty if both are."""
        return self._reason or self._best_reason

    def begin(self, update: int) -> None:
        """Record, on every rank, that the checkpoint of `update` is started, or that training resumes from it."""
        self.saved_update, self._began_at = update, time.perf_counter()

    def is_overdue(self, every_minutes: float | None) -> bool:
        """Return True if more than `every_minutes` have passed since the last checkpoint or the start."""
        return every_minutes is not None and time.perf_counter() - self._began_at > 60 * every_minutes

    def save(self, update: int, content: dict[str, Any]) -> None:
        """Wait for the previous checkpoint, then start writing the one of `update`."""
        self.wait()
        self._pending.append(self._thread.submit(self._write, update, host_copy(content)))

    def record_failure(self, update: int, reason: str) -> None:
        """Record that the checkpoint of `update` could not be written."""
        self.wait()
        self._reason = self._failed(f"the checkpoint of update {update} cannot be written: {reason}")

    def keep_best(self, update: int) -> None:
        """Also keep the checkpoint of `update`, which was passed to `save`, as ``best.pt``."""
        self._pending.append(self._thread.submit(self._keep_best, update))

    def roll_back(self, update: int, best_update: int | None) -> None:
        """Remove the checkpoints after `update`, and ``best.pt`` if it is later; then restore it from `best_update`."""
        checkpoint.remove_later(self._folder, update)
        checkpoint.roll_back_best(self._folder, update, best_update)
        # A later best checkpoint has been removed. Its update will be made again, with other weights.
        if self._best is not None and self._best > update:
            self._best, self._best_reason = None, ""
        if self.best_lost is not None and self.best_lost > update:
            self.best_lost = None

    def wait(self) -> None:
        """Wait until every started checkpoint is on disk or has failed."""
        for future in self._pending:
            future.result()
        self._pending.clear()

    def close(self) -> None:
        """Wait for pending writes, then end the thread."""
        self.wait()
        self._thread.shutdown()

    def _write(self, update: int, content: dict[str, Any]) -> None:
        started = time.perf_counter()
        try:
            if _identity(self._folder.parent) != self._directory:
                raise OSError(errno.ENOENT, "the run directory was removed or replaced")
            checkpoint.save(self._folder, update, content, self._keep, self._best)
            (self._folder.parent / SAVED).touch()
        except (OSError, RuntimeError, DamagedCheckpoint) as error:
            self._reason = self._failed(f"the checkpoint of update {update} cannot be written: {_reason_of(error)}")
        else:
            self._reason, self.seconds = "", time.perf_counter() - started
            self._put_best()

    def _failed(self, reason: str) -> str:
        self.last_failure, self.failures = reason, self.failures + 1
        return reason

    def _keep_best(self, update: int) -> None:
        self._best = update
        self._put_best()

    def _put_best(self) -> None:
        """Make ``best.pt`` the best checkpoint. After a failure, the next `save` tries again."""
        if self._best is None:
            return
        if not checkpoint.path_of(self._folder, self._best).exists():
            self.best_lost, self._best, self._best_reason = self._best, None, ""
            return
        try:
            checkpoint.keep_best(self._folder, self._best)
        except OSError as error:
            self._best_reason = self._failed(f"best.pt cannot be written: {_reason_of(error)}")
        else:
            self._best, self.best_lost, self._best_reason = None, None, ""


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _reason_of(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else None
    return text or first_line(error)


def host_copy(value: Any) -> Any:
    """Return `value` with all tensors, including those in dicts, lists and tuples, copied to host memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: host_copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(host_copy(item) for item in value)
    return value
