"""Measure the limits of a rank's machine, its device, and the network between the ranks.

judge.py judges the results.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import platform
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lars_train.config import AUTO, Config, run_hash
from lars_train.data.decode import native
from lars_train.data.loading.loader import Batch
from lars_train.data.transforms import TrainingSizes
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.networks import make_network
from lars_train.preflight.findings import Clock, Device, Exchange, Host, Step
from lars_train.run_plan import Plan
from lars_train.training.assemble import build_trainer
from lars_train.training.device import PRECISIONS, available_cores, choose_precision, free_memory
from lars_train.training.device_prefetch import RankContext
from lars_train.training.distributed import Group
from lars_train.training.metrics import peak_flops
from lars_train.training.resolve import Resolved, check_compiler
from lars_train.training.run_directory import git_state, versions
from lars_train.training.trainer import Trainer

_SHARED_MEMORY = Path("/dev/shm")
# So small that no number of updates changes the initial weights.
_LR = 1e-9
# Updates before timing starts, in which cuDNN chooses its kernels and torch.compile compiles.
_WARM_UP = {"cpu": 1, "cuda": 5}
# Images of a CPU's first update: batch norm needs two.
_FIRST_SAMPLES = 2

_CLOCK_READINGS = 9
_LATENCY_ROUNDS = 20
# Bytes of the first all-reduce: enough to measure the bandwidth, and quick on any network.
_PROBE_BYTES = 1 << 20
# The fewest all-reduces of the measured size: two to warm up, one that sets how many are timed, and two timed ones.
_MIN_ROUNDS = 5


def inspect_host() -> Host:
    """Return the limits and memory of this process's machine."""
    soft, hard = (
        2**31 if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    try:
        shared: int | None = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        shared = None
    return Host(platform.node(), available_cores(), free_memory(), soft, hard, shared)


def inspect_device(device: torch.device, threads: int) -> Device:
    """Return this rank's device with its speed in each precision. Call it before anything is allocated on the device.

    Takes a fraction of a second. Sets torch's threads to `threads`.
    """
    torch.set_num_threads(threads)
    if device.type == "cpu":
        return Device("cpu", _cpu_name(), memory=free_memory(), precisions=_measure_precisions(device, threads))
    torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    major, minor = torch.cuda.get_device_capability(device)
    return Device(
        "cuda",
        f"{properties.name}, compute capability {major}.{minor}",
        str(getattr(properties, "uuid", "")),
        total,
        total - free,
        _measure_precisions(device, threads),
    )


def _measure_precisions(device: torch.device, threads: int) -> dict[str, float]:
    speeds = {}
    # A CPU may support bfloat16 in software only, which is too slow to be useful.
    names = PRECISIONS if device.type == "cuda" else {"fp32", "fp64", "fp16", choose_precision(AUTO, device).name}
    for name in (name for name in PRECISIONS if name in names):
        try:
            speeds[name] = peak_flops(choose_precision(name, device), device, threads)
        except (ConfigError, RuntimeError):  # RuntimeError: a library without a matrix product of this type
            continue
    return speeds


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def collect_versions(config: Config, device: torch.device) -> dict[str, str]:
    """Return the values that must be equal on all ranks: versions, commit, C decoder, and the config's hash."""
    git = git_state(Path(__file__).resolve().parent)
    found = {
        **versions(),
        "the commit": "unknown (no checkout)" if git is None else git["commit"][:12] + (" + changes" * git["dirty"]),
        "the decoder in C": "built" if native.is_available() else "missing",
        "config": run_hash(config),
    }
    if device.type == "cuda":
        found |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}  # type: ignore[no-untyped-call]
        found["cuDNN"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return found


def measure_step(
    config: Config, plan: Plan, resolved: Resolved, classes: int, device: torch.device, seconds: float, limit: float
) -> Step:
    """Measure training on this rank alone for about `seconds`: forward, backward, optimizer.

    The images have the size of the first epoch. On a GPU, an update has one micro-batch. On a CPU, the first update has
    two images. Larger updates follow, up to a micro-batch, while the total time stays within `limit` seconds. If the
    CPU is too slow for larger updates, the first update is the measurement.
    """
    end = time.perf_counter() + limit
    torch.manual_seed(config.seed)
    if config.compile:
        check_compiler(device)
    precision = choose_precision(resolved.precision, device)
    context = RankContext.from_config(config, device, Group(Ranks()), precision)
    network = context.place(make_network(config, classes)).train()
    sizes = _update_sizes(plan.ghost_batch, resolved.micro_batch) if device.type == "cpu" else [resolved.micro_batch]
    trainer = build_trainer(config, plan, network, lambda update: _LR, context)
    samples, rate = 0, math.inf
    while sizes:
        samples = sizes[0] if samples == 0 else sizes[-1]
        batches = _random_batches(samples, TrainingSizes.from_config(config.data).at(0), classes, device)
        trainer.plan = dataclasses.replace(plan, global_batch=samples)
        warm_up = samples > sizes[0] or len(sizes) == 1
        rate = _images_per_s(trainer, batches, samples, seconds, end, warm_up=warm_up)
        # One update to warm up, and one that counts.
        max_samples = rate * (end - time.perf_counter()) / 2
        sizes = [size for size in sizes if samples < size <= max_samples]
    loss = float(trainer.meter.sums[0])
    width = 2 if config.gradient_compression == "bf16" else precision.weights.itemsize
    gradients = sum(p.numel() for p in network.parameters() if p.requires_grad) * width
    checkpoint = sum(tensor.nbytes for tensor in _tensors(trainer.state()))
    return Step(samples, rate, precision.name, math.isfinite(loss), checkpoint, gradients)


def _update_sizes(ghost_batch: int, micro_batch: int) -> list[int]:
    """Return the images per update to try, in rising order: powers of two, a ghost batch, and a micro-batch."""
    parts = itertools.takewhile(lambda size: size < ghost_batch, (_FIRST_SAMPLES << k for k in itertools.count()))
    return sorted({*parts, ghost_batch, micro_batch})


def _random_batches(samples: int, size: int, classes: int, device: torch.device) -> Iterator[Batch]:
    images = torch.randint(256, (samples, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.randint(classes, (samples,))
    return itertools.repeat(Batch(images.to(device), labels.to(device), ()))


def _images_per_s(
    trainer: Trainer, batches: Iterator[Batch], samples: int, seconds: float, end: float, *, warm_up: bool
) -> float:
    """Measure for `seconds` or until `end`. Without `warm_up`, time only the first update."""
    device = trainer.device
    for _ in range(_WARM_UP.get(device.type, _WARM_UP["cuda"]) if warm_up else 0):
        trainer.run_update(batches, 1, measure=False)
    _synchronize(device)
    started, updates = time.perf_counter(), 0
    while updates == 0 or (warm_up and time.perf_counter() < min(started + seconds, end)):
        trainer.run_update(batches, 1, measure=False)
        # The host runs ahead of a GPU: read the clock when the GPU has finished.
        _synchronize(device)
        updates += 1
    return updates * samples / (time.perf_counter() - started)


def _synchronize(device: torch.device) -> None:
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


def measure_exchange(group: Group, device: torch.device, count: int, seconds: float, limit: float) -> Exchange | None:
    """Time all-reduces of `count` bytes for about `seconds`. Return None for a single rank. Collective.

    If that would take longer than `limit` seconds, send fewer bytes and scale the time up in proportion.
    """
    if group.ranks.world == 1:
        return None
    values = torch.zeros(max(1, count // 4), device=device)
    one, probe = torch.zeros(1, device=device), values[: _PROBE_BYTES // 4]
    _time_all_reduces(group, probe, 2)
    per_byte = _time_all_reduces(group, probe, 1) / probe.nbytes
    # Rank 0 decides, because all ranks must send the same bytes equally often.
    affordable = int(limit / _MIN_ROUNDS / max(per_byte, 1e-12))
    sent = values[: group.broadcast_from_rank0(max(probe.nbytes, affordable)) // 4]
    _time_all_reduces(group, sent, 2)
    once = max(_time_all_reduces(group, sent, 1), 1e-6)
    rounds = group.broadcast_from_rank0(max(2, min(200, int(min(seconds, limit) / once))))
    each = _time_all_reduces(group, sent, rounds) / rounds
    _time_all_reduces(group, one, 2)
    latency = _time_all_reduces(group, one, _LATENCY_ROUNDS) / _LATENCY_ROUNDS
    return Exchange(values.nbytes, each * values.nbytes / sent.nbytes, latency, sent.nbytes)


def _time_all_reduces(group: Group, values: torch.Tensor, rounds: int) -> float:
    group.all_reduce_max([0])
    started = time.perf_counter()
    for _ in range(rounds):
        group.all_reduce_sum(values)
    _synchronize(values.device)
    return time.perf_counter() - started


def measure_clocks(group: Group) -> tuple[Clock, ...]:
    """Return the offset of each rank's clock from rank 0's: the median of readings taken at the same time. Collective.

    The ranks synchronize before each reading. The time that this takes is an upper bound on the distance between the
    readings, and becomes the `error`.
    """
    readings: list[list[tuple[float, float]]] = []
    for _ in range(_CLOCK_READINGS):
        group.all_reduce_max([0])
        started = time.perf_counter()
        group.all_reduce_max([0])
        now = time.time()
        readings.append(group.all_gather((now, time.perf_counter() - started)))
    return clock_offsets(readings)


def clock_offsets(readings: list[list[tuple[float, float]]]) -> tuple[Clock, ...]:
    """Return the offset of each rank's clock. `readings`: by reading and rank, (time, seconds to synchronize)."""
    clocks = []
    for rank in range(len(readings[0])):
        ahead = median(reading[rank][0] - reading[0][0] for reading in readings)
        clocks.append(Clock(ahead, median(max(reading[rank][1], reading[0][1]) for reading in readings)))
    return tuple(clocks)
