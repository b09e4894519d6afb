"""Estimate the hours of a run on any number of devices, from cited or given speeds."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lars_train.config import AUTO, Config, filled
from lars_train.data.order import eval_range
from lars_train.data.transforms import TrainingSizes
from lars_train.errors import ConfigError
from lars_train.preflight.devices import CPU, DEVICES, FLOPS_PER_IMAGE, TENSORS, speed
from lars_train.preflight.disk_volume import evaluations
from lars_train.preflight.time_model import Machine, Speed, Update, Work, update_seconds
from lars_train.run_plan import Plan
from lars_train.training.device import MOST_SAMPLES
from lars_train.training.metrics import flops_per_image

MAX_DEVICES = 4096
# Devices in a node if launch.nproc=auto, as in the machines of the cited figures.
_NODE = 8
# A training step takes as long as three forward passes (training/metrics.py).
_FORWARDS_PER_STEP = 3


@dataclass(frozen=True)
class Hours:
    """The hours of a run as a function of its devices."""

    config: Config
    plan: Plan
    machine: Machine
    network: nn.Module
    gradient_bytes: int
    buckets: int
    val_count: int

    def at(self, devices: int) -> dict[str, Any]:
        """Return hours, efficiency and the parts of an update on `devices` devices."""
        update = self._update(devices)
        start, stop = eval_range(self.val_count, 0, devices)
        machine = self.machine
        passes = (2 if self.config.evaluate.flip else 1) * (1 if self.config.model.ema is None else 2)
        of_evaluation = _flops_per_image(self.network, filled(self.config.data.image_size))
        cost = passes * of_evaluation / mean_flops(self.config, self.plan, self.network)
        forward = cost * (stop - start) / (_FORWARDS_PER_STEP * machine.speed.rate)
        decoding = (stop - start) / machine.input_rate if machine.input_rate else 0.0
        evaluation = forward + decoding if machine.reads else max(forward, decoding)
        seconds = self.plan.stop * update.seconds + evaluations(self.config, self.plan) * evaluation
        efficiency = self._update(1).seconds / devices / update.seconds
        return {"devices": devices, "hours": seconds / 3600, "efficiency": efficiency, **vars(update)}

    def scaling(self, world: int) -> Iterator[dict[str, Any]]:
        """Yield `at` for 1, 2, 4, ... devices and for `world`, up to one ghost batch per device."""
        most = min(MAX_DEVICES, self.plan.ghosts)
        for devices in sorted({world, most, *(2**k for k in range(most.bit_length()))}):
            yield self.at(devices)

    def _update(self, devices: int) -> Update:
        samples = math.ceil(self.plan.ghosts / devices) * self.plan.ghost_batch
        work = Work(
            samples,
            planned_micro_batch(self.config, self.plan),
            self.plan.ghost_batch,
            self.gradient_bytes,
            self.buckets,
        )
        return update_seconds(self.machine, devices, work)


def planned_micro_batch(config: Config, plan: Plan) -> int:
    """Return the images of a micro-batch: as configured, or the most that ``auto`` takes."""
    if config.micro_batch != AUTO:
        return int(config.micro_batch)
    return max(1, MOST_SAMPLES // plan.ghost_batch) * plan.ghost_batch


def planned_precision(config: Config) -> str:
    """Return the configured precision, with ``auto`` resolved for ``plan.device`` if that is set."""
    if config.precision.name != AUTO or config.plan.device is None:
        return str(config.precision.name)
    known = DEVICES[config.plan.device].figures
    return next(name for name in ("bf16", "fp16", "fp32") if name in known)


def make_machine(config: Config, plan: Plan, network: nn.Module) -> Machine | None:
    """Return the machine that ``plan.*`` describes for training `network`; None without a rate.

    Its rate is the mean over the run's image sizes. Raises `ConfigError` for a device without a cited figure in this
    precision.
    """
    settings = config.plan
    if settings.images_per_second is not None:
        first = _flops_per_image(network, TrainingSizes.from_config(config.data).at(0))
        found = Speed(settings.images_per_second * (first / mean_flops(config, plan, network)))
    elif settings.device is not None:
        found = _scaled_speed(config, plan, network)
    else:
        return None
    # As in training: a CPU's cores are busy computing, so the training process reads the images.
    reads = config.data.workers == 0 or (config.data.workers == AUTO and settings.device == CPU)
    machine = Machine(
        found,
        None if settings.decode_rate is None else settings.decode_rate * (1 if reads else settings.cores),
        settings.latency_us / 1e6,
        settings.bandwidth_gb * 1e9,
        0.0 if settings.device == CPU else settings.overlap,
        settings.all_reduce,
        settings.update_ms / 1e3,
        reads,
    )
    link = DEVICES[settings.device].link if settings.device else 0.0
    if not link:
        return machine
    node = _NODE if config.launch.nproc == AUTO else int(config.launch.nproc)
    return dataclasses.replace(machine, node=node, link=link)


def _scaled_speed(config: Config, plan: Plan, network: nn.Module) -> Speed:
    """Return the speed of ``plan.device``, scaled from ResNet-50 at 224 pixels to `network`."""
    name, precision = str(config.plan.device), planned_precision(config)
    if precision not in DEVICES[name].figures:
        raise ConfigError(
            f"plan.device={name}: there is no cited figure for precision={precision}; set plan.images_per_second."
        )
    cited = speed(DEVICES[name], precision)
    tensors = sum(1 for _ in network.parameters()) / TENSORS
    return Speed(
        cited.rate * FLOPS_PER_IMAGE / mean_flops(config, plan, network),
        tensors * cited.floor,
        (tensors * cited.launch[0], tensors * cited.launch[1]),
        tensors * cited.launch_update,
    )


def mean_flops(config: Config, plan: Plan, network: nn.Module) -> float:
    """Return the operations per training image, averaged over the run's updates."""
    sizes, each = TrainingSizes.from_config(config.data), plan.updates_per_epoch
    total = sum(
        min(each, plan.stop - epoch * each) * _flops_per_image(network, sizes.at(epoch))
        for epoch in range(math.ceil(plan.stop / each))
    )
    return total / plan.stop


@functools.cache
def _flops_per_image(network: nn.Module, image_size: int) -> int:
    return flops_per_image(network, image_size)
