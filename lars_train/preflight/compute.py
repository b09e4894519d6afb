"""How many images per second a device trains on: a short training of the configured model on made-up images."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lars_train.config import Config
from lars_train.data.loading.loader import Batch
from lars_train.launch import Ranks
from lars_train.plan import Plan
from lars_train.preflight.facts import Step
from lars_train.training.assemble import build_trainer, make_network
from lars_train.training.device import choose_layout, choose_precision
from lars_train.training.distributed import Group
from lars_train.training.resolve import Resolved, check_compiler
from lars_train.training.trainer import Trainer

# So small that the weights stay as they were drawn, however long it goes on.
_LR = 1e-9
# Updates before the clock runs: cuDNN chooses its kernels, torch.compile compiles.
_WARM_UP = {"cpu": 1, "cuda": 5}
# Images of a CPU's first update: batch norm wants two.
_FIRST = 2


def train_for(
    config: Config, plan: Plan, resolved: Resolved, classes: int, device: torch.device, seconds: float, most: float
) -> Step:
    """Train this rank alone for about `seconds`, each update being one micro-batch: forward, backward, optimizer.

    On a CPU an update has as many images, up to a micro-batch, as let it all be done in `most` seconds; the first one
    has two, and of a CPU that is too slow for more it is the measure.
    """
    end = time.perf_counter() + most
    torch.manual_seed(config.seed)
    if config.compile:
        check_compiler(device)
    precision = choose_precision(resolved.precision, device)
    network = make_network(config, classes).to(device=device, dtype=precision.weights)
    network = network.to(memory_format=choose_layout(config)).train()
    sizes = _sizes(plan.ghost_batch, resolved.micro_batch) if device.type == "cpu" else [resolved.micro_batch]
    alone = Group(Ranks())
    trainer = build_trainer(config, plan, network, lambda update: _LR, precision=precision, device=device, group=alone)
    samples, rate = 0, math.inf
    while sizes:
        samples = sizes[0] if samples == 0 else sizes[-1]
        batches = _batches(samples, config.data.image_size, classes, device)
        trainer.plan = dataclasses.replace(plan, global_batch=samples)
        rate = _rate(trainer, batches, samples, seconds, end, warmed_up=samples > sizes[0] or len(sizes) == 1)
        # One to warm up with, and one that counts.
        most_samples = rate * (end - time.perf_counter()) / 2
        sizes = [size for size in sizes if samples < size <= most_samples]
    loss = float(trainer.meter.sums[0])
    width = 2 if config.gradient_compression == "bf16" else precision.weights.itemsize
    gradients = sum(p.numel() for p in network.parameters()) * width
    held = sum(tensor.nbytes for tensor in _tensors(trainer.state()))
    return Step(samples, rate, precision.name, math.isfinite(loss), held, gradients)


def _sizes(ghost_batch: int, micro_batch: int) -> list[int]:
    """Images of an update, in rising order: parts of a ghost batch, one, and a micro-batch."""
    parts = itertools.takewhile(lambda size: size < ghost_batch, (_FIRST << power for power in itertools.count()))
    return sorted({*parts, ghost_batch, micro_batch})


def _batches(samples: int, size: int, classes: int, device: torch.device) -> Iterator[Batch]:
    images = torch.randint(256, (samples, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.randint(classes, (samples,))
    return itertools.repeat(Batch(images.to(device), labels.to(device), ()))


def _rate(
    trainer: Trainer, batches: Iterator[Batch], samples: int, seconds: float, end: float, *, warmed_up: bool
) -> float:
    """Images per second, measured for `seconds`, or until `end`; without `warmed_up`, by the first update alone."""
    device = trainer.device
    for _ in range(_WARM_UP.get(device.type, _WARM_UP["cuda"]) if warmed_up else 0):
        trainer.run_update(batches, 1, measure=False)
    _wait_for(device)
    started, updates = time.perf_counter(), 0
    while updates == 0 or (warmed_up and time.perf_counter() < min(started + seconds, end)):
        trainer.run_update(batches, 1, measure=False)
        # The host is ahead of a GPU; it looks at the clock when that has done its part.
        _wait_for(device)
        updates += 1
    return updates * samples / (time.perf_counter() - started)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
