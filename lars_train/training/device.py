"""Choose a rank's device, precision, threads and memory layout, and the micro-batch that fits into memory."""

from __future__ import annotations

import copy
import ctypes
import os
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lars_train.config import AUTO, Config
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.messages import counted


@dataclass(frozen=True)
class Precision:
    """The dtypes of the precision `name` (fp32, fp64, bf16 or fp16): of the weights, and of matrix products."""

    name: str
    weights: torch.dtype
    compute: torch.dtype

    @property
    def scales_loss(self) -> bool:
        """True for float16, whose gradients underflow without loss scaling."""
        return self.compute == torch.float16

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context for forward passes."""
        return torch.autocast(device.type, dtype=self.compute, enabled=self.compute != self.weights)


_PRECISIONS = {
    "fp32": Precision("fp32", torch.float32, torch.float32),
    "fp64": Precision("fp64", torch.float64, torch.float64),
    "bf16": Precision("bf16", torch.float32, torch.bfloat16),
    "fp16": Precision("fp16", torch.float32, torch.float16),
}

PRECISIONS = tuple(_PRECISIONS)
"""The names of all precisions."""


def cuda_devices(config: Config) -> int:
    """Return the number of CUDA devices that a run of this config may use; 0 for a run on the CPU.

    Raises `ConfigError` for ``device=cuda`` without a CUDA device.
    """
    if config.device == "cpu":
        return 0
    count = torch.cuda.device_count()
    if config.device == "cuda" and count == 0:
        raise ConfigError("device=cuda: torch finds no CUDA device; use device=cpu or device=auto.")
    return count


def check_graphs(config: Config) -> None:
    """Raise `ConfigError` for ``cuda_graphs=true`` on a machine without a CUDA device."""
    if config.cuda_graphs and cuda_devices(config) == 0:
        raise ConfigError("cuda_graphs=true: it needs a GPU, but torch finds none here; omit it.")


def choose_device(config: Config, ranks: Ranks) -> torch.device:
    """Return the device of this rank. Raises `ConfigError` if the machine has fewer devices than ranks."""
    count = cuda_devices(config)
    if count == 0:
        return torch.device("cpu")
    if count == 1 and "SLURM_LOCALID" in os.environ:
        # Slurm may make only one device visible to each task (--gpus-per-task). If tasks share a device, NCCL raises.
        return torch.device("cuda", 0)
    if ranks.local_rank >= count:
        raise ConfigError(
            f"local rank {ranks.local_rank} has no device: this machine has {counted(count, 'CUDA device')}; "
            "start fewer processes (--nproc-per-node), or use device=cpu."
        )
    return torch.device("cuda", ranks.local_rank)


def choose_precision(name: str, device: torch.device) -> Precision:
    """Return the precision `name`; for ``auto``, the fastest precision that is safe on the device.

    Raises `ConfigError` for a precision that the hardware does not support.
    """
    if name == AUTO:
        return _PRECISIONS[_fastest(device)]
    if name == "bf16" and device.type == "cuda" and not _cuda_has_bf16(device):
        raise ConfigError(
            f"precision=bf16: {torch.cuda.get_device_name(device)} has no bfloat16 arithmetic "
            "(compute capability 8.0 is needed); use precision=fp16 or fp32."
        )
    if name == "fp16" and device.type == "cpu" and not _cpu_has("avx512_fp16", "amx_fp16", "fp16"):
        raise ConfigError("precision=fp16: this CPU has no float16 arithmetic; use precision=bf16 or fp32.")
    return _PRECISIONS[name]


def choose_layout(config: Config) -> torch.memory_format:
    """Return the memory format of images and weights; for ``auto``, channels_last, the fastest for convolutions."""
    return torch.contiguous_format if config.channels_last is False else torch.channels_last


def set_up(config: Config, device: torch.device, threads: int) -> None:
    """Set up the process: CPU threads, CPU memory, current device, determinism and seed."""
    torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Call torch only to change the setting, because this call imports torch's compiler.
    if config.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(config.deterministic)


def choose_threads(config: Config, ranks: Ranks) -> int:
    """Return the number of CPU threads: from the config, OMP_NUM_THREADS, or this process's share of the cores."""
    if config.launch.threads != AUTO:
        return int(config.launch.threads)
    # Ignore the variable under torchrun, which sets it to 1 regardless of the cores.
    number = os.environ.get("OMP_NUM_THREADS", "")
    if number.isdecimal() and int(number) > 0 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return int(number)
    return max(1, available_cores() // ranks.local_world)


def choose_workers(config: Config, device: torch.device, ranks: Ranks) -> int:
    """Return the number of loader workers of this rank; 0 on the CPU, where training already uses all cores."""
    if config.data.workers != AUTO:
        return int(config.data.workers)
    if device.type == "cpu":
        return 0
    return max(1, min(16, available_cores() // ranks.local_world - 1))


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fastest(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if _cuda_has_bf16(device) else "fp16"
    return "bf16" if _cpu_has("avx512_bf16", "amx_bf16", "bf16") else "fp32"


def _cuda_has_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _cpu_has(*flags: str) -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
    else:  # torch before 2.11 detects these flags of x86, and none of ARM
        capabilities = {
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "amx_bf16": torch.cpu._is_amx_tile_supported(),
            "amx_fp16": torch.cpu._is_amx_fp16_supported(),
        }
    return any(capabilities.get(flag, False) for flag in flags)


# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_GROW_BY = 64 << 20


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory for the next tensor. Return True on success.

    By default, glibc maps each block of more than 32 MiB, unmaps the block when it is freed, and returns the top of the
    heap to the system. The activations of each pass are then in new pages, which the kernel must clear and map one by
    one (https://man7.org/linux/man-pages/man3/mallopt.3.html). This function does nothing if the environment has
    settings for malloc, or with other C libraries.
    """
    set_by_user = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if set_by_user or not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    options = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: _GROW_BY}
    return all(mallopt(parameter, value) == 1 for parameter, value in options.items())


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):
        return False


# Larger micro-batches were no faster on any device measured so far, and need more memory.
MOST_SAMPLES = 256
# The share of free memory for activations. The rest is for gradients, the optimizer's state, the loader's buffers and
# the allocator's overhead.
SHARE_OF_FREE_MEMORY = 0.4
# The share of a GPU's memory that a trial leaves free, for NCCL, cuDNN's workspaces and fragmentation.
SHARE_LEFT_FREE = 0.08


def find_largest_ghosts(attempt: Callable[[int], None], *, ghost_batch: int, ghosts: int) -> int:
    """Return the largest number of ghost batches per micro-batch for which `attempt` does not run out of memory.

    `ghosts`: the maximum number of ghost batches of a rank in an update. Raises `ConfigError` if not even one fits.
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
            f"one ghost batch of {ghost_batch} images does not fit into the device's memory; choose a smaller "
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
    copies: int = 2,
    passes: int = 1,
) -> None:
    """Run a forward and backward pass of `samples` images, with as much device memory in use as during training.

    `copies`: the memory that training needs besides weights and gradients (for momentum, DDP's buckets, an average), in
    copies of the weights. `passes`: the forward passes whose activations are in memory at once. The model stays
    unchanged. Raises `torch.OutOfMemoryError`.
    """
    try:
        shadow = copy.deepcopy(model).to(device=device, dtype=precision.weights).to(memory_format=layout)
        kept = [torch.empty_like(p) for p in shadow.parameters() for _ in range(copies)]
        if device.type == "cuda":
            spare = int(SHARE_LEFT_FREE * torch.cuda.get_device_properties(device).total_memory)
            kept.append(torch.empty(spare, dtype=torch.uint8, device=device))
        images = torch.zeros(samples, 3, image_size, image_size, dtype=precision.weights, device=device)
        with precision.autocast(device):
            logits = [shadow.train()(images.contiguous(memory_format=layout)) for _ in range(passes)]
        torch.autograd.backward(logits[-1].to(precision.weights).sum())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    finally:
        shadow = kept = images = logits = None  # type: ignore[assignment]
        if device.type == "cuda":
            torch.cuda.empty_cache()


def estimate_ghosts(
    model: nn.Module, *, ghost_batch: int, image_size: int, ghosts: int, free: int, local_world: int
) -> int:
    """Return the number of ghost batches per micro-batch that fit in this rank's share of `free` bytes, at least one.

    `ghosts`: the maximum number of ghost batches of a rank in an update. `local_world`: the ranks that share `free`.
    """
    per_ghost = activation_bytes(model, ghost_batch, image_size)
    budget = SHARE_OF_FREE_MEMORY * free / local_world
    fitting = int(budget // max(per_ghost, 1))
    return max(1, min(fitting, MOST_SAMPLES // ghost_batch, ghosts))


def activation_bytes(model: nn.Module, samples: int, image_size: int) -> int:
    """Return the bytes of activations that the backward pass of `samples` float32 images needs.

    The number is scaled up from a pass of two images. Under autocast a pass keeps about half as much, so the number is
    an upper bound for every precision but fp64, which needs twice as much.
    """
    return sum(kept_tensors(model, samples, image_size))


def kept_tensors(model: nn.Module, samples: int, image_size: int) -> list[int]:
    """Return the bytes of each tensor that `activation_bytes` sums."""
    try:
        return _kept_tensors(model, samples, image_size, device_to_count_on())
    except Exception:  # the user's network may depend on values
        return _kept_tensors(model, samples, image_size, "cpu")


def _kept_tensors(model: nn.Module, samples: int, image_size: int, device: str) -> list[int]:
    tried = min(samples, 2)
    shadow = copy_to(model, device).float().train()
    # The last layer saves its weight as another, transposed tensor with the same storage.
    parameters = {p.untyped_storage() for p in shadow.parameters()}
    seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    sizes: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in parameters and storage not in seen:
            seen.add(storage)
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = shadow(torch.zeros(tried, 3, image_size, image_size, device=device))
    del output
    return [size * samples // tried for size in sizes]


def copy_to(model: nn.Module, device: str) -> nn.Module:
    """Return a copy of `model` on `device`; on ``meta`` without copying values, and with the same frozen parameters."""
    memo: dict[int, object] = {}
    if device == "meta":
        memo |= {id(p): nn.Parameter(torch.empty_like(p, device=device), p.requires_grad) for p in model.parameters()}
        memo |= {id(b): torch.empty_like(b, device=device) for b in model.buffers()}
    return copy.deepcopy(model, memo).to(device)


def device_to_count_on() -> str:
    """Return a device for passes whose shapes alone matter: ``meta`` computes nothing, so it is ten times as fast.

    The first use of ``meta`` imports torch's compiler, which takes seconds. Return ``cpu`` unless the compiler has
    already been imported, for example by torchvision.
    """
    return "meta" if "torch._dynamo" in sys.modules else "cpu"


def free_memory() -> int:
    """Return the bytes of host memory that the system and the control group still allow."""
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
    # Cached pages of files count as used, but the kernel frees them on demand.
    used -= int(details.get("inactive_file", 0))
    return (1 << 62) if limit == "max" else max(0, int(limit) - used)
