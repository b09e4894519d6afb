"""Compute the bytes that a run leaves on disk: its checkpoints and logs, summed over the network's tensors and layers.

Most terms follow from the file formats; the rest are constants, measured on the files of real runs. Files of a few
kilobytes that a run has once (config, record, results) are not counted.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lars_train.config import Config
from lars_train.data.transforms import TrainingSizes
from lars_train.monitoring.fields import FIELDS
from lars_train.monitoring.layers import stage_of
from lars_train.monitoring.log import RATIOS_FILE
from lars_train.run_plan import Plan

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
# torch.save: bytes per tensor (header, padding, directory entry, pickle); of config and plan; per class name.
_TENSOR_BYTES, _SETTINGS_BYTES, _CLASS_BYTES = 300, 8_000, 7
# JSON: punctuation around a name; the digits of a float; a trust ratio of four digits; a line without values.
_NAME_BYTES, _FLOAT_BYTES, _RATIO_BYTES, _LINE_BYTES = 6, 16, 9, 36
_WHOLE = {"train/bad_images", "train/checkpoint_failures", "noise/critical_batch", "val/count", "val/bad_images"}
# TensorBoard: an event without values; a scalar without its tag; a histogram without tag and bins; the layout.
_EVENT_BYTES, _SCALAR_BYTES, _HISTOGRAM_BYTES, _PAGE_BYTES = 31, 9, 60, 1_500
# 32 training images, once. PNG compresses photographs to two thirds, drawings to a third: assume half.
_SAMPLE_IMAGES = 32 * 3 / 2
# A histogram of the layers' values has a bin of two float64 for each factor of 1.1 between the smallest and the largest
# value. `_DECADES` has this range in decades (factors of ten), by quantity.
_BYTES_PER_DECADE = 16 / math.log10(1.1)
_DECADES = {
    "lars": {"weight_norm": 2.0, "grad_norm": 1.7, "update_ratio": 0.5, "trust_ratio": 2.2, "layer_lr": 2.2},
    "plain": {"weight_norm": 2.0, "grad_norm": 1.7, "update_ratio": 2.0},
}


def volume(
    config: Config, plan: Plan, network: nn.Module, classes: tuple[str, ...], *, slots: int, several: bool
) -> dict[str, Any]:
    """Return the bytes of a run by purpose, as plain values.

    At the end, the run keeps `keep` checkpoints and the best one, which takes no extra space if it is one of them.

    `slots`: the size of the optimizer's state in multiples of the weights. `several`: an update has more than one
    micro-batch, so that the gradient noise is logged.
    """
    saved = checkpoints(config, plan)
    kept = min(saved, config.checkpoint.keep)
    checkpoint = _checkpoint(config, network, classes, slots)
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    training, validation = (_fields(config, several, val=val) for val in (False, True))
    line = {
        METRICS: _json_line(training),
        RATIOS_FILE: _LINE_BYTES + _RATIO_BYTES * len(names) if config.optimizer.name == "lars" else 0,
        TENSORBOARD: _scalars(training) + _layers(config, names),
    }
    log = {name: log_lines(config, plan) * size for name, size in line.items()}
    log[METRICS] += evaluations(config, plan) * _json_line(validation)
    log[TENSORBOARD] += evaluations(config, plan) * _scalars(validation)
    log[TENSORBOARD] += _PAGE_BYTES + round(_SAMPLE_IMAGES * TrainingSizes.from_config(config.data).at(0) ** 2)
    return {
        "checkpoint_bytes": checkpoint,
        "checkpoints_written_bytes": saved * checkpoint,
        "checkpoints_kept_bytes": [kept * checkpoint, min(kept + 1, saved) * checkpoint],
        "log_line_bytes": line,
        "log_bytes": log,
        "bytes": min(kept + 1, saved) * checkpoint + sum(log.values()),
    }


def _checkpoint(config: Config, network: nn.Module, classes: tuple[str, ...], slots: int) -> int:
    width = 8 if config.precision.name == "fp64" else 4
    model = list(network.state_dict().values())
    parameters = [p.numel() for p in network.parameters()]
    weights = sum(int(t.numel()) * (width if t.is_floating_point() else t.element_size()) for t in model)
    values = weights + slots * width * sum(parameters)
    tensors = len(model) + slots * len(parameters)
    if config.model.ema is not None:
        values, tensors = values + weights, tensors + len(model)
    return values + _TENSOR_BYTES * tensors + _SETTINGS_BYTES + sum(_CLASS_BYTES + len(name) for name in classes)


def _fields(config: Config, several: bool, *, val: bool) -> list[str]:
    absent = {"noise": not several, "train/loss_scale": config.precision.name != "fp16"}
    absent["memory/device"] = config.device == "cpu"
    absent |= dict.fromkeys(("val/ema_top1", "val/ema_top5", "val/ema_loss"), config.model.ema is None)
    found = [name for name in FIELDS if "/" in name and name.startswith("val/") == val]
    return [name for name in found if not absent.get(name) and not absent.get(name.partition("/")[0])]


def _json_line(fields: list[str]) -> int:
    return _LINE_BYTES + sum(_NAME_BYTES + len(name) + (1 if name in _WHOLE else _FLOAT_BYTES) for name in fields)


def _scalars(tags: list[str]) -> int:
    return _EVENT_BYTES + sum(_SCALAR_BYTES + len(tag) for tag in tags)


def _layers(config: Config, names: list[str]) -> int:
    """Return the bytes of the event with histograms over the layers and a scalar for each stage."""
    decades, stages = _DECADES["lars" if config.optimizer.name == "lars" else "plain"], set(map(stage_of, names))
    histograms = sum(
        _HISTOGRAM_BYTES + len(f"layers/{what}") + round(_BYTES_PER_DECADE * count) for what, count in decades.items()
    )
    return histograms + _scalars([f"stage_{what}/{stage}" for what in decades for stage in stages])


def log_lines(config: Config, plan: Plan) -> int:
    """Return the number of log lines of the whole run (`plan.log_is_due`)."""
    return _due(plan, config.log_every, plan.updates_per_epoch)


def evaluations(config: Config, plan: Plan) -> int:
    """Return the number of evaluations of the whole run (`plan.evaluation_is_due`)."""
    each = plan.updates_per_epoch * config.evaluate.every_epochs
    return _due(plan, each, each)


def checkpoints(config: Config, plan: Plan) -> int:
    """Return the number of checkpoints of the whole run (`plan.checkpoint_is_due`), without those by a timer."""
    every = config.checkpoint.every_updates or plan.updates_per_epoch
    return _due(plan, every, plan.updates_per_epoch * config.evaluate.every_epochs)


def _due(plan: Plan, one: int, other: int) -> int:
    """Return the number of updates that are a multiple of `one` or `other`, or the last. No loop: a run may be long."""
    last = plan.stop
    multiples = last // one + last // other - last // math.lcm(one, other)
    return multiples + (last % one != 0 and last % other != 0)
