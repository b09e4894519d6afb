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

from lars_train.check.facts import Step
from lars_train.config import Config, filled
from lars_train.data.loader import Batch
from lars_train.launch import Ranks
from lars_train.optim.factory import build_optimizer
from lars_train.plan import Plan
from lars_train.training.device import choose_layout, choose_precision
from lars_train.training.distributed import Group
from lars_train.training.feed import normaliser
from lars_train.training.network import make_network
from lars_train.training.resolve import Resolved
from lars_train.training.trainer import Hyper, Trainer

# So small that the weights stay as they were drawn, however long it goes on.
_LR = 1e-9
# Updates before the clock runs: cuDNN chooses its kernels, torch.compile compiles.
_WARM_UP = {"cpu": 1, "cuda": 5}
_LEAST = 2


def train_for(
    config: Config, plan: Plan, resolved: Resolved, classes: int, device: torch.device, seconds: float
) -> Step:
    """Train this rank alone for about `seconds`, each update being one micro-batch: forward, backward, optimizer.

    On a CPU that needs long for it, a micro-batch is one ghost batch.
    """
    torch.manual_seed(config.seed)
    precision = choose_precision(resolved.precision, device)
    network = make_network(config, classes).to(device=device, dtype=precision.weights)
    network = network.to(memory_format=choose_layout(config)).train()
    alone = Group(Ranks())
    samples = plan.ghost_batch if device.type == "cpu" else resolved.micro_batch
    trainer = Trainer(
        network,
        build_optimizer(config.optimizer, network),
        dataclasses.replace(plan, global_batch=samples),
        Hyper(lambda update: _LR, filled(config.label_smoothing)),
        normalise=normaliser(config.data.mean, config.data.std, device, precision, choose_layout(config)),
        precision=precision,
        device=device,
        group=alone,
        compiled=config.compile is True,
    )
    rate = _rate(trainer, samples, config.data.image_size, classes, seconds)
    if samples < resolved.micro_batch and _LEAST * resolved.micro_batch < rate * seconds:
        samples = resolved.micro_batch
        trainer.plan = dataclasses.replace(plan, global_batch=samples)
        rate = _rate(trainer, samples, config.data.image_size, classes, seconds)
    loss = float(trainer.meter.sums[0])
    width = 2 if config.gradient_compression == "bf16" else precision.weights.itemsize
    gradients = sum(p.numel() for p in network.parameters()) * width
    held = sum(tensor.nbytes for tensor in _tensors(trainer.state()))
    return Step(samples, rate, precision.name, math.isfinite(loss), held, gradients)


def _rate(trainer: Trainer, samples: int, size: int, classes: int, seconds: float) -> float:
    """Images per second."""
    device = trainer.device
    images = torch.randint(256, (samples, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.randint(classes, (samples,))
    batches = itertools.repeat(Batch(images.to(device), labels.to(device), ()))
    warm_up = time.perf_counter()
    for _ in range(_WARM_UP.get(device.type, _WARM_UP["cuda"])):
        trainer.run_update(batches, 1, measure=False)
    _wait_for(device)
    if device.type == "cpu" and time.perf_counter() - warm_up > seconds:
        # A slow one is measured by its first update: others would take minutes and say little more.
        return samples / (time.perf_counter() - warm_up)
    started, updates = time.perf_counter(), 0
    while updates < _LEAST or time.perf_counter() - started < seconds:
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
