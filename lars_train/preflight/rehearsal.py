"""Compute the updates, learning rates, checkpoints and evaluations of a whole run for ``mode=plan``, without training.

Calls the same functions as a run (run_plan.py, optim/schedule.py, data/order.py). Builds no network, reads
no image, writes no run directory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lars_train.config import AUTO, Config
from lars_train.config.network import describe_network
from lars_train.data.order import eval_range, ghost_range
from lars_train.data.transforms import TrainingSizes
from lars_train.messages import counted
from lars_train.preflight.disk_volume import log_lines
from lars_train.run_plan import (
    Plan,
    accumulation,
    check_micro_batch,
    check_world,
    checkpoint_is_due,
    describe_decay,
    evaluation_is_due,
    make_schedule,
)

FORMAT = 1
_LR_LINES = 10
_CURVE_POINTS = 60
_PLOT_WIDTH, _PLOT_HEIGHT = 60, 8


def rehearse(config: Config, plan: Plan, *, val_count: int, world: int) -> dict[str, Any]:
    """Return what a run of a resolved config on `world` ranks would do, as plain values for JSON.

    Updates are counted from 1, as in checkpoints and logs. ``lr_first`` and ``lr_last`` are the rates of an epoch's
    first and last update. ``checkpoints`` omits those due to a timer, a signal or a divergence. Raises
    `ConfigError` for more ranks than ghost batches, and for a micro-batch that is not made of whole ghost batches.
    """
    check_world(plan, world)
    epoch_ends = {*range(plan.updates_per_epoch, plan.stop + 1, plan.updates_per_epoch), plan.stop}
    evaluations = [u for u in sorted(epoch_ends) if evaluation_is_due(config, plan, u)]
    # A run writes a checkpoint with each evaluation.
    saved = set(evaluations).union(u for u in range(1, plan.stop + 1) if checkpoint_is_due(config, plan, u))
    counts = [stop - start for start, stop in (eval_range(val_count, rank, world) for rank in range(world))]
    ghosts = [stop - start for start, stop in (ghost_range(plan.ghosts, rank, world) for rank in range(world))]
    return {
        "format": FORMAT,
        "recipe": config.recipe.name,
        "batch": config.batch.name if config.batch.size is None else str(config.batch.size),
        "data": config.data.name,
        "model": describe_network(config.model),
        "samples": plan.samples,
        "global_batch": plan.global_batch,
        "ghost_batch": plan.ghost_batch,
        "ghost_batches": plan.ghosts,
        "raised": plan.raised,
        "world": world,
        "ghost_batches_per_rank": [min(ghosts), max(ghosts)],
        "accumulation": _accumulation(config, plan, world),
        "epochs": plan.epochs,
        "updates_per_epoch": plan.updates_per_epoch,
        "updates": plan.updates,
        "stop": plan.stop,
        "warmup_updates": plan.warmup_updates,
        "samples_per_epoch": plan.updates_per_epoch * plan.global_batch,
        "samples_in_all": plan.stop * plan.global_batch,
        "optimizer": config.optimizer.name,
        "lr": config.optimizer.lr,
        "policy": describe_decay(config),
        "lr_per_epoch": list(_epochs(config, plan)),
        "lr_curve": list(_curve(config, plan)),
        "log_lines": log_lines(config, plan),
        "checkpoints": sorted(saved),
        "checkpoints_kept": min(len(saved), config.checkpoint.keep) + 1,
        "evaluations": evaluations,
        "evaluated_images": sum(counts),
        "evaluated_images_per_rank": [min(counts), max(counts)],
    }


def _epochs(config: Config, plan: Plan) -> Iterator[dict[str, float]]:
    rate, sizes = make_schedule(plan, config), TrainingSizes.from_config(config.data)
    for epoch in range(math.ceil(plan.stop / plan.updates_per_epoch)):
        first = epoch * plan.updates_per_epoch
        last = min(first + plan.updates_per_epoch, plan.stop) - 1
        yield {
            "epoch": epoch + 1,
            "first_update": first + 1,
            "last_update": last + 1,
            "lr_first": rate(first),
            "lr_last": rate(last),
            "train_size": sizes.at(epoch),
        }


def _curve(config: Config, plan: Plan) -> Iterator[list[float]]:
    """Yield (update, learning rate), evenly spaced over the run and on both sides of the warm-up's end."""
    rate = make_schedule(plan, config)
    even = {round(k * (plan.stop - 1) / (_CURVE_POINTS - 1)) for k in range(_CURVE_POINTS)}
    bend = {u for u in (plan.warmup_updates - 1, plan.warmup_updates) if 0 <= u < plan.stop}
    for update in sorted(even | bend):
        yield [update + 1, rate(update)]


def _accumulation(config: Config, plan: Plan, world: int) -> int | None:
    """Return the accumulation; None if the micro-batch is chosen to fit the device."""
    if config.micro_batch == AUTO:
        return None
    return accumulation(plan, world, check_micro_batch(plan, int(config.micro_batch)))


def describe_rehearsal(rehearsed: dict[str, Any]) -> Iterator[str]:
    """Yield lines that describe the result of `rehearse`."""
    few, many = rehearsed["ghost_batches_per_rank"]
    ghosts = counted(few, "ghost batch", "ghost batches") if few == many else f"{few} or {many} ghost batches"
    yield f"world size     {rehearsed['world']}, {ghosts}{' each' if rehearsed['world'] > 1 else ''} per update"
    if rehearsed["accumulation"] is not None:
        yield f"accumulation   {rehearsed['accumulation']}"
    epochs = rehearsed["lr_per_epoch"]
    resizes = len({entry["train_size"] for entry in epochs}) > 1
    step = math.ceil(len(epochs) / _LR_LINES)
    for entry in epochs:
        if (entry["epoch"] - 1) % step == 0 or entry is epochs[-1]:
            pixels = f", {entry['train_size']} pixels" if resizes else ""
            yield f"lr             epoch {entry['epoch']:>3}: {entry['lr_first']:.3g} to {entry['lr_last']:.3g}{pixels}"
    for line in text_plot([(x, y) for x, y in rehearsed["lr_curve"]], ("update 1", f"update {rehearsed['stop']:,}")):
        yield f"     {line}"
    yield f"images         {rehearsed['samples_per_epoch']:,} per epoch, {rehearsed['samples_in_all']:,} in total"
    yield f"checkpoints    {len(rehearsed['checkpoints']):,} written, {rehearsed['checkpoints_kept']} kept at the end"
    yield f"evaluations    {len(rehearsed['evaluations']):,}, each of {counted(rehearsed['evaluated_images'], 'image')}"
    yield f"log lines      {rehearsed['log_lines']:,}"


def text_plot(points: Sequence[tuple[float, float]], ends: tuple[str, str]) -> Iterator[str]:
    """Yield the lines of a plot of `points` (x, y), sorted by x, with `ends` as the labels of the x axis.

    The y axis begins at 0, or at the minimum of y if that is negative. Each point is a star.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(0.0, *ys), max(ys)
    height, width = (high - low) or 1.0, (xs[-1] - xs[0]) or 1.0
    raster = [[" "] * _PLOT_WIDTH for _ in range(_PLOT_HEIGHT)]
    for x, y in points:
        column = round((x - xs[0]) / width * (_PLOT_WIDTH - 1))
        row = round((high - y) / height * (_PLOT_HEIGHT - 1))
        raster[row][column] = "*"
    for number, row_of in enumerate(raster):
        value = high - number / (_PLOT_HEIGHT - 1) * height
        label = f"{value:.3g}" if number in (0, _PLOT_HEIGHT // 2, _PLOT_HEIGHT - 1) else ""
        yield f"{label:>8} |{''.join(row_of).rstrip()}".rstrip()
    yield f"{'':8} +{'-' * _PLOT_WIDTH}"
    yield f"{'':8}  {ends[0]}{ends[1]:>{_PLOT_WIDTH - len(ends[0])}}"
