"""How many bytes a run leaves on disk: its checkpoints and its log, from one record of each and how many there will be.

The records are real ones: a checkpoint is serialised (and thrown away), and a line of each file of the log is written
into a temporary folder. Its values are made up, so the sizes are right to the digits that numbers have. Files of a few
kilobytes that a run has once (config, record, results) are not counted.
"""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lars_train.config import Config
from lars_train.monitoring.fields import FIELDS
from lars_train.monitoring.layers import LayerValues
from lars_train.monitoring.log import RATIOS, RunLog
from lars_train.plan import Plan

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
# The pictures that TensorBoard shows, once; as PNG they take at most what their pixels do.
_PICTURES = 32
_WHOLE = {"train/bad_images", "train/checkpoint_failures", "noise/critical_batch", "val/count", "val/bad_images"}
_NOT_EVERYWHERE = {"train/loss_scale": "fp16"}


@dataclass(frozen=True)
class Records:
    """Bytes of one checkpoint, and of the log by file: per log line, per evaluation, and once."""

    checkpoint: int
    line: dict[str, int]
    evaluation: dict[str, int]
    once: dict[str, int]


class _Counted:
    """A file of which nothing is kept but its size."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        """As a file's."""
        count = memoryview(data).nbytes
        self.size += count
        return count

    def flush(self) -> None:
        """As a file's."""


def records(
    config: Config, plan: Plan, network: nn.Module, classes: tuple[str, ...], *, slots: int, several: bool
) -> Records:
    """What one of each takes.

    `slots`: how often the optimizer keeps the size of the weights. `several`: an update has more than one micro-batch,
    of whose gradients the noise is estimated.
    """
    size = config.data.image_size
    lines, evaluations, once = _log(config, network, several=several)
    once[TENSORBOARD] += _PICTURES * 3 * size * size
    return Records(_checkpoint(config, plan, network, classes, slots), lines, evaluations, once)


def volume(found: Records, *, log_lines: int, evaluations: int, checkpoints: int, keep: int) -> dict[str, Any]:
    """Bytes of a run with so many of each, as plain values.

    At its end there are `keep` checkpoints and the best one, which may be one of them and takes no room then.
    """
    kept = min(checkpoints, keep)
    log = {
        name: found.once[name] + log_lines * found.line[name] + evaluations * found.evaluation[name]
        for name in found.once
    }
    return {
        "checkpoint_bytes": found.checkpoint,
        "checkpoints_written_bytes": checkpoints * found.checkpoint,
        "checkpoints_kept_bytes": [kept * found.checkpoint, min(kept + 1, checkpoints) * found.checkpoint],
        "log_line_bytes": dict(found.line),
        "log_bytes": log,
        "bytes": min(kept + 1, checkpoints) * found.checkpoint + sum(log.values()),
    }


def log_lines(config: Config, plan: Plan) -> int:
    """Log lines of the whole run, without asking for each update (`plan.log_is_due`)."""
    return _due(plan, config.log_every, plan.updates_per_epoch)


def evaluations(config: Config, plan: Plan) -> int:
    """Evaluations of the whole run (`plan.evaluation_is_due`)."""
    each = plan.updates_per_epoch * config.evaluate.every_epochs
    return _due(plan, each, each)


def checkpoints(config: Config, plan: Plan) -> int:
    """Checkpoints of the whole run that no clock asks for (`plan.checkpoint_is_due`), those of evaluations included."""
    every = config.checkpoint.every_updates or plan.updates_per_epoch
    return _due(plan, every, plan.updates_per_epoch * config.evaluate.every_epochs)


def _due(plan: Plan, one: int, other: int) -> int:
    """How many updates are the last one or a multiple of either step; counted, for a run may have many millions."""
    last = plan.stop
    multiples = last // one + last // other - last // math.lcm(one, other)
    return multiples + (last % one != 0 and last % other != 0)


def _checkpoint(config: Config, plan: Plan, network: nn.Module, classes: tuple[str, ...], slots: int) -> int:
    wide = torch.float64 if config.precision.name == "fp64" else torch.float32
    model = {k: v.to(wide) if v.is_floating_point() else v for k, v in network.state_dict().items()}
    parameters = [p.detach().to(wide) for p in network.parameters()]
    state = {i: {f"slot{n}": p.clone() for n in range(slots)} for i, p in enumerate(parameters)}
    groups = [{"lr": 1.0, "params": list(range(len(parameters)))}]
    content = {
        "model": model,
        "optimizer": {"state": state, "param_groups": groups},
        "config": dataclasses.asdict(config),
        "plan": dataclasses.asdict(plan),
        "classes": list(classes),
    }
    file: Any = _Counted()
    torch.save(content, file)
    return int(file.size)


def _log(config: Config, network: nn.Module, *, several: bool) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    draw = random.Random(0)
    names = [name for name, _ in network.named_parameters()]

    def spread(low: float, high: float) -> list[float]:
        return [10 ** draw.uniform(low, high) for _ in names]

    # A histogram's size goes with how many powers of ten the layers lie apart: here as far as in real runs. A layer
    # that begins at zero is not there for long.
    weights = [float(p.detach().norm()) or 10 ** draw.uniform(-1, 0) for p in network.parameters()]
    updates = [w * r for w, r in zip(weights, spread(-3, -2.5), strict=True)]
    ratios = dict(zip(names, spread(-2.8, -0.6), strict=True)) if config.optimizer.name == "lars" else {}
    layers = LayerValues(names, weights, spread(-1.7, 0), updates, 1.0, ratios)
    with tempfile.TemporaryDirectory() as folder:
        log = RunLog(Path(folder), 0)
        try:
            log.sync()
            once = _sizes(Path(folder))
            log.write(
                1000, 10.123457, dict(_values(config, ("train", "noise", "memory", "loader", "checkpoint"), several))
            )
            if ratios:
                log.write_ratios(1000, names, list(ratios.values()))
            log.board.layers(layers, 1000)
            log.sync()
            line = _sizes(Path(folder))
            log.write(1000, 10.123457, dict(_values(config, ("val",), several)))
            log.sync()
            evaluation = _sizes(Path(folder))
        finally:
            log.close()
    return (
        {name: line[name] - once[name] for name in once},
        {name: evaluation[name] - line[name] for name in once},
        once,
    )


def _values(config: Config, groups: tuple[str, ...], several: bool) -> Iterator[tuple[str, float]]:
    for name in FIELDS:
        group = name.partition("/")[0]
        if group not in groups or (group == "noise" and not several):
            continue
        if name in _NOT_EVERYWHERE and config.precision.name != _NOT_EVERYWHERE[name]:
            continue
        if name == "memory/device" and config.device == "cpu":
            continue
        # As many digits as most numbers have.
        yield name, 0 if name in _WHOLE else 1e18 if name == "val/checksum" else math.pi
    yield "run/seconds", 12345.678


def _sizes(folder: Path) -> dict[str, int]:
    found = {name: path.stat().st_size if (path := folder / name).exists() else 0 for name in (METRICS, RATIOS)}
    found[TENSORBOARD] = sum(path.stat().st_size for path in (folder / TENSORBOARD).iterdir())
    return found
