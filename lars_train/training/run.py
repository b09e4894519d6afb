"""Train on one rank, from the last checkpoint to the end: updates, log lines, evaluations and checkpoints."""

from __future__ import annotations

import math
import signal
import time
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

import torch

from lars_train.config import absolute_paths
from lars_train.data.loading.loader import EvalSpec, LoaderSpec, train_loader
from lars_train.errors import ConfigError, DataError, Stopped
from lars_train.messages import first_line
from lars_train.models.weights import weights_sha256
from lars_train.monitoring.progress import Progress
from lars_train.monitoring.summary import final_record, flops_line, startup_lines
from lars_train.networks import make_network
from lars_train.run_plan import check_micro_batch, checkpoint_is_due, evaluation_is_due, log_is_due, make_schedule
from lars_train.signals import SignalHandler
from lars_train.training import checkpoint
from lars_train.training.assemble import build_trainer
from lars_train.training.checkpoint import RunState
from lars_train.training.checkpoint_writer import CheckpointWriter
from lars_train.training.device import choose_precision, choose_workers, set_up
from lars_train.training.device_prefetch import DevicePrefetcher, RankContext
from lars_train.training.distributed import Group
from lars_train.training.evaluation import Result, evaluate_split, evaluation_batch
from lars_train.training.guard import BadImages, Divergence, RollbackPolicy, roll_back_divergences, with_current_paths
from lars_train.training.metrics import count_flops, peak_flops
from lars_train.training.metrics_logger import MetricsLogger
from lars_train.training.prepare import Prepared, load_continuation
from lars_train.training.resolve import check_cache, check_compiler, decoder_lines, resolve_execution


class Run:
    """A training run on one rank. The constructor and `train` are collective.

    Attributes:
        resumed_at: the update from which this start or the last rollback resumed.
        result: the result of the last evaluation.
        incomplete: a line for each part that is missing from the finished run. Weights and metrics are always complete.
    """

    def __init__(self, prepared: Prepared, group: Group, device: torch.device) -> None:
        config, plan, dataset, directory = prepared.config, prepared.plan, prepared.dataset, prepared.directory
        self.prepared, self.config, self.plan, self.group = prepared, config, plan, group
        start = load_continuation(prepared, group) or prepared.start_from
        torch.manual_seed(config.seed)
        network = make_network(config, dataset.classes, prepared.given)
        stored = checkpoint.value(start, "resolved") if start is not None else None
        self.resolved = resolve_execution(config, plan, network, device, group, stored)
        self.previous_decoder = None if stored is None else stored["decoder"]
        set_up(config, device, self.resolved.threads)
        precision = choose_precision(self.resolved.precision, device)
        self.context = RankContext.from_config(config, device, group, precision)
        workers = choose_workers(config, device, group.ranks)
        self.train_spec, self.val_spec = self._loaders(workers)
        check_cache(config, dataset, plan, micro_batch=self.resolved.micro_batch, ranks=group.ranks)
        network = self.context.place(network)
        self.progress = Progress(shown=group.first, epochs=plan.epochs, verbosity=config.verbosity)
        # No peak for a CPU, because other processes share it and the measurement depends on them.
        peak = None if device.type == "cpu" else peak_flops(precision, device, self.resolved.threads)
        self.flops = count_flops(network, config, plan, peak)
        if config.compile:
            each = "micro-batch size" if len(self.flops.by_size) == 1 else "size of micro-batch and images"
            self.progress.say(f"compile        on: a minute or two for each {each}, less if cached")
            group.on_rank0(lambda: check_compiler(device))
        self.trainer = build_trainer(
            config, plan, network, make_schedule(plan, config), self.context, draws=prepared.draws
        )
        self.state = RunState()
        if start is not None:
            self._restore(start)
        newest = partial(load_continuation, prepared, group)
        self.rollback_policy = RollbackPolicy(config.guard, directory, group, newest, self.progress.say)
        self.resumed_at = self.trainer.update
        checkpoints = directory / "checkpoints"
        if group.first:
            checkpoint.remove_later(checkpoints, self.trainer.update)
            checkpoint.restore_best(checkpoints, self.state.best_update)
            roll_back_divergences(directory, len(self.state.rollbacks))
        self.writer = CheckpointWriter(checkpoints, config.checkpoint.keep)
        self.logger = MetricsLogger(
            config,
            directory,
            self.trainer,
            self.state,
            progress=self.progress,
            writer=self.writer,
            bad=BadImages(config.data.max_bad, group, self.state.bad),
            workers=workers,
            flops=self.flops,
        )
        self.signals = SignalHandler()
        self.incomplete: list[str] = []
        self.result: Result | None = None

    def _loaders(self, workers: int) -> tuple[LoaderSpec, EvalSpec]:
        """Return the specs of this rank's training and evaluation loaders."""
        config, dataset, ranks = self.config, self.prepared.dataset, self.group.ranks
        common: dict[str, Any] = {
            "workers": workers,
            "pin_memory": self.context.device.type == "cuda",
            "decoder": self.resolved.decoder,
        }
        ghosts = check_micro_batch(self.plan, self.resolved.micro_batch)
        return (
            LoaderSpec.from_config(config, self.plan, dataset.train, ranks, ghosts_per_micro=ghosts, **common),
            EvalSpec.from_config(
                config, dataset.val, ranks, micro_batch=evaluation_batch(self.resolved.micro_batch), **common
            ),
        )

    def _restore(self, start: dict[str, Any]) -> None:
        """Resume from the content of a checkpoint. Raises `ConfigError` if it does not fit."""
        try:
            self.trainer.restore(start)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"the state in the checkpoint does not fit this run: {first_line(str(error))}; start over with "
                "resume=never."
            ) from error
        self.state.restore(start)
        if (self.trainer.ema is None) == ("ema" in start):
            # Only one of the two runs averages its weights, so their best top-1 values are not comparable.
            self.state.best_top1, self.state.best_update = -math.inf, None
        root = checkpoint.value(start, "config", "data", "root")
        self.state.bad = with_current_paths(self.state.bad, root, self.config.data.root)

    def train(self) -> dict[str, Any]:
        """Train, and return the content of ``final.json``. The caller must then call `close`, even after an error."""
        self._announce()
        self.begin()
        with self.signals:
            if self.resumed_at and self._evaluation_is_due():  # the last start may have ended before it evaluated
                self._roll_back(self._evaluate())
            if self.trainer.update == 0 and self.config.guard.on_divergence == "rollback":
                self._save()
            while self.trainer.update < self.plan.stop:
                self._roll_back(self._train_until_divergence())
            return self._finish()

    def _announce(self) -> None:
        """Print the run's effective settings."""
        config, resolved, dataset = self.config, self.resolved, self.prepared.dataset
        lines = [
            *startup_lines(config, self.plan, resolved, self.prepared.directory, self.resumed_at, dataset.inventory),
            flops_line(self.flops.by_size.values(), self.flops.peak),
            *decoder_lines(config.data.decoder, resolved.decoder, self.previous_decoder, dataset.train),
        ]
        for line in lines:
            self.progress.say(line)

    def begin(self) -> None:
        """Start the clocks."""
        self.state.start_clock()
        self.writer.begin(self.trainer.update)
        self.logger.begin()
        self.trainer.network.train()

    def close(self) -> None:
        """Wait for the last checkpoint; close the log and the progress bar."""
        try:
            self.progress.close()
            self.writer.close()
        finally:
            self.logger.close()

    def _train_until_divergence(self) -> Divergence | None:
        """Make updates until the run ends or diverges, or until the loader has no more batches.

        The loader has one global batch per update. If a batch makes no update, an update is missing at the end:
        the caller then calls this method again.
        """
        last = self.plan.stop + self.trainer.skipped
        with closing(self._batches()) as batches:
            while self.trainer.update < self.plan.stop and self.trainer.update + self.trainer.skipped < last:
                divergence = self._one_update(batches)
                if divergence is not None:
                    return divergence
        return None

    def _batches(self) -> DevicePrefetcher:
        """Return this rank's micro-batches, from the next global batch to the end."""
        skipped = self.trainer.skipped
        stream = train_loader(self.train_spec, self.trainer.update + skipped, self.plan.stop + skipped)
        return DevicePrefetcher(stream, self.context.device)

    def _one_update(self, batches: DevicePrefetcher) -> Divergence | None:
        """Make one update, then the log line, checkpoint and evaluation that are due. Collective."""
        config, per_epoch = self.config, self.plan.updates_per_epoch
        epoch, done = divmod(self.trainer.update, per_epoch)
        if done == 0 or self.trainer.update == self.resumed_at:
            # With max_updates, the run may end within the epoch.
            self.progress.start_epoch(epoch, min(per_epoch, self.plan.stop - epoch * per_epoch), done)
        update = self.trainer.update + 1
        log_now = log_is_due(config, self.plan, update)
        seen = self.logger.keep_images(batches) if self.trainer.update == 0 and self.group.first else batches
        info = self.trainer.run_update(seen, len(self.train_spec.bounds()), measure=log_now)
        self.logger.interval.waited += info.waited
        self.logger.bad.note(info.bad)
        if not info.made:
            return None
        if log_now:
            self.logger.log_update(info, batches.statistics())
        self.progress.advance(self.logger.values, self.logger.run_left)
        # All ranks follow the clock of rank 0.
        overdue_here = self.group.first and self.writer.is_overdue(config.checkpoint.every_minutes)
        signal_number, overdue = self.group.all_reduce_max([self.signals.received, overdue_here])
        save_now = signal_number or overdue or checkpoint_is_due(config, self.plan, update)
        # Check before saving, so that a diverged run saves no checkpoint.
        if log_now or save_now:
            divergence = self.trainer.divergence()
            if divergence is not None:
                return divergence
        if save_now:
            self._save()
        if signal_number:
            self._stop(signal_number)
        if self._evaluation_is_due():
            return self._save_and_evaluate()
        if update % per_epoch == 0:
            self.logger.end_epoch()
        return None

    def _save_and_evaluate(self) -> Divergence | None:
        """Save a checkpoint, evaluate, and print the epoch's line. Collective."""
        if self.writer.saved_update != self.trainer.update:
            # So a termination signal during the evaluation loses no updates.
            self._save()
        first = self.state.best_top1 == -math.inf
        divergence = self._evaluate()
        if divergence is None:
            self.logger.end_epoch(self.result, first=first)
        return divergence

    def _evaluation_is_due(self) -> bool:
        return evaluation_is_due(self.config, self.plan, self.trainer.update)

    def _evaluate(self) -> Divergence | None:
        """Evaluate, and keep the checkpoint if it is the best. Return a divergence if the loss is not finite.

        Collective.
        """
        started = time.perf_counter()
        result = evaluate_split(
            self.trainer.network,
            self.val_spec,
            self.context,
            self.progress,
            ended=lambda: bool(self.signals.received),
            flip=bool(self.config.evaluate.flip),
            average=None if self.trainer.ema is None else self.trainer.ema.network,
        )
        if result is None:
            self._stop(self.group.all_reduce_max([self.signals.received])[0])
        if result.bad:
            if self.config.data.on_error == "fail":
                first = result.bad[0]
                raise DataError(f"{first.where} cannot be decoded: {first.reason} (data.on_error=fail).")
            self.logger.bad.note(result.bad)
            self.logger.report_bad()
        for what, loss in (("val/loss", result.loss), ("val/ema_loss", result.reported.loss)):
            if not math.isfinite(loss):
                update = self.trainer.update
                return Divergence(update, loss, self.trainer.hyper.schedule(update - 1), (), update, what)
        top1 = result.reported.top1
        new_best = top1 > self.state.best_top1
        self.result, self.state.best_top1 = result, max(self.state.best_top1, top1)
        self.logger.log_evaluation(result, time.perf_counter() - started)
        if new_best:
            self.state.best_update = self.trainer.update
            if self.writer.saved_update != self.trainer.update:
                self._save()
            if self.group.first:
                self.writer.keep_best(self.trainer.update)
        return None

    def _save(self) -> None:
        """Save a checkpoint. First sync the log, which a resumed run continues. Collective."""
        started = time.perf_counter()
        self.logger.measure_energy()
        self.writer.begin(self.trainer.update)
        state = self.trainer.state()
        if self.trainer.meter.take_bad(self.group):
            self.logger.report_bad()
        if self.group.first:
            try:
                self.logger.sync()
            except OSError as error:
                self.writer.record_failure(self.trainer.update, str(error))
                return
            dataset = self.prepared.dataset
            content = {
                **state,
                **self.state.stored(),
                "config": asdict(absolute_paths(self.config)),
                "plan": asdict(self.plan),
                "resolved": asdict(self.resolved),
                "classes": list(dataset.classes),
                "fingerprint": dataset.fingerprint,
                "layout": dataset.layout,
            }
            self.writer.save(self.trainer.update, content)
        self.logger.interval.save(time.perf_counter() - started)

    def _roll_back(self, divergence: Divergence | None) -> None:
        """Resume from a checkpoint before `divergence`, unless it is None. Repeat while the run diverges. Collective.

        Raises `Diverged` if the run must stop instead.
        """
        while divergence is not None:
            self.writer.wait()
            self._resume_at(*self.rollback_policy.decide(divergence, self.state.rollbacks, self.trainer.skipped))
            # A checkpoint is saved before its evaluation, so evaluate again, as after a restart.
            divergence = self._evaluate() if self.trainer.update and self._evaluation_is_due() else None

    def _resume_at(self, start: dict[str, Any], step: dict[str, int]) -> None:
        """Resume from the checkpoint `start`, and skip the samples that the rollback `step` names. Collective."""
        self.state.rollbacks.append(step)
        self.trainer.restore(start)
        self.trainer.skipped = step["passed_over_from"] + step["passed_over"] - step["to_update"]
        self.state.restore(start, rollback=True)
        self.resumed_at = self.trainer.update
        if self.group.first:
            self.writer.roll_back(self.trainer.update, self.state.best_update)
        self.logger.roll_back()
        # Save now. Otherwise, a run that is killed before the next checkpoint would train on the skipped samples.
        self._save()

    def _stop(self, number: int) -> NoReturn:
        """Wait until the checkpoint is on disk, then raise `Stopped` for the signal `number`. Collective."""
        name, update = signal.Signals(number).name, self.trainer.update
        error = None
        self.writer.wait()
        if self.writer.reason:
            error = DataError(f"{name}: {self.writer.reason}; the same command resumes from the previous checkpoint.")
        # All ranks wait until the checkpoint is complete: when one rank ends, its launcher signals the others.
        self.group.raise_on_all_ranks(error)
        raise Stopped(
            f"{name}: stopped after update {update:,}, with a checkpoint; the same command resumes from there."
        )

    def _finish(self) -> dict[str, Any]:
        """Return the content of ``final.json``. Raises `DataError` if the last checkpoint or the log is not on disk."""
        self.writer.wait()
        self.logger.measure_energy()
        reason, error = self.writer.reason, None
        try:
            self.logger.sync()
        except OSError as failure:
            reason = reason or str(failure)
        if reason:
            error = DataError(
                f"{reason}. Free some space, or make the directory writable, and run the same command again."
            )
        self.group.raise_on_all_ranks(error)
        final = self._final_record()
        self.incomplete += self.logger.finish(final)
        if self.writer.best_lost is not None:
            self.incomplete.append(
                f"best.pt is not the best checkpoint, which was that of update {self.writer.best_lost:,}"
            )
        for line in self.incomplete:
            self.progress.say(f"WARNING: the run has finished, but is incomplete: {line}.")
        return final

    def _final_record(self) -> dict[str, Any]:
        assert self.result is not None
        return final_record(
            self.config,
            self.plan,
            directory=self.prepared.directory,
            update=self.trainer.update,
            best_top1=self.state.best_top1,
            result=self.result,
            seconds=self.state.total_seconds(),
            kwh=self.state.kwh,
            bad_images=len(self.state.bad),
            passed_over=self.trainer.skipped,
            rollbacks=self.state.rollbacks,
            weights_sha256=weights_sha256(self.trainer.network),
            weights_sha256_float32=weights_sha256(self.trainer.network, torch.float32),
            ema_sha256=None if self.trainer.ema is None else weights_sha256(self.trainer.ema.network),
        )
