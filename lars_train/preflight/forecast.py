"""Forecast a run for ``mode=plan``: memory per device, bytes on disk, and hours, as values and as lines to print.

The network is not trained: only its tensors and operations are counted. No accelerator is used, and no speed is
measured: rates come from the config (``plan.*``) or from the figures that devices.py cites.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lars_train.config import AUTO, Config, with_row
from lars_train.config.network import BUILTIN
from lars_train.data.transforms import TrainingSizes
from lars_train.errors import ConfigError
from lars_train.given import NOTHING, Given
from lars_train.messages import counted, format_duration, size
from lars_train.models.factory import build_model, is_torchvision_model
from lars_train.networks import make_network
from lars_train.optim import fused_sgd
from lars_train.optim.lars import LARS
from lars_train.preflight.devices import CPU, DEVICES
from lars_train.preflight.disk_volume import volume
from lars_train.preflight.hours import Hours, make_machine, planned_micro_batch, planned_precision
from lars_train.preflight.time_model import Machine
from lars_train.run_plan import Plan, accumulation, check_micro_batch, make_plan
from lars_train.training.assemble import build_optimizer
from lars_train.training.device import MOST_SAMPLES, cuda_devices, device_to_count_on, kept_tensors

# Upper bound on the memory of a process that trains on a CPU. Python, torch and the libraries take a constant.
# Multiples of weights, activations and the largest activation cover what the allocator does not count: workspaces,
# gradients of activations, retained memory, checkpoints. Fitted to measured runs, a few percent above each
# (docs/benchmarks.md).
_PROCESS_BYTES = 640 << 20
_WEIGHTS_FACTOR, _ACTIVATIONS_FACTOR, _LARGEST_FACTOR = 2.0, 1.7, 4.5


def forecast(
    config: Config, plan: Plan, *, classes: tuple[str, ...], world: int, val_count: int, given: Given = NOTHING
) -> dict[str, Any]:
    """Return memory, disk and hours as plain values. Without a rate (``plan.*``), give hours for each cited device.

    Sizes are in bytes, times in seconds unless a key says hours. Raises `ConfigError` for a device without a cited
    figure in this precision.
    """
    network = _network(config, len(classes), plan.ghost_batch, given)
    width = {"fp64": 8}.get(planned_precision(config), 4)
    weights = width * sum(p.numel() for p in network.parameters())
    trained = width * sum(p.numel() for p in network.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in network.buffers())
    slots, copies = _optimizer_memory(config)
    held = weights + trained + buffers + slots * trained + (0 if config.model.ema is None else weights + buffers)
    several = world > 1 or accumulation(plan, world, planned_micro_batch(config, plan) // plan.ghost_batch) > 1
    disk = functools.partial(volume, network=network, classes=classes, slots=slots, several=several)
    found: dict[str, Any] = {
        "precision": planned_precision(config),
        "weight_bytes": weights,
        "gradient_bytes": trained,
        "optimizer_bytes": slots * trained,
        "step_bytes": copies * trained,
        "memory_per_device": list(_memory(config, plan, network, world, fixed=held, step=copies * trained)),
        "disk": disk(config, plan),
    }
    machine = make_machine(config, plan, network)
    hours = functools.partial(
        Hours,
        network=network,
        gradient_bytes=trained // 2 if config.gradient_compression == "bf16" else trained,
        buckets=math.ceil(trained / (config.distributed.bucket_mb * (1 << 20))),
        val_count=val_count,
    )
    found["rows"] = list(_rows(config, plan, disk, hours=hours, network=network, world=world))
    if machine is None:
        found["by_device"] = list(_cited_devices(config, plan, network, hours=hours, world=world))
        return found
    found["rate"] = _describe_machine(config, machine)
    expected = hours(config, plan, machine)
    found["scaling"] = list(expected.scaling(world))
    found["expected"] = expected.at(world)
    return found


def _describe_machine(config: Config, machine: Machine) -> dict[str, Any]:
    """Return the values from which the hours are computed, by name."""
    source = "plan.images_per_second"
    if config.plan.images_per_second is None:
        source = DEVICES[str(config.plan.device)].figures[planned_precision(config)].source
    return {
        "images_per_second": machine.speed.rate,
        "floor": machine.speed.floor,
        "launch": [*machine.speed.launch, machine.speed.launch_update],
        "source": source,
        "input_images_per_second": machine.input_rate,
        "latency": machine.latency,
        "bandwidth": machine.bandwidth,
        "devices_per_node": machine.node,
        "link": machine.link if machine.node > 1 else machine.bandwidth,
        "all_reduce": machine.algorithm,
        "overlap": machine.overlap,
        "overhead": machine.overhead,
        "reads": machine.reads,
    }


def _cited_devices(
    config: Config, plan: Plan, network: nn.Module, *, hours: Callable[..., Hours], world: int
) -> Iterator[dict[str, Any]]:
    """Yield the hours of a run on `world` devices, for each cited device with a figure in the run's precision."""
    for name, device in DEVICES.items():
        planned = dataclasses.replace(config, plan=dataclasses.replace(config.plan, device=name))
        if planned_precision(planned) in device.figures:
            yield {"device": name, **hours(planned, plan, make_machine(planned, plan, network)).at(world)}


def _rows(
    config: Config,
    plan: Plan,
    disk: Callable[[Config, Plan], dict[str, Any]],
    *,
    hours: Callable[..., Hours],
    network: nn.Module,
    world: int,
) -> Iterator[dict[str, Any]]:
    """Yield the forecast of each row of the recipe on `world` devices, or on one per ghost batch if that is fewer."""
    for name in config.recipe.rows:
        try:
            row_config = with_row(config, name)
            row = make_plan(row_config, plan.samples)
        except ConfigError as error:
            yield {"row": name, "problem": str(error)}
            continue
        devices = min(world, row.ghosts)
        entry = {
            "row": name,
            "global_batch": row.global_batch,
            "updates": row.stop,
            "most_devices": row.ghosts,
            "disk_bytes": disk(row_config, row)["bytes"],
        }
        machine = make_machine(row_config, row, network)
        if machine is not None:
            run = hours(row_config, row, machine)
            entry |= {"expected": run.at(devices), "scaling": list(run.scaling(devices))}
        yield entry


def _optimizer_memory(config: Config) -> tuple[int, int]:
    """Return the optimizer's state, and LARS's copy of the weights during a step, in multiples of the weights.

    The state is measured by one step on a small layer.
    """
    layer = nn.Linear(8, 8, bias=False)
    optimizer = build_optimizer(config.optimizer, layer)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    held = {id(v): v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)}
    slots = sum(v.numel() for v in held.values()) // layer.weight.numel()
    if not isinstance(optimizer, LARS):
        return slots, 0
    # On the CPU, the fast path over SGD needs no copy, because it computes a tensor's whole update at once.
    is_fused = _on_a_cpu(config) and fused_sgd.applies_to(optimizer.base_optimizer, optimizer.rule)
    return slots, int(optimizer.rule.changes_step and not is_fused)


def _memory(
    config: Config, plan: Plan, network: nn.Module, world: int, *, fixed: int, step: int
) -> Iterator[dict[str, int]]:
    """Yield the memory of a device for each micro-batch: a `fixed` part, and activations kept for the backward pass.

    The optimizer's step, which needs `step` more bytes, begins when the activations are free again. On a CPU, add an
    upper bound on the bytes of the whole process.
    """
    # Activations take about half under autocast (training/device.py), and twice as much in float64.
    share = {"fp64": 2.0, "bf16": 0.5, "fp16": 0.5}.get(planned_precision(config), 1.0)
    kept = _kept_tensors(network, plan.ghost_batch, TrainingSizes.from_config(config.data).largest)
    per_ghost, largest = share * sum(kept), share * max(kept)
    most = max(1, min(MOST_SAMPLES // plan.ghost_batch, plan.ghosts))
    sizes = {2**k for k in range(most.bit_length())}
    if config.micro_batch != AUTO:
        sizes.add(min(check_micro_batch(plan, int(config.micro_batch)), plan.ghosts))
    for ghosts in sorted(sizes):
        activations = round(per_ghost * ghosts)
        entry = {
            "micro_batch": ghosts * plan.ghost_batch,
            "activation_bytes": activations,
            "bytes": fixed + max(activations, step),
            "accumulation": accumulation(plan, world, ghosts),
        }
        if _on_a_cpu(config):
            entry["process_bytes"] = round(
                _PROCESS_BYTES
                + _WEIGHTS_FACTOR * fixed
                + _ACTIVATIONS_FACTOR * activations
                + _LARGEST_FACTOR * largest * ghosts
                + step
            )
        yield entry


def _on_a_cpu(config: Config) -> bool:
    """Return True if the planned devices are CPUs; without ``plan.device``, if a run here would use the CPU."""
    if config.plan.device is not None:
        return bool(config.plan.device == CPU)
    return config.device == CPU or (config.device == AUTO and cuda_devices(config) == 0)


def _network(config: Config, classes: int, ghost_batch: int, given: Given) -> nn.Module:
    model = config.model
    if model.source == BUILTIN and given.network is None and not model.freeze:
        return _builtin_network(model.name, classes, ghost_batch, bool(model.blurpool))
    # The plan may have other ghost batches than the config, and needs no weights.
    model = dataclasses.replace(model, ghost_batch=ghost_batch, weights=None)
    return make_network(dataclasses.replace(config, model=model), classes, given)


@functools.cache
def _builtin_network(name: str, classes: int, ghost_batch: int, blurpool: bool) -> nn.Module:
    if is_torchvision_model(name):
        import torchvision  # noqa: F401 - before a device is chosen, see device_to_count_on
    with torch.device(device_to_count_on()):
        return build_model(name, num_classes=classes, ghost_batch=ghost_batch, zero_gamma=False, blurpool=blurpool)


@functools.cache
def _kept_tensors(network: nn.Module, ghost_batch: int, image_size: int) -> list[int]:
    return kept_tensors(network, ghost_batch, image_size)


def describe_forecast(found: dict[str, Any]) -> Iterator[str]:
    """Yield lines that describe the result of `forecast`."""
    disk = found["disk"]
    least, most = disk["checkpoints_kept_bytes"]
    log = sum(disk["log_bytes"].values())
    yield (
        f"disk           {size(disk['checkpoint_bytes'])} per checkpoint: {size(disk['checkpoints_written_bytes'])} "
        f"written in total, {size(most)} at the end ({size(least)} if the best is among the last)"
    )
    files = ", ".join(f"{name} {size(count)}" for name, count in disk["log_bytes"].items())
    yield f"               {size(sum(disk['log_line_bytes'].values()))} per log line: {size(log)} in total ({files})"
    precision = found["precision"]
    yield f"precision      {'chosen on the device; memory computed for fp32' if precision == 'auto' else precision}"
    yield from _memory_table(found["memory_per_device"])
    expected = found.get("expected")
    if expected is None:
        yield from _device_table(found["by_device"])
    else:
        rate = found["rate"]
        yield f"rate           {rate['images_per_second']:,.4g} images/s per device (from {rate['source']})"
        if rate["floor"]:
            few, many, floor = (f"{1e3 * seconds:.3g}" for seconds in (*rate["launch"][:2], rate["floor"]))
            yield f"               plus {floor} ms per micro-batch; the host takes {few} to {many} ms to launch one"
        yield (
            f"update         {expected['seconds']:.3g} s: compute {expected['compute']:.3g}, "
            f"input {expected['input']:.3g}, "
            f"network {expected['network']:.3g} exposed of {expected['reduction']:.3g}; "
            f"limited by {expected['limit']}"
        )
        share = 100 * expected["efficiency"]
        yield f"time           {_time(expected['hours'])}, at {share:.0f} % scaling efficiency"
    yield from _rows_table(found["rows"])


def _memory_table(entries: list[dict[str, Any]]) -> Iterator[str]:
    on_a_cpu = "process_bytes" in entries[0]
    yield f"memory         micro-batch  accumulation  per device{'  per process' if on_a_cpu else ''}"
    for entry in entries:
        process = f"{size(entry['process_bytes']):>13}" if on_a_cpu else ""
        yield f"{'':<15}{entry['micro_batch']:>11,}{entry['accumulation']:>14,}{size(entry['bytes']):>12}{process}"
    if on_a_cpu:
        yield "               per device: what torch's allocator holds"
        yield "               per process: the most that a rank needs on a CPU, with Python,"
        yield "               libraries and workspaces; request this from Slurm per rank"


def _device_table(entries: list[dict[str, Any]]) -> Iterator[str]:
    if not entries:
        yield "time           unknown: no device has a published speed in this precision; set plan.images_per_second"
        return
    yield f"time           on {counted(entries[0]['devices'], 'device')}; set plan.device for efficiency and limits"
    for entry in entries:
        name = f"{entry['device']}, one core" if entry["device"] == CPU else entry["device"]
        yield f"               {name:<13}{_time(entry['hours']):>13}  limited by {entry['limit']}"


def _rows_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    timed = any("expected" in row for row in rows)
    yield f"rows           batch{'     devices         time  limited by' if timed else ''}       disk"
    hours = 0.0
    for row in rows:
        if "problem" in row:
            yield f"               {row['row']:<6}  cannot run on this data set: {row['problem']}"
            continue
        expected, disk = row.get("expected"), size(row["disk_bytes"])
        if expected is None:
            yield f"               {row['row']:<6}{disk:>10}"
            continue
        hours += expected["hours"]
        most = "*" if expected["devices"] == row["most_devices"] else " "
        yield (
            f"               {row['row']:<6}{expected['devices']:>11,}{most}{_time(expected['hours']):>12}  "
            f"{expected['limit']:<10}{disk:>11}"
        )
    if hours:
        disk = size(sum(row.get("disk_bytes", 0) for row in rows))
        yield f"               {'all':<6}{'':>11}{_time(hours):>13}  {'':<10}{disk:>11}"
    if any(row["expected"]["devices"] == row["most_devices"] for row in rows if row.get("expected")):
        yield "               * one device per ghost batch: more devices cannot be used"


def _time(hours: float) -> str:
    return format_duration(3600 * hours)
