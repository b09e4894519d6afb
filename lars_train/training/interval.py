"""The time between two log lines: how fast its updates were, and what they waited for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Interval:
    """Since the log line of `update`, or since training went on from there. All times in seconds.

    `started`: on the clock of `time.perf_counter`, later by what is left out.
    """

    update: int
    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    """For input."""
    saving: float = 0.0
    """For checkpoints; not in the time of the updates."""

    def leave_out(self, seconds: float) -> None:
        """Of something that is no update: an evaluation."""
        self.started += seconds

    def save(self, seconds: float) -> None:
        """Of a checkpoint."""
        self.saving += seconds
        self.leave_out(seconds)

    def values(
        self, update: int, now: float, *, global_batch: int, flops_per_image: float, peak_flops: float
    ) -> dict[str, float]:
        """What the log line of `update` says, by the names of `fields.FIELDS`.

        Args:
            update: the last one in the interval, whose work the device has done.
            now: `time.perf_counter()` of that moment.
            global_batch: images of an update.
            flops_per_image: floating-point operations that an image takes, forward and backward.
            peak_flops: operations a second that all ranks together could do.
        """
        elapsed = now - self.started
        rate = (update - self.update) * global_batch / elapsed
        return {
            "train/images_per_s": rate,
            "train/mfu": rate * flops_per_image / peak_flops,
            "train/wait_share": self.waited / elapsed,
            "checkpoint/wait_seconds": self.saving,
        }
