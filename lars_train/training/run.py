"""A training run on one rank, from where it stands to its end: updates, log lines, evaluations, checkpoints."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from lars_train.config import absolute_paths, experiment_settings, filled
from lars_train.data.decode import PILLOW
from lars_train.data.loader import Batch, LoaderStatistics, View, train_loader
from lars_train.data.open import SHARDS
from lars_train.data.order import micro_bounds
from lars_train.durable import write_whole
from lars_train.errors import ConfigError, DataError, Diverged, Stopped
from lars_train.models.weights import weights_sha256
from lars_train.monitoring.log import RunLog
from lars_train.monitoring.memory import memory
from lars_train.monitoring.noise import NoiseScale
from lars_train.monitoring.progress import Progress
from lars_train.monitoring.summary import announcement, epoch_line, final_record, work_line
from lars_train.optim.factory import build_optimizer
from lars_train.plan import check_micro_batch, checkpoint_is_due, evaluation_is_due, log_is_due, make_schedule
from lars_train.training import checkpoint, compiler, divergences
from lars_train.training.bad_images import BadImages
from lars_train.training.cache import check_cache
from lars_train.training.decoder import decoder_lines
from lars_train.training.device import choose_layout, choose_precision, choose_workers, set_up
from lars_train.training.distributed import Group
from lars_train.training.evaluation import Result, evaluate_split
from lars_train.training.feed import Feed, normaliser
from lars_train.training.guard import Divergence
from lars_train.training.interval import Interval
from lars_train.training.measures import Measures
from lars_train.training.network import make_network
from lars_train.training.notice import Notice
from lars_train.training.prepare import Prepared, continuation
from lars_train.training.resolve import resolve
from lars_train.training.trainer import Hyper, Trainer, UpdateInfo
from lars_train.training.utilisation import flops_per_image, peak_flops
from lars_train.training.writer import CheckpointWriter

# float16: so many batches in a row without an update that the loss scale (from 2**16 on) cannot be what is wrong.
_MOST_SKIPPED = 60
_SHOWN_PICTURES = 32


class Run:
    """What a training run holds on one rank. Making one and `train` are collective."""

    def __init__(self, prepared: Prepared, group: Group, device: torch.device) -> None:
        config, plan, dataset = prepared.config, prepared.plan, prepared.dataset
        self.prepared, self.config, self.plan, self.dataset = prepared, config, plan, dataset
        self.directory, self.group, self.device = prepared.directory, group, device
        self.checkpoints = self.directory / "checkpoints"
        start = self._latest_checkpoint(prepared) or prepared.start_from
        torch.manual_seed(config.seed)
        network = make_network(config, len(dataset.classes))
        stored = checkpoint.value(start, "resolved") if start is not None else None
        self.resolved = resolve(config, plan, network, device, group, stored)
        self.decoded_so_far = None if stored is None else stored.get("decoder", PILLOW)
        set_up(config, device, self.resolved.threads)
        self.precision = choose_precision(self.resolved.precision, device)
        self.ghosts_per_micro = check_micro_batch(plan, self.resolved.micro_batch)
        self.workers = choose_workers(config, device, group.ranks)
        check_cache(config, dataset, plan, micro_batch=self.resolved.micro_batch, ranks=group.ranks)
        layout = choose_layout(config)
        network = network.to(device=device, dtype=self.precision.weights).to(memory_format=layout)
        self.progress = Progress(shown=group.first, epochs=plan.epochs, verbosity=config.verbosity)
        self.flops_per_image = flops_per_image(network, config.data.image_size)
        self.peak_flops = peak_flops(self.precision, device, self.resolved.threads)
        self.resolved = replace(self.resolved, compiled=self._compile(network, stored))
        self.trainer = Trainer(
            network,
            build_optimizer(config.optimizer, network),
            plan,
            Hyper(make_schedule(plan, config), filled(config.label_smoothing)),
            normalise=normaliser(config.data.mean, config.data.std, device, self.precision, layout),
            precision=self.precision,
            device=device,
            group=group,
            compiled=self.resolved.compiled,
            bucket_mb=config.distributed.bucket_mb,
            compression=config.gradient_compression,
            max_loss=config.guard.max_loss,
        )
        self.pictures: Tensor | None = None
        self.parameter_names = {id(p): name for name, p in network.named_parameters()}
        self.started = time.perf_counter()
        self.best_top1, self.seconds_before, self.bad = -math.inf, 0.0, BadImages(config.data.max_bad, group)
        if start is not None:
            self._restore(start)
            self.best_top1, self.seconds_before = (checkpoint.value(start, key) for key in ("best_top1", "seconds"))
            self.bad.known.update(checkpoint.value(start, "bad"))
        self.rollbacks: list[dict[str, int]] = [] if start is None else list(start.get("rollbacks", []))
        self.resumed_at = self.trainer.update
        self.log: RunLog | None = None
        self.writer: CheckpointWriter | None = None
        self.notice = Notice()
        if group.first:
            checkpoint.remove_later(self.checkpoints, self.trainer.update)
            self.writer = CheckpointWriter(self.checkpoints, config.checkpoint.keep)
            self.log = RunLog(self.directory, self.trainer.update)
            divergences.take_back(self.directory, len(self.rollbacks))
        self.noise = NoiseScale(**(start or {}).get("noise", {}))
        self.logged: dict[str, float] = {}
        self.run_left: float | None = None
        self.evaluation_seconds = 0.0
        self.failures_told = self.skipped_in_a_row = 0
        self.result: Result | None = None

    def _compile(self, network: nn.Module, stored: dict[str, Any] | None) -> bool:
        """Whether torch.compile is used. Collective."""
        config, plan = self.config, self.plan
        decided, error, kept = None, None, None
        if stored is not None and stored.get("device") == self.device.type:
            kept = stored.get("compiled", False)
        if self.group.first:
            images = plan.stop * plan.global_batch / self.group.ranks.world
            of_it = (config.data.image_size, self.precision, self.device)
            samples = compiler.timed_samples(self.device, plan.ghost_batch, self.resolved.micro_batch)
            try:
                decided = compiler.decide(
                    config.compile,
                    kept,
                    compiler.longest_time(images, self.flops_per_image, self.peak_flops),
                    timed=lambda: images * compiler.eager_time(network, samples, *of_it),
                    attempt=lambda: compiler.attempt(network, self.resolved.micro_batch, *of_it),
                    problem=lambda: compiler.problem(self.device),
                    compute=self.precision.compute,
                    say=self.progress.say,
                )
            except ConfigError as failure:
                error = failure
        self.group.together(error)
        compiled: bool = self.group.from_first(decided)
        return compiled

    def train(self) -> dict[str, Any]:
        """Train to the end; the content of ``final.json``."""
        for line in announcement(self.config, self.plan, self.resolved, self.directory, self.resumed_at):
            self.progress.say(line)
        self.progress.say(work_line(self.flops_per_image, self.peak_flops))
        decided = (self.config.data.decoder, self.resolved.decoder, self.decoded_so_far)
        for line in decoder_lines(*decided, self.dataset.train):
            self.progress.say(line)
        self.begin()
        try:
            with self.notice:
                if self.resumed_at and self._evaluation_is_due():  # it may have been ended before its evaluation
                    self._evaluate()
                if self.trainer.update == 0 and self.config.guard.on_divergence == "rollback":
                    self._save()
                while self.trainer.update < self.plan.stop:
                    self._updates_in_order()
                return self._finish()
        finally:
            self.progress.close()
            if self.writer is not None:
                self.writer.close()
            if self.log is not None:
                self.log.close()

    def begin(self) -> None:
        """Start the clocks."""
        self.started = self.saved_at = time.perf_counter()
        self.saved_update = self.trainer.update
        self.interval = Interval(self.trainer.update, self.started)
        self.trainer.network.train()

    def _updates_in_order(self) -> None:
        """Updates to the end, or until batches have been passed over and the order of what follows is another."""
        last = self.plan.stop + self.trainer.skipped
        with closing(self._batches()) as batches:
            while self.trainer.update < self.plan.stop and self.trainer.update + self.trainer.skipped < last:
                divergence = self._one_update(batches)
                if divergence is not None:
                    break
            else:
                return
        self._roll_back(divergence)

    def _one_update(self, batches: Feed) -> Divergence | None:
        config, per_epoch = self.config, self.plan.updates_per_epoch
        epoch, done = divmod(self.trainer.update, per_epoch)
        if done == 0 or self.trainer.update == self.resumed_at:
            self.progress.start_epoch(epoch, per_epoch, done)
        update = self.trainer.update + 1
        epoch_ends = update % per_epoch == 0
        log_now = log_is_due(config, self.plan, update)
        seen = batches if self.trainer.update or self.log is None else self._keep_pictures(batches)
        info = self.trainer.run_update(seen, self._micro_batches(), measure=log_now)
        self.interval.waited += info.waited
        self.bad.note(info.bad)
        if not info.made:
            self._check_skipped()
            return None
        self.skipped_in_a_row = 0
        if log_now:
            self._log(info, batches.statistics())
        self.progress.advance(self.logged, self.run_left)
        signal_number, overdue = self.group.highest([self.notice.given, self._checkpoint_is_overdue()])
        save_now = signal_number or overdue or checkpoint_is_due(config, self.plan, update)
        # Before a checkpoint, so that none is made of a run that has diverged.
        if log_now or save_now:
            divergence = self.trainer.divergence()
            if divergence is not None:
                return divergence
        if save_now:
            self._save()
        if signal_number:
            self._stop(signal_number)
        if self._evaluation_is_due():
            if self.saved_update != update:
                # A notice in the course of the evaluation finds its checkpoint.
                self._save()
            self._evaluate()
            self.progress.end_epoch(
                epoch_line(update, self.plan, self.logged, self.result, self.best_top1, self.run_left)
            )
        elif epoch_ends:
            self.progress.end_epoch(epoch_line(update, self.plan, self.logged, seconds_left=self.run_left))
        return None

    def _keep_pictures(self, batches: Feed) -> Iterator[Batch]:
        """`batches`; the run's first pictures are copied on their way, to be shown at its first log line."""
        for batch in batches:
            if self.pictures is None:
                self.pictures = batch.images[:_SHOWN_PICTURES].clone()
            yield batch

    def _check_skipped(self) -> None:
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > _MOST_SKIPPED:
            raise Diverged(
                f"after update {self.trainer.update:,} the gradients of {self.skipped_in_a_row} batches in a row were "
                "not finite in float16, at any loss scale: choose precision=bf16, or lower optimizer.lr."
            )

    def _roll_back(self, divergence: Divergence) -> None:
        """Go on from the last checkpoint, after the samples that led from there to `divergence`. Collective.

        Raises `Diverged` with the report, where that is not wanted, was done too often, or has nothing to go on from.
        """
        guard, lines = self.config.guard, divergence.lines()
        start = None
        if guard.on_divergence == "rollback" and len(self.rollbacks) < guard.max_rollbacks:
            if self.writer is not None:
                self.writer.wait()
            start = self._latest_checkpoint(self.prepared)
        if start is None:
            self._record(divergence, {"action": "stop"})
            lines.append(
                f"Stopped, after {len(self.rollbacks)} rollbacks; divergence.jsonl in {self.directory} has the report. "
                "Lower optimizer.lr, raise schedule.warmup_epochs, or go on from the last checkpoint without the "
                "samples that came before the divergence (guard.on_divergence=rollback, guard.max_rollbacks)."
            )
            raise Diverged("\n".join(lines))
        first = start["update"] + start.get("skipped", 0)
        behind = divergence.update + self.trainer.skipped
        step = {"from_update": divergence.update, "to_update": start["update"], "passed_over_from": first}
        step["passed_over"] = behind - first
        self._record(divergence, {"action": "rollback", **step})
        self.rollbacks.append(step)
        self.trainer.restore(start)
        self.trainer.skipped = behind - start["update"]
        self.best_top1, self.noise = start["best_top1"], NoiseScale(**start.get("noise", {}))
        self.resumed_at = self.trainer.update
        self.interval = Interval(self.trainer.update)
        lines.append(
            f"Going on from update {start['update']:,} without the {behind - first:,} batches from there on: rollback "
            f"{len(self.rollbacks)} of at most {guard.max_rollbacks}."
        )
        for line in lines:
            self.progress.say(f"WARNING: {line}")
        if self.log is not None:
            self.log.close()
            checkpoint.remove_later(self.checkpoints, self.trainer.update)
            self.log = RunLog(self.directory, self.trainer.update)
        # A kill before the next checkpoint must not bring back what was passed over.
        self._save()
        if self.trainer.update and self._evaluation_is_due():
            # Its result came after that checkpoint, as for a run that is started from it.
            self._evaluate()

    def _record(self, divergence: Divergence, action: dict[str, Any]) -> None:
        if self.group.first:
            divergences.record(self.directory, divergence, action)

    def _evaluation_is_due(self) -> bool:
        return evaluation_is_due(self.config, self.plan, self.trainer.update)

    def _checkpoint_is_overdue(self) -> bool:
        """By the first rank's clock, which is the one that counts."""
        minutes = self.config.checkpoint.every_minutes
        return self.group.first and minutes is not None and time.perf_counter() - self.saved_at > 60 * minutes

    def _stop(self, number: int) -> None:
        name, update = signal.Signals(number).name, self.trainer.update
        error = None
        if self.writer is not None:
            self.writer.wait()
            if self.writer.reason:
                error = DataError(
                    f"{name}: {self.writer.reason}; the one before it is what the same command goes on from."
                )
        # No rank ends before the checkpoint is whole: a launcher that sees one end gives the others a second notice.
        self.group.together(error)
        raise Stopped(
            f"{name}: stopped after update {update:,}, with a checkpoint; the same command goes on from there."
        )

    def _restore(self, start: dict[str, Any]) -> None:
        try:
            self.trainer.restore(start)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"the checkpoint's state does not fit this run: {next(iter(str(error).splitlines()), '')}; start anew "
                "with resume=never."
            ) from error

    def _latest_checkpoint(self, prepared: Prepared) -> dict[str, Any] | None:
        found, error = None, None
        if self.group.first:
            try:
                found = continuation(prepared)
            except ConfigError as failure:
                error = failure
        self.group.together(error)
        path = self.group.from_first(found and found[0])
        if path is None:
            return None
        return found[1] if found is not None else checkpoint.load(path)

    def _micro_batches(self) -> int:
        plan, ranks = self.plan, self.group.ranks
        return len(micro_bounds(plan.global_batch, plan.ghost_batch, self.ghosts_per_micro, ranks.rank, ranks.world))

    def _batches(self) -> Feed:
        config, plan, ranks = self.config, self.plan, self.group.ranks
        stream = train_loader(
            self.dataset.train,
            View.from_config(config.data),
            seed=config.seed,
            batch=plan.global_batch,
            ghost_batch=plan.ghost_batch,
            ghosts_per_micro=self.ghosts_per_micro,
            updates_per_epoch=plan.updates_per_epoch,
            start_update=self.trainer.update + self.trainer.skipped,
            stop_update=plan.stop + self.trainer.skipped,
            rank=ranks.rank,
            world=ranks.world,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
            on_error=config.data.on_error,
            decoder=self.resolved.decoder,
            window=config.data.window_shards if config.data.order == SHARDS else None,
        )
        return Feed(stream, self.device)

    def _log(self, info: UpdateInfo, loaded: LoaderStatistics) -> None:
        trainer = self.trainer
        # Here, once per log line, the host waits for the device.
        loss, hits, count, bad = trainer.meter.total(self.group).tolist()
        trainer.meter.sums.zero_()
        if bad:
            self._report_bad()
        now = time.perf_counter()
        values = {
            "train/loss": loss / max(count, 1),
            "train/top1": 100 * hits / max(count, 1),
            "train/lr": info.lr,
            **self.interval.values(
                trainer.update,
                now,
                global_batch=self.plan.global_batch,
                flops_per_image=self.flops_per_image,
                peak_flops=self.peak_flops * self.group.ranks.world,
            ),
            "train/bad_images": len(self.bad.known),
            "train/checkpoint_failures": self._told_failures(),
            **memory(self.device),
        }
        if self.writer is not None and self.writer.seconds is not None:
            values["checkpoint/write_seconds"] = self.writer.seconds
        if info.measures is not None:
            values.update(self._of_the_update(info, info.measures))
        values.update(self._of_the_loader(loaded))
        if self.precision.scales_loss:
            values["train/loss_scale"] = trainer.scaler.get_scale()
        self.interval = Interval(trainer.update, now)
        self.logged = values
        self._write(values)
        self.run_left = self._time_left(values["train/images_per_s"])
        self.progress.log_line(epoch_line(trainer.update, self.plan, values, seconds_left=self.run_left))
        if info.measures is not None:
            self._write_layers(info.lr, info.measures)

    def _time_left(self, images_per_s: float) -> float:
        """Seconds to the end of the run, at this rate and with evaluations as long as the last one."""
        plan, update = self.plan, self.trainer.update
        evaluations = sum(
            evaluation_is_due(self.config, plan, end)
            for end in {plan.stop, *range(plan.updates_per_epoch, plan.stop + 1, plan.updates_per_epoch)}
            if end >= update
        )
        return (plan.stop - update) * plan.global_batch / images_per_s + evaluations * self.evaluation_seconds

    def _of_the_update(self, info: UpdateInfo, measures: Measures) -> dict[str, float]:
        values = measures.values()
        if info.first is not None:
            self.group.sum(info.first)
            small_sq, per_small, ranks = info.first.tolist()
            self.noise.add(
                small_sq / ranks, per_small / ranks, values["train/grad_norm"] ** 2, 1 / self.plan.global_batch
            )
        return {**values, **self.noise.values()}

    def _of_the_loader(self, loaded: LoaderStatistics) -> dict[str, float]:
        if not loaded.seconds:
            return {}  # fewer ghost batches than ranks
        rate = loaded.images / loaded.seconds * max(1, self.workers) * self.group.ranks.world
        return {"loader/images_per_s": rate, "loader/fast_share": loaded.fast / loaded.images}

    def _write_layers(self, lr: float, measures: Measures) -> None:
        if self.log is None:
            return
        update = self.trainer.update
        layers = measures.layers(self.parameter_names, self.trainer.optimizer, lr)
        if layers.ratios:
            self.log.write_ratios(update, list(layers.ratios), list(layers.ratios.values()))
        self.log.board.layers(layers, update)
        if self.pictures is not None:
            self.log.board.images(self.pictures.cpu(), update)
            self.pictures = None

    def _told_failures(self) -> int:
        if self.writer is None:
            return 0
        if self.writer.failures > self.failures_told:
            self.failures_told = self.writer.failures
            self.progress.say(f"WARNING: {self.writer.reason}; the training goes on. {self.failures_told} so far.")
        return self.writer.failures

    def _evaluate(self) -> None:
        started = time.perf_counter()
        result = evaluate_split(
            self.trainer.network,
            self.dataset.val,
            View.from_config(self.config.data),
            normalise=self.trainer.normalise,
            precision=self.precision,
            device=self.device,
            group=self.group,
            batch=self.resolved.micro_batch,
            workers=self.workers,
            progress=self.progress,
            decoder=self.resolved.decoder,
            by_shards=self.config.data.order == SHARDS,
            ended=lambda: bool(self.notice.given),
        )
        if result is None:
            self._stop(self.group.highest([self.notice.given])[0])
            return
        if result.bad:
            if self.config.data.on_error == "fail":
                first = result.bad[0]
                raise DataError(f"{first.where} cannot be decoded: {first.reason} (data.on_error=fail).")
            self.bad.note(result.bad)
            self._report_bad()
        new_best = result.top1 > self.best_top1
        self.result, self.best_top1 = result, max(self.best_top1, result.top1)
        seconds = self.evaluation_seconds = time.perf_counter() - started
        self.interval.leave_out(seconds)
        self._write({**result.values(), "val/best_top1": self.best_top1, "val/seconds": seconds})
        if new_best:
            if self.saved_update != self.trainer.update:
                self._save()
            if self.writer is not None:
                self.writer.keep_best(self.trainer.update)

    def _report_bad(self) -> None:
        self.bad.report(self.directory / "bad_images.jsonl", self.trainer.update, self.progress.say)

    def _save(self) -> None:
        started = time.perf_counter()
        state = self.trainer.state()
        if self.trainer.meter.take_bad(self.group):
            self._report_bad()
        self.saved_at, self.saved_update = started, self.trainer.update
        if self.log is not None and self.writer is not None:
            try:
                self.log.sync()
            except OSError as error:
                self.writer.refuse(self.trainer.update, str(error))
                return
            content = {
                **state,
                "best_top1": self.best_top1,
                "seconds": self.seconds(),
                "bad": dict(self.bad.known),
                "rollbacks": list(self.rollbacks),
                "noise": self.noise.state(),
                "config": asdict(absolute_paths(self.config)),
                "plan": asdict(self.plan),
                "resolved": asdict(self.resolved),
                "classes": list(self.dataset.classes),
                "fingerprint": self.dataset.fingerprint,
                "layout": self.dataset.layout,
            }
            self.writer.save(self.trainer.update, content)
        self.interval.save(time.perf_counter() - started)

    def _finish(self) -> dict[str, Any]:
        assert self.result is not None
        error = None
        if self.writer is not None:
            self.writer.wait()
            if self.writer.reason:
                error = DataError(f"{self.writer.reason}. Free the disk, and give the same command again.")
        self.group.together(error)
        final = final_record(
            self.config,
            self.plan,
            directory=self.directory,
            update=self.trainer.update,
            best_top1=self.best_top1,
            result=self.result,
            seconds=self.seconds(),
            bad_images=len(self.bad.known),
            passed_over=self.trainer.skipped,
            rollbacks=self.rollbacks,
            weights_sha256=weights_sha256(self.trainer.network),
            weights_sha256_float32=weights_sha256(self.trainer.network, torch.float32),
        )
        if self.log is not None:
            self.log.finish(experiment_settings(self.config, self.plan.global_batch), ["val/best_top1", "val/top1"])
            write_whole(self.directory / "final.json", [(json.dumps(final, indent=1) + "\n").encode()])
        return final

    def _write(self, values: dict[str, float]) -> None:
        if self.log is not None:
            update = self.trainer.update
            timed = {**values, "run/seconds": round(self.seconds(), 3)}
            self.log.write(update, update / self.plan.updates_per_epoch, timed)

    def seconds(self) -> float:
        """Wall time of training, over all starts; what a kill made undone is not in it."""
        return self.seconds_before + time.perf_counter() - self.started
