"""Format what a run reports: its effective settings, a line per epoch, and ``final.json``."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

from lars_train.config import Config, DataConfig, filled, lacks, published_top1, row_sizes_left_out
from lars_train.config.lars_options import changed_options
from lars_train.config.network import describe_network
from lars_train.data.inventory import Inventory
from lars_train.data.transforms import TrainingSizes
from lars_train.messages import counted, format_duration, format_number, operations
from lars_train.models.losses import BCE
from lars_train.monitoring.fields import format_fields
from lars_train.run_plan import IMAGENET_TRAIN_IMAGES, Plan, accumulation, describe_decay

ALREADY_FINISHED = "This run has finished. resume=never moves it aside and starts a new one."

FLIPPED = "with the mean of the logits of each image and its mirror image"
"""The description of ``evaluate.flip=true`` in messages."""

# Thresholds of `validation_gap_note`: points of top-1, and train/update_ratio.
_LARGE_GAP, _FAST_WEIGHTS = 10.0, 0.01


class MachineSettings(Protocol):
    """Settings resolved for this machine that `startup_lines` reports."""

    @property
    def micro_batch(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def channels_last(self) -> bool: ...
    @property
    def threads(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def device(self) -> str: ...


class EvaluationResult(Protocol):
    """Results of an evaluation; top-1 and top-5 in percent. `average`: the results of the averaged weights, if any."""

    @property
    def top1(self) -> float: ...
    @property
    def top5(self) -> float: ...
    @property
    def count(self) -> int: ...
    @property
    def average(self) -> EvaluationResult | None: ...


def startup_lines(
    config: Config, plan: Plan, settings: MachineSettings, directory: Path, resumed_at: int, inventory: Inventory
) -> Iterator[str]:
    """Yield the effective settings of a run, one line each."""
    most = accumulation(plan, settings.world, settings.micro_batch // plan.ghost_batch)
    yield from experiment_lines(config, plan, inventory)
    each = " each" if settings.world > 1 else ""
    yield f"world size     {settings.world} ({settings.device}, {counted(settings.threads, 'CPU thread')}{each})"
    yield f"micro-batch    {settings.micro_batch} images, accumulation {most}, ghost batch {plan.ghost_batch}"
    layout = "channels last" if settings.channels_last else "channels first"
    how = "CUDA graphs" if config.cuda_graphs else "compiled" if config.compile else "not compiled"
    yield f"precision      {settings.precision}, {layout}, {how}"
    if config.gradient_compression != "none":
        alone = "" if settings.world > 1 else ": no effect, since a single rank sends no gradients"
        yield f"compression    gradients are exchanged in {config.gradient_compression}{alone}"
    yield f"run directory  {directory}"
    if resumed_at:
        yield f"resumed        at update {resumed_at:,} (resume=never starts over)"


def flops_line(flops_per_image: Collection[float], peak_flops: float | None) -> str:
    """Describe the operations to train on an image and, for ``train/mfu``, the measured operations/s of a rank.

    `flops_per_image`: a value for each size of the images.
    """
    relative = (
        ""
        if peak_flops is None
        else f"; train/mfu is relative to {operations(peak_flops)}/s per rank, measured here with matrix products"
    )
    counts = " to ".join(map(operations, sorted({min(flops_per_image), max(flops_per_image)})))
    return f"arithmetic     {counts} per image{relative}"


def experiment_lines(config: Config, plan: Plan, inventory: Inventory) -> Iterator[str]:
    """Yield lines that describe the experiment (the same on any hardware), and the skipped files of the data set."""
    opt, schedule = config.optimizer, config.schedule
    optimizer = f"LARS over {opt.base}" if opt.name == "lars" else opt.base
    yield f"data           {config.data.name}: {plan.samples:,} training images"
    if config.data.holdout is not None:
        yield f"               validation: held out of the training images (data.holdout={config.data.holdout:g})"
    for line in inventory.lines():
        yield f"{'':<15}{line}"
    yield f"model          {describe_network(config.model)}, {_describe_sizes(config.data)}"
    if config.model.blurpool:
        yield "               strided convolutions blur their input (model.blurpool=true)"
    left_out = ", ".join(f"{key}={value}" for key, value in row_sizes_left_out(config).items())
    if left_out:
        yield (
            f"{'':<15}NOTE: the sizes of data={config.data.name} or of the command line replace those of the recipe's "
            f"row: {left_out}"
        )
    if config.model.ema is not None:
        span = 1 / (1 - config.model.ema)
        more = ", more than the run has" if span > plan.updates else ""
        yield f"average        of the weights over about {span:,.0f} updates{more} (model.ema={config.model.ema:g})"
        yield f"               from update {config.model.ema_start:,}; its accuracy counts as the run's"
    yield f"recipe         {config.recipe.name}"
    if missing := lacks(config):
        yield f"               not implemented: {'; '.join(missing)}"
    if config.evaluate.flip:
        yield f"evaluation     {FLIPPED} (evaluate.flip=true)"
    yield f"global batch   {counted(plan.global_batch, 'image')} per update ({plan.arithmetic()})"
    if plan.raised:
        yield f"               NOTE: raised to {plan.global_batch}, the smallest batch for batch norm; lr is unchanged"
    yield f"updates        {plan.updates_per_epoch:,} per epoch, {plan.updates:,} in {counted(plan.epochs, 'epoch')}"
    if plan.stop < plan.updates:
        yield f"               stops after update {plan.stop:,} (max_updates)"
    yield f"optimizer      {optimizer}, peak lr {opt.lr:g}, weight decay {opt.weight_decay:g}"
    if opt.name == "lars":
        changed = changed_options(opt)
        exceptions = f" except {', '.join(changed)}" if changed else ""
        without = "" if opt.adapt_norm_bias in (None, True) else "; none for batch norm and biases"
        yield f"               trust ratios as in {opt.preset or 'torchlars'}{exceptions}{without}"
    if config.loss == BCE:
        above = f", targets above {config.bce_threshold:g} become 1" if config.bce_threshold else ""
        yield f"loss           binary cross entropy, mean over the classes{above}"
    methods = [f"{key} (alpha {alpha:g})" for key in ("mixup", "cutmix") if (alpha := getattr(config.augment, key))]
    if methods:
        yield f"augment        {' or '.join(methods)} within each ghost batch"
        yield "               training top-1 counts the label of a mixed image's larger part"
    if config.augment.auto not in (None, "none"):
        ops = counted(config.augment.randaugment_ops or 0, "operation")
        strength = f", {ops} of magnitude {config.augment.randaugment_magnitude}"
        name = "TrivialAugment" if config.augment.auto == "trivial" else f"RandAugment{strength}"
        yield f"augment        {name}, as in torchvision"
    warmup = "no warm-up, "
    if plan.warmup_updates:
        length = format_number(filled(schedule.warmup_epochs))
        epochs = f"{length} epoch{'' if length == '1' else 's'}"
        warmup = f"warm-up {counted(plan.warmup_updates, 'update')} ({epochs}), then "
    decay = describe_decay(config)
    yield f"schedule       {warmup}{decay}" + (f", {schedule.form} form" if decay != schedule.form else "")


def _describe_sizes(data: DataConfig) -> str:
    sizes = TrainingSizes.from_config(data)
    if sizes.start == sizes.end == data.image_size:
        return f"{data.image_size} pixels"
    training = " to ".join(map(str, dict.fromkeys((sizes.start, sizes.end))))
    return f"{training} pixels in training, {data.image_size} in evaluation"


def epoch_fields(
    update: int,
    plan: Plan,
    logged: dict[str, float],
    result: EvaluationResult | None = None,
    best_top1: float = math.nan,
    seconds_left: float | None = None,
) -> Iterator[str]:
    """Yield the fields of an epoch's line, most important first.

    `logged`: the last logged values. `result`: the epoch's evaluation, if any. `seconds_left`: time to the end of the
    run.
    """
    yield f"epoch {math.ceil(update / plan.updates_per_epoch)}/{plan.epochs}"
    yield f"update {update:,}"
    if result is not None:
        yield f"top-1 {result.top1:.2f} % of {result.count:,}"
        if result.average is not None:
            yield f"EMA {result.average.top1:.2f} %"
        yield f"best {best_top1:.2f} %"
    yield from format_fields(logged, "train/loss")
    if seconds_left is not None and update < plan.stop:
        yield f"{format_duration(seconds_left)} left"
    yield from format_fields(logged, "train/images_per_s", "train/wait_share", "train/mfu", "train/lr")


def validation_gap_note(logged: dict[str, float], result: EvaluationResult) -> str | None:
    """Return a note if validation top-1 is far below training top-1 while the weights change fast; else None."""
    moved = logged.get("train/update_ratio", 0.0)
    if logged.get("train/top1", 0.0) - result.top1 < _LARGE_GAP or not moved >= _FAST_WEIGHTS:
        return None
    return (
        f"NOTE: validation is far below training ({logged['train/top1']:.0f} %): it uses batch norm's running "
        f"statistics, an average over about ten updates, and the weights still change by {100 * moved:.1f} % per "
        "update. The gap usually closes as the learning rate falls (docs/troubleshooting.md)."
    )


def final_record(
    config: Config,
    plan: Plan,
    *,
    directory: Path,
    update: int,
    best_top1: float,
    result: EvaluationResult,
    seconds: float,
    bad_images: int,
    passed_over: int,
    rollbacks: list[dict[str, int]],
    weights_sha256: str,
    weights_sha256_float32: str,
    ema_sha256: str | None = None,
    kwh: float | None = None,
) -> dict[str, Any]:
    """Return the content of ``final.json``: top-1 and top-5 in percent, seconds of wall time over all starts.

    `published_top1`: the value of the recipe's row if the run is ResNet-50 on all of ImageNet, else None.
    With ``model.ema``, the results are those of the average of the weights, and `result` has both.
    `passed_over`: global batches without an update, skipped by rollbacks or by float16's loss scaling.
    """
    reported = result.average or result
    of_weights = {"weights_top1": result.top1, "weights_top5": result.top5, "ema_sha256": ema_sha256}
    full = plan.samples == IMAGENET_TRAIN_IMAGES and not plan.scaled and describe_network(config.model) == "resnet50"
    return {
        "best_top1": best_top1,
        "final_top1": reported.top1,
        "final_top5": reported.top5,
        **({} if result.average is None else of_weights),
        "val_count": result.count,
        "published_top1": published_top1(config) if full else None,
        "updates": update,
        "planned_updates": plan.updates,
        "seconds": seconds,
        **({} if kwh is None else {"kwh": kwh}),
        "weights_sha256": weights_sha256,
        "weights_sha256_float32": weights_sha256_float32,
        "bad_images": bad_images,
        "passed_over": passed_over,
        "rollbacks": rollbacks,
        "batch": config.batch.name if config.batch.size is None else str(config.batch.size),
        "nominal_batch": plan.nominal_batch,
        "global_batch": plan.global_batch,
        "raised": plan.raised,
        "recipe": config.recipe.name,
        "data": config.data.name,
        "model": describe_network(config.model),
        "optimizer": config.optimizer.name,
        "base": config.optimizer.base,
        "lr": config.optimizer.lr,
        "policy": describe_decay(config),
        "power": config.schedule.power,
        "warmup_epochs": config.schedule.warmup_epochs,
        "epochs": plan.epochs,
        "epochs_done": update / plan.updates_per_epoch,
        "seed": config.seed,
        "directory": str(directory),
    }
