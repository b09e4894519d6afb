"""How many ghost batches a device works on at once, from the memory that it has free.

The curve does not depend on the answer; the speed and the peak memory do.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lars_train.errors import ConfigError
from lars_train.training.device import Precision

# More samples than this at once gain no speed on any device measured so far, and cost memory.
MOST_SAMPLES = 256
# The share of the free memory that activations may take: gradients, the optimizer's state, the loader's
# buffers and the allocator's slack need the rest.
SHARE_OF_FREE_MEMORY = 0.4
# The share of a GPU's memory that stays free when a micro-batch is tried: for NCCL, cuDNN's workspaces and fragments.
SHARE_LEFT_FREE = 0.08


def ghosts_by_trying(attempt: Callable[[int], None], *, ghost_batch: int, ghosts: int) -> int:
    """Ghost batches per micro-batch: the most for which `attempt`, of so many, does not run out of memory.

    `ghosts`: the most that a rank has to do in an update. Raises `ConfigError` if not even one fits.
    """
    fits, too_many = 0, max(1, min(MOST_SAMPLES // ghost_batch, ghosts)) + 1
    candidate = too_many - 1
    while fits < candidate < too_many:
        try:
            attempt(candidate)
        except torch.OutOfMemoryError:
            too_many = candidate
        else:
            fits = candidate
        candidate = (fits + too_many) // 2
    if fits == 0:
        raise ConfigError(
            f"one ghost batch of {ghost_batch} images does not fit into the device's memory: choose a smaller "
            "model.ghost_batch or data.image_size."
        )
    return fits


def try_micro_batch(
    model: nn.Module,
    samples: int,
    image_size: int,
    precision: Precision,
    device: torch.device,
    layout: torch.memory_format = torch.channels_last,
) -> None:
    """A forward and backward pass of `samples` images on `device`, with all else there that training keeps there.

    The model itself stays as it is. Raises `torch.OutOfMemoryError`.
    """
    try:
        shadow = copy.deepcopy(model).to(device=device, dtype=precision.weights).to(memory_format=layout)
        kept = [torch.empty_like(p) for p in shadow.parameters() for _ in range(2)]  # momentum, DDP's buckets
        if device.type == "cuda":
            spare = int(SHARE_LEFT_FREE * torch.cuda.get_device_properties(device).total_memory)
            kept.append(torch.empty(spare, dtype=torch.uint8, device=device))
        images = torch.zeros(samples, 3, image_size, image_size, dtype=precision.weights, device=device)
        with precision.autocast(device):
            logits = shadow.train()(images.contiguous(memory_format=layout))
        torch.autograd.backward(logits.to(precision.weights).sum())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    finally:
        shadow = kept = images = logits = None  # type: ignore[assignment]
        if device.type == "cuda":
            torch.cuda.empty_cache()


def ghosts_that_fit(
    model: nn.Module, *, ghost_batch: int, image_size: int, ghosts: int, free: int, local_world: int
) -> int:
    """Ghost batches per micro-batch: as many as fit in this rank's share of `free` bytes, at least one.

    `ghosts`: the most that a rank has to do in an update; `local_world`: ranks that share `free`.
    """
    per_ghost = activation_bytes(model, ghost_batch, image_size)
    budget = SHARE_OF_FREE_MEMORY * free / local_world
    fitting = int(budget // max(per_ghost, 1))
    return max(1, min(fitting, MOST_SAMPLES // ghost_batch, ghosts))


def activation_bytes(model: nn.Module, samples: int, image_size: int) -> int:
    """Bytes that the backward pass of `samples` float32 images keeps: those of a forward pass of two, times as many.

    Autocast keeps about half; the count is the safe side for every precision.
    """
    return sum(kept_tensors(model, samples, image_size))


def kept_tensors(model: nn.Module, samples: int, image_size: int) -> list[int]:
    """Of each tensor that `activation_bytes` counts, its bytes."""
    # Not on the meta device, where torch imports its compiler: that takes seconds, and this takes tenths of one.
    shadow, tried = copy.deepcopy(model).to("cpu").float().train(), min(samples, 2)
    # By where they lie: the last layer keeps its weight as another tensor, transposed.
    parameters = {p.data_ptr() for p in shadow.parameters()}
    seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    sizes: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and storage not in seen:
            seen.add(storage)
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = shadow(torch.zeros(tried, 3, image_size, image_size))
    del output
    return [size * samples // tried for size in sizes]


def free_memory() -> int:
    """Bytes free in host memory, within what the system and the control group leave."""
    return min(_system_available(), _control_group_available())


def _system_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30


def _control_group_available() -> int:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        details = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 1 << 62
    # Pages of files that were read count as used, and are given back when memory is wanted.
    used -= int(details.get("inactive_file", 0))
    return (1 << 62) if limit == "max" else max(0, int(limit) - used)
