"""Log a run: values of updates and evaluations to files and TensorBoard, bad images, and lines on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lars_train.config import Config, experiment_settings
from lars_train.data.loading.loader import Batch, LoaderStatistics
from lars_train.data.transforms import TrainingSizes
from lars_train.monitoring.energy import JOULES_PER_KWH, EnergyMeter
from lars_train.monitoring.log import RunLog
from lars_train.monitoring.memory import memory
from lars_train.monitoring.progress import Progress
from lars_train.monitoring.summary import epoch_fields, validation_gap_note
from lars_train.monitoring.trackers import FOLDER, finish_trackers, start_trackers
from lars_train.run_plan import evaluation_is_due
from lars_train.training.checkpoint import RunState
from lars_train.training.checkpoint_writer import CheckpointWriter
from lars_train.training.evaluation import Result
from lars_train.training.guard import BadImages
from lars_train.training.metrics import Flops, Interval, Measures
from lars_train.training.trainer import Trainer, UpdateInfo

_SHOWN_IMAGES = 32


class MetricsLogger:
    """Computes a run's values on every rank, writes them on rank 0, and shows them through `progress`.

    The argument `flops` holds the peak of one rank.

    Attributes:
        log: the files and TensorBoard events; None except on rank 0.
        interval: the time since the last log line.
        values: the values of the last log line.
        run_left: the estimated seconds to the end of the run, as of the last log line.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        trainer: Trainer,
        state: RunState,
        *,
        progress: Progress,
        writer: CheckpointWriter,
        bad: BadImages,
        workers: int,
        flops: Flops,
    ) -> None:
        self._config, self._directory, self._trainer, self._state = config, directory, trainer, state
        self._progress, self._writer, self._workers = progress, writer, workers
        self._flops = flops if flops.peak is None else replace(flops, peak=flops.peak * trainer.group.ranks.world)
        self.bad = bad
        self._parameter_names = {id(p): name for name, p in trainer.network.named_parameters()}
        self._bad_path = directory / "bad_images.jsonl"
        self._sizes = TrainingSizes.from_config(config.data)
        self._evaluation_seconds = 0.0
        self._reported_reason, self._reported_failures = "", 0
        self._images: Tensor | None = None
        self.log = RunLog(directory, trainer.update) if trainer.group.first else None
        self._trackers = start_trackers(config.log, directory) if trainer.group.first else []
        self._reported_trackers: list[str] = []
        self.values: dict[str, float] = {}
        self.run_left: float | None = None
        self._energy = EnergyMeter(trainer.device)
        self.begin()

    def begin(self) -> None:
        """Start measuring the time of updates."""
        self.interval = Interval(self._trainer.update)

    def roll_back(self) -> None:
        """Remove log entries after the trainer's update, and continue from there."""
        self.begin()
        if self.log is not None:
            self.log.close()
            self.log = RunLog(self._directory, self._trainer.update)

    def keep_images(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield `batches`, and keep a copy of the run's first images for TensorBoard."""
        for batch in batches:
            if self._images is None:
                self._images = batch.images[:_SHOWN_IMAGES].clone()
            yield batch

    def log_update(self, info: UpdateInfo, loaded: LoaderStatistics) -> None:
        """Log the trainer's last update, and the totals of its meter since the last log line. Collective."""
        trainer = self._trainer
        # The host waits for the device once per log line, here.
        loss, hits, count, bad = trainer.meter.total(trainer.group).tolist()
        trainer.meter.sums.zero_()
        if bad:
            self.report_bad()
        now = time.perf_counter()
        self.measure_energy()
        self._warn_of_failures()
        values = {
            "train/loss": loss / max(count, 1),
            "train/top1": 100 * hits / max(count, 1),
            "train/lr": info.lr,
            **self.interval.values(
                trainer.update, now, global_batch=trainer.plan.global_batch, flops=self._flops_of(self._batches - 1)
            ),
            "train/bad_images": len(self._state.bad),
            "train/checkpoint_failures": self._reported_failures,
            **memory(trainer.device),
        }
        if self._writer.seconds is not None:
            values["checkpoint/write_seconds"] = self._writer.seconds
        if info.measures is not None:
            values.update(self._update_values(info, info.measures))
        values.update(self._loader_values(loaded))
        if trainer.precision.scales_loss:
            values["train/loss_scale"] = trainer.scaler.get_scale()
        self.interval = Interval(trainer.update, now)
        self.values = values
        self._write(values)
        self.run_left = self._time_left(values["train/images_per_s"])
        self._progress.log_line(*epoch_fields(trainer.update, trainer.plan, values, seconds_left=self.run_left))
        if info.measures is not None:
            self._write_layers(info.lr, info.measures)

    def log_evaluation(self, result: Result, seconds: float) -> None:
        """Log the `result` of an evaluation that took `seconds`. Update `RunState.best_top1` before this call."""
        self._evaluation_seconds = seconds
        self.interval.exclude(seconds)
        self._write({**result.values(), "val/best_top1": self._state.best_top1, "val/seconds": seconds})

    def measure_energy(self) -> None:
        """Add the energy of all ranks' devices since the last call to `RunState.kwh`. Collective."""
        device, group, state = self._trainer.device, self._trainer.group, self._state
        joules = self._energy.take()
        if device.type == "cuda" and group.ranks.world > 1:
            used = torch.tensor([joules or 0.0, joules is not None], dtype=torch.float64, device=device)
            group.all_reduce_sum(used)
            total, measured = used.tolist()
            joules = total if measured == group.ranks.world else None
        state.kwh = None if joules is None or state.kwh is None else state.kwh + joules / JOULES_PER_KWH

    def report_bad(self) -> None:
        """Print the bad images found since the last call, and add them to ``bad_images.jsonl``. Collective."""
        self.bad.report(self._bad_path, self._trainer.update, self._progress.say)

    def end_epoch(self, result: Result | None = None, *, first: bool = False) -> None:
        """Print the epoch's line, with the `result` of its evaluation, if any. `first`: the run's first evaluation."""
        update, plan, best = self._trainer.update, self._trainer.plan, self._state.best_top1
        self._progress.end_epoch(*epoch_fields(update, plan, self.values, result, best, self.run_left))
        if first and result is not None and (note := validation_gap_note(self.values, result)):
            self._progress.say(note)

    def finish(self, final: dict[str, Any]) -> list[str]:
        """Write settings and results to TensorBoard, and `final`, the content of ``final.json``, to the trackers.

        Returns a line for each reason why TensorBoard or a tracker is incomplete.
        """
        if self.log is None:
            return []
        settings = experiment_settings(self._config, self._trainer.plan.global_batch)
        self.log.finish(settings, ["val/best_top1", "val/top1"])
        self.log.board.flush()
        board = [self.log.board.reason] if self.log.board.reason else []
        return [*board, *finish_trackers(self._trackers, final)]

    def sync(self) -> None:
        """Sync the log and the list of bad images to disk. Raises `OSError`."""
        if self.log is not None:
            self.log.sync()
            self.bad.write(self._bad_path)

    def close(self) -> None:
        """Flush and close the files, and let the trackers end."""
        if self.log is not None:
            self.log.close()
        for tracker in self._trackers:
            tracker.close()

    def _update_values(self, info: UpdateInfo, measures: Measures) -> dict[str, float]:
        values, noise, group = measures.values(), self._state.noise, self._trainer.group
        if info.noise_terms is not None:
            group.all_reduce_sum(info.noise_terms)
            small_sq, per_small, ranks = info.noise_terms.tolist()
            per_big = 1 / self._trainer.plan.global_batch
            noise.add(small_sq / ranks, per_small / ranks, values["train/grad_norm"] ** 2, per_big)
        return {**values, **noise.values()}

    def _loader_values(self, loaded: LoaderStatistics) -> dict[str, float]:
        if not loaded.seconds:
            return {}  # this rank has loaded nothing: there are fewer ghost batches than ranks
        rate = loaded.images / loaded.seconds * max(1, self._workers) * self._trainer.group.ranks.world
        return {"loader/images_per_s": rate, "loader/fast_share": loaded.fast / loaded.images}

    @property
    def _batches(self) -> int:
        """The number of global batches so far."""
        return self._trainer.update + self._trainer.skipped

    def _flops_of(self, batch: int) -> Flops:
        """Return the operations of the global batch number `batch`, counted from 0."""
        return self._flops.of_size(self._sizes.at(batch // self._trainer.plan.updates_per_epoch))

    def _updates_left(self) -> float:
        """Return the number of updates to the end of the run, in units of the update just made.

        An update with twice as many floating-point operations counts as two.
        """
        plan, batch, left = self._trainer.plan, self._batches, 0.0
        last, stop = self._flops_of(batch - 1).per_image, plan.stop + self._trainer.skipped
        while batch < stop:
            count = min(stop - batch, plan.updates_per_epoch - batch % plan.updates_per_epoch)
            left += count * (self._flops_of(batch).per_image / last)
            batch += count
        return left

    def _time_left(self, images_per_s: float) -> float:
        """Estimate the seconds to the end of the run from this rate and the duration of the last evaluation."""
        plan, update = self._trainer.plan, self._trainer.update
        evaluations = sum(
            evaluation_is_due(self._config, plan, end)
            for end in {plan.stop, *range(plan.updates_per_epoch, plan.stop + 1, plan.updates_per_epoch)}
            if end >= update
        )
        return self._updates_left() * plan.global_batch / images_per_s + evaluations * self._evaluation_seconds

    def _write(self, values: dict[str, float]) -> None:
        if self.log is not None:
            update = self._trainer.update
            timed = {**values, "run/seconds": round(self._state.total_seconds(), 3)}
            if self._state.kwh is not None:
                timed["run/kwh"] = round(self._state.kwh, 6)
            self.log.write(update, update / self._trainer.plan.updates_per_epoch, timed)

    def _write_layers(self, lr: float, measures: Measures) -> None:
        if self.log is None:
            return
        update = self._trainer.update
        layers = measures.layers(self._parameter_names, self._trainer.optimizer, lr)
        if layers.ratios:
            self.log.write_ratios(update, list(layers.ratios), list(layers.ratios.values()))
        self.log.board.layers(layers, update)
        if self._images is not None:
            self.log.board.images(self._images.cpu(), update)
            self._images = None

    def _warn_of_failures(self) -> None:
        """Print a warning about failed writes since the last log line."""
        if self.log is not None and self.log.reason != self._reported_reason:
            self._reported_reason = self.log.reason
            if self._reported_reason:
                self._progress.say(f"WARNING: the log cannot be written: {self._reported_reason}. Training continues.")
        for tracker in self._trackers:
            if tracker.reason and tracker.name not in self._reported_trackers:
                self._reported_trackers.append(tracker.name)
                self._progress.say(
                    f"WARNING: the log no longer goes to {tracker.reason}. Training continues; "
                    f"{FOLDER}/{tracker.name}.log in the run directory has the details."
                )
        failures = self._writer.failures
        if failures > self._reported_failures:
            self._reported_failures = failures
            self._progress.say(
                f"WARNING: {self._writer.last_failure}. Training continues. Failures so far: {self._reported_failures}."
            )
