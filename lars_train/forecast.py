"""What a planned run needs: memory per device, bytes on disk, hours; and the picture of it on 1 to 4,096 devices.

The network is made and counted on the CPU; no other device is touched and nothing is measured. Rates come from the
config (``plan.*``) or from cost.py's cited figures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lars_train.config import AUTO, Config
from lars_train.cost import CITED, Machine, Update, update_seconds
from lars_train.data.order import eval_run
from lars_train.errors import ConfigError
from lars_train.models.factory import build_model
from lars_train.optim.factory import build_optimizer
from lars_train.plan import Plan, check_micro_batch
from lars_train.training.micro_batch import MOST_SAMPLES, activation_bytes
from lars_train.training.utilisation import flops_per_image

MOST_DEVICES = 4096
_CITED_MODEL, _CITED_SIZE, _CITED_CLASSES = "resnet50", 224, 1000
# A forward pass is a third of forward and backward (training/utilisation.py).
_FORWARD = 3


def forecast(
    config: Config, plan: Plan, *, classes: int, world: int, val_count: int, evaluations: int
) -> dict[str, Any]:
    """Memory, disk and, where ``plan.device`` or ``plan.images_per_second`` tell a rate, hours, as plain values.

    Sizes are bytes, times seconds unless a key says hours. Raises `ConfigError` for a device without a cited figure
    in this precision.
    """
    network = _network(config.model.name, classes, plan.ghost_batch)
    width = {"fp64": 8}.get(config.precision.name, 4)
    weights = width * sum(p.numel() for p in network.parameters())
    buffers = sum(b.numel() * b.element_size() for b in network.buffers())
    state = weights * _slots(config)
    found: dict[str, Any] = {
        "weight_bytes": weights,
        "gradient_bytes": weights,
        "optimizer_bytes": state,
        "checkpoint_bytes": weights + buffers + state,
        "memory_per_device": list(_memory(config, plan, network, fixed=2 * weights + buffers + state)),
    }
    machine = _machine(config, network, plan.ghost_batch)
    if machine is None:
        return found
    width_sent = weights // 2 if config.gradient_compression == "bf16" else weights
    micro = _micro_batch(config, plan)

    def at(devices: int) -> tuple[Update, float]:
        samples = math.ceil(plan.ghosts / devices) * plan.ghost_batch
        last = samples - (math.ceil(samples / micro) - 1) * micro
        update = update_seconds(machine, devices, samples=samples, last=last, size=width_sent)
        start, stop = eval_run(val_count, 0, devices)
        forward = (stop - start) / min(_FORWARD * machine.rate, machine.input_rate or math.inf)
        return update, (plan.stop * update.seconds + evaluations * forward) / 3600

    most = min(MOST_DEVICES, plan.ghosts)
    counts = sorted({world, *(2**k for k in range(most.bit_length()))})
    alone = at(1)[0].seconds
    found["rate"] = {
        "images_per_second": machine.rate,
        "source": "plan.images_per_second" if config.plan.images_per_second else CITED[str(config.plan.device)].source,
        "input_images_per_second": machine.input_rate,
        "latency": machine.latency,
        "bandwidth": machine.bandwidth,
        "all_reduce": machine.algorithm,
        "overlap": machine.overlap,
    }
    found["scaling"] = []
    for devices in counts:
        update, hours = at(devices)
        entry = {"devices": devices, "hours": hours, "efficiency": alone / devices / update.seconds, **vars(update)}
        found["scaling"].append(entry)
        if devices == world:
            found["expected"] = entry
    return found


def _slots(config: Config) -> int:
    """How often the optimizer keeps the size of the weights: found by one step of it on a small layer."""
    layer = nn.Linear(8, 8, bias=False)
    optimizer = build_optimizer(config.optimizer, layer)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    held = {id(v): v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)}
    return sum(v.numel() for v in held.values()) // layer.weight.numel()


def _memory(config: Config, plan: Plan, network: nn.Module, fixed: int) -> Iterator[dict[str, int]]:
    """Bytes of a device at each micro-batch: what is always there, and what the backward pass needs kept."""
    # Under autocast about half (training/micro_batch.py); float64 is twice as wide.
    share = {"fp64": 2.0, "bf16": 0.5, "fp16": 0.5}.get(config.precision.name, 1.0)
    per_ghost = share * _activations(network, plan.ghost_batch, config.data.image_size)
    most = max(1, min(MOST_SAMPLES // plan.ghost_batch, plan.ghosts))
    sizes = {2**k for k in range(most.bit_length())}
    if config.micro_batch != AUTO:
        sizes.add(check_micro_batch(plan, int(config.micro_batch)))
    for ghosts in sorted(sizes):
        saved = round(per_ghost * ghosts)
        yield {"micro_batch": ghosts * plan.ghost_batch, "activation_bytes": saved, "bytes": fixed + saved}


def _micro_batch(config: Config, plan: Plan) -> int:
    if config.micro_batch != AUTO:
        return int(config.micro_batch)
    return max(1, MOST_SAMPLES // plan.ghost_batch) * plan.ghost_batch


def _machine(config: Config, network: nn.Module, ghost_batch: int) -> Machine | None:
    asked = config.plan
    rate = asked.images_per_second
    if rate is None:
        if asked.device is None:
            return None
        cited = CITED[asked.device].rates
        # auto takes bfloat16 on a GPU that has it, and the V100 has float16.
        precision = "bf16" if config.precision.name == AUTO else config.precision.name
        if precision not in cited:
            raise ConfigError(
                f"plan.device={asked.device}: there is no cited figure for precision={precision}; "
                "give plan.images_per_second."
            )
        known = _network(_CITED_MODEL, _CITED_CLASSES, ghost_batch)
        rate = cited[precision] * flops_per_image(known, _CITED_SIZE) / flops_per_image(network, config.data.image_size)
    decoded = None if asked.decode_rate is None else asked.cores * asked.decode_rate
    return Machine(rate, decoded, asked.latency_us / 1e6, asked.bandwidth_gb * 1e9, asked.overlap, asked.all_reduce)


@functools.cache
def _network(name: str, classes: int, ghost_batch: int) -> nn.Module:
    return build_model(name, num_classes=classes, ghost_batch=ghost_batch, zero_gamma=False)


@functools.cache
def _activations(network: nn.Module, ghost_batch: int, image_size: int) -> int:
    return activation_bytes(network, ghost_batch, image_size)


def told(found: dict[str, Any]) -> Iterator[str]:
    """What `forecast` found, in words."""
    yield f"checkpoint     {found['checkpoint_bytes'] / 1e6:,.1f} MB each"
    for entry in found["memory_per_device"]:
        yield f"memory         micro-batch {entry['micro_batch']:>4}: {entry['bytes'] / 1e9:.2f} GB per device"
    expected = found.get("expected")
    if expected is None:
        yield "hours          not known: name plan.device, or give plan.images_per_second"
        return
    yield f"rate           {found['rate']['images_per_second']:,.1f} images/s per device ({found['rate']['source']})"
    yield (
        f"update         {expected['seconds']:.4g} s: compute {expected['compute']:.4g}, "
        f"input {expected['input']:.4g}, "
        f"network {expected['network']:.4g} (of {expected['reduction']:.4g}); limited by {expected['limit']}"
    )
    yield f"hours          {expected['hours']:.3g}, at {100 * expected['efficiency']:.0f} % of one device's efficiency"


def draw(found: dict[str, Any], rates: list[dict[str, Any]], path: Path) -> None:
    """Hours and efficiency against devices, each point marked by what limits it, and the learning rate, as a PNG.

    `rates`: rehearsal's ``lr_per_epoch``. Raises `OSError`.
    """
    from matplotlib.figure import Figure

    from lars_train.cost import COMPUTE, INPUT, NETWORK
    from lars_train.report.curves import COLOURS

    points = found["scaling"]
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right, schedule = figure.subplots(1, 3)
    for axes, key, factor, label in (
        (left, "hours", 1, "hours of the run"),
        (right, "efficiency", 100, "efficiency against one device, %"),
    ):
        axes.plot([p["devices"] for p in points], [factor * p[key] for p in points], color="#8A8A8A", zorder=1)
        for colour, marker, limit in zip(COLOURS, "os^", (COMPUTE, NETWORK, INPUT), strict=False):
            some = [p for p in points if p["limit"] == limit]
            if some:
                axes.scatter(
                    [p["devices"] for p in some],
                    [factor * p[key] for p in some],
                    color=colour,
                    marker=marker,
                    zorder=2,
                    label=f"limited by {limit}",
                )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("devices")
        axes.set_ylabel(label)
    ends = [(entry[f"{end}_update"], entry[f"lr_{end}"]) for entry in rates for end in ("first", "last")]
    schedule.plot(*zip(*ends, strict=True), color=COLOURS[0])
    schedule.set_xlabel("update")
    schedule.set_ylabel("learning rate")
    left.set_yscale("log")
    right.set_ylim(bottom=0)
    left.legend()
    figure.savefig(path, format="png", dpi=120)
