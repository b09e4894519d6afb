"""Compute global batch, updates, warm-up and accumulation of a run. Pure arithmetic, without torch or files."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from lars_train.config import Config, filled
from lars_train.errors import ConfigError
from lars_train.messages import counted
from lars_train.optim.schedule import COSINE, STEPS, Form, learning_rate

IMAGENET_TRAIN_IMAGES = 1_281_167
SMALLEST_SCALED_BATCH = 8


@dataclass(frozen=True)
class Plan:
    """A run in updates and samples, independent of the hardware.

    `raised`: the scaled batch was below 8 and was raised. `stop`: the last update of the run (`updates`, or fewer
    with ``max_updates``).
    """

    samples: int
    nominal_batch: int
    global_batch: int
    ghost_batch: int
    scaled: bool
    raised: bool
    epochs: int
    updates_per_epoch: int
    updates: int
    stop: int
    warmup_updates: int

    @property
    def ghosts(self) -> int:
        """Ghost batches in one update."""
        return self.global_batch // self.ghost_batch

    def arithmetic(self) -> str:
        """Return the computation of the global batch as one line of text."""
        if not self.scaled:
            return f"{self.global_batch:,}, not scaled"
        exact = self.nominal_batch * self.samples / IMAGENET_TRAIN_IMAGES
        text = f"{self.nominal_batch:,} x {self.samples:,} / {IMAGENET_TRAIN_IMAGES:,} = {exact:.1f}"
        if self.raised:
            return f"{text}, raised to {self.global_batch}"
        whole = self.global_batch == self.ghost_batch == round(exact)
        unit = "a whole number" if whole else f"a multiple of {self.ghost_batch}"
        return f"{text}, rounded to {unit}: {self.global_batch:,}"


def scaled_batch(nominal: int, samples: int, ghost_batch: int) -> tuple[int, bool]:
    """Scale `nominal` so that `samples` images give as many updates per epoch as ImageNet gives with `nominal`.

    Returns the global batch, and True if it was raised to the minimum for batch norm.
    """
    exact = nominal * samples / IMAGENET_TRAIN_IMAGES
    size = round(exact) if exact <= ghost_batch else ghost_batch * max(1, round(exact / ghost_batch))
    if size >= SMALLEST_SCALED_BATCH:
        return size, False
    # If ghost batches are smaller than the minimum, round the minimum up to a multiple of the ghost batch.
    unit = ghost_batch if ghost_batch < SMALLEST_SCALED_BATCH else SMALLEST_SCALED_BATCH
    return math.ceil(SMALLEST_SCALED_BATCH / unit) * unit, True


def make_plan(config: Config, samples: int) -> Plan:
    """Return the plan of a resolved config on a training set of `samples` images.

    Raises `ConfigError` for a global batch that is not a multiple of the ghost batch or exceeds the training set, and
    for a warm-up that is not shorter than the run.
    """
    ghost, epochs, warmup_epochs = (
        filled(config.model.ghost_batch),
        filled(config.epochs),
        filled(config.schedule.warmup_epochs),
    )
    batch = config.batch
    nominal = batch.size or batch.nominal
    scaled, raised = bool(batch.scaled), False
    size = nominal
    if scaled:
        size, raised = scaled_batch(nominal, samples, ghost)
    if size > ghost and size % ghost:
        below = size // ghost * ghost
        near = f"{below}" if below + ghost > samples else f"{below} and {below + ghost}"
        raise ConfigError(
            f"{_batch_key(config)}: a global batch of {size} is not a multiple of the ghost batch "
            f"(model.ghost_batch={ghost}). The nearest multiples: {near}."
        )
    if size > samples:
        raise ConfigError(
            f"{_batch_key(config)}: a global batch of {size:,} is larger than the training set "
            f"({counted(samples, 'image')}). {_with_few_images(nominal, samples, ghost)}."
        )
    per_epoch = samples // size
    updates = per_epoch * epochs
    warmup = round(warmup_epochs * per_epoch)
    if warmup >= updates:
        raise ConfigError(
            f"schedule.warmup_epochs={warmup_epochs}: the warm-up ({counted(warmup, 'update')}) is not "
            f"shorter than the run ({counted(updates, 'update')}). Lower it, or raise epochs."
        )
    if config.model.ema_start >= updates:
        raise ConfigError(
            f"model.ema_start={config.model.ema_start}: the run has only {counted(updates, 'update')}; lower it."
        )
    return Plan(
        samples=samples,
        nominal_batch=nominal,
        global_batch=size,
        ghost_batch=min(ghost, size),
        scaled=scaled,
        raised=raised,
        epochs=epochs,
        updates_per_epoch=per_epoch,
        updates=updates,
        stop=min(updates, config.max_updates or updates),
        warmup_updates=warmup,
    )


def make_schedule(plan: Plan, config: Config) -> Callable[[int], float]:
    """Return the learning rate of a resolved config as a function of the update (from 0)."""
    schedule, base = config.schedule, filled(config.optimizer.lr)
    form = cast(Form, filled(schedule.form))  # checked in checks.py
    start = schedule.warmup_start
    rate = functools.partial(
        learning_rate,
        total=plan.updates,
        warmup=plan.warmup_updates,
        base=base,
        form=form,
        start=float(start) if isinstance(start, int | float) else None,
    )
    if form == STEPS:
        steps = tuple(round(epoch * plan.updates_per_epoch) for epoch in filled(schedule.steps))
        return functools.partial(rate, steps=steps, factor=filled(schedule.step_factor))
    if form == COSINE:
        return functools.partial(rate, end=schedule.end_lr or 0.0)
    return functools.partial(rate, power=filled(schedule.power), end=schedule.end_lr or 0.0)


def describe_decay(config: Config) -> str:
    """Describe the learning rate's decay as the published table does: ``poly(2)``, ``x0.1 at epochs 30, 60, 80``."""
    schedule = config.schedule
    if schedule.form == COSINE:
        return "cosine"
    if schedule.form == STEPS:
        epochs = ", ".join(f"{epoch:.3g}" for epoch in filled(schedule.steps))
        return f"x{filled(schedule.step_factor):g} at epochs {epochs}"
    return f"poly({filled(schedule.power):g})"


def log_is_due(config: Config, plan: Plan, update: int) -> bool:
    """Return True if a log line follows update `update` (from 1)."""
    return update == plan.stop or update % plan.updates_per_epoch == 0 or update % config.log_every == 0


def evaluation_is_due(config: Config, plan: Plan, update: int) -> bool:
    """Return True if an evaluation follows update `update` (from 1)."""
    return update == plan.stop or update % (plan.updates_per_epoch * config.evaluate.every_epochs) == 0


def checkpoint_is_due(config: Config, plan: Plan, update: int) -> bool:
    """Return True if update `update` (from 1) always gets a checkpoint. Evaluations and a timer add others."""
    return update == plan.stop or update % (config.checkpoint.every_updates or plan.updates_per_epoch) == 0


def check_world(plan: Plan, world: int) -> None:
    """Raise `ConfigError` when there are more ranks than ghost batches."""
    if plan.ghosts < world:
        # With a small global batch, the only ghost batch may be smaller than configured.
        least = f"{world * plan.ghost_batch}" if plan.ghosts > 1 else f"{world} times model.ghost_batch"
        ghosts = counted(plan.ghosts, "ghost batch", "ghost batches")
        raise ConfigError(
            f"a global batch of {plan.global_batch} has {ghosts} of {plan.ghost_batch}, too few for {world} ranks. "
            f"Start at most {plan.ghosts} in total (launch.nodes times launch.nproc), or use a global batch of at "
            f"least {least}."
        )


def check_micro_batch(plan: Plan, micro_batch: int) -> int:
    """Return the number of ghost batches in `micro_batch` samples. Raises `ConfigError` unless it is whole."""
    if micro_batch % plan.ghost_batch:
        below = micro_batch // plan.ghost_batch * plan.ghost_batch
        near = [str(n) for n in (below, below + plan.ghost_batch) if n]
        raise ConfigError(
            f"micro_batch={micro_batch} is not a multiple of the ghost batch of {plan.ghost_batch} samples. "
            f"The nearest multiples: {' and '.join(near)}."
        )
    return micro_batch // plan.ghost_batch


def accumulation(plan: Plan, world: int, ghosts_per_micro: int) -> int:
    """Return the largest number of micro-batches that any rank processes in one update."""
    return math.ceil(math.ceil(plan.ghosts / world) / ghosts_per_micro)


def _with_few_images(nominal: int, samples: int, ghost_batch: int) -> str:
    """Return the remedy for a batch that is larger than the training set: settings that fit."""
    shrunk, _ = scaled_batch(nominal, samples, ghost_batch)
    if shrunk > samples:
        return "Use more images"
    # 32, or a smaller power of two for fewer images, in whole ghost batches.
    size = min(32, 1 << (samples.bit_length() - 1))
    size = size // ghost_batch * ghost_batch or size
    lr = 0.16 * size / 256  # 0.16: between the rates of the recipes goyal (0.1) and torchlars (0.2) for 256 images
    return (
        f"Set batch.size and optimizer.lr, such as batch.size={size} optimizer=sgd optimizer.lr={lr:g}, or set "
        f"batch.scaled=true, which shrinks the batch in proportion to the data set (here to {shrunk:,}) "
        "and keeps the row's lr"
    )


def _batch_key(config: Config) -> str:
    if config.batch.size is not None:
        return f"batch.size={config.batch.size}"
    return f"batch={config.batch.name}"
