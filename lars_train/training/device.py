"""What the run computes on and in which precision, decided once and printed. Nothing is allocated here."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from lars_train.config import AUTO, Config
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.training.host_memory import keep_freed_memory


@dataclass(frozen=True)
class Precision:
    """`name`: fp32, fp64, bf16 or fp16. Weights are kept in `weights`; matrix work runs in `compute`."""

    name: str
    weights: torch.dtype
    compute: torch.dtype

    @property
    def scales_loss(self) -> bool:
        """float16 gradients underflow without loss scaling."""
        return self.compute == torch.float16

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context that forward passes run in."""
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
    """CUDA devices that a run of this config may use; 0 means the CPU.

    Raises `ConfigError` for ``device=cuda`` where there is none.
    """
    if config.device == "cpu":
        return 0
    count = torch.cuda.device_count()
    if config.device == "cuda" and count == 0:
        raise ConfigError("device=cuda: torch finds no CUDA device here; use device=cpu or device=auto.")
    return count


def choose_device(config: Config, ranks: Ranks) -> torch.device:
    """The device of this rank. Raises `ConfigError` when the machine has fewer devices than ranks."""
    count = cuda_devices(config)
    if count == 0:
        return torch.device("cpu")
    if count == 1 and "SLURM_LOCALID" in os.environ:
        # Slurm can show each task its own device only (--gpus-per-task); NCCL refuses if it is in truth a shared one.
        return torch.device("cuda", 0)
    if ranks.local_rank >= count:
        raise ConfigError(
            f"local rank {ranks.local_rank} has no device: this machine has {count} CUDA device(s); "
            "start fewer processes (--nproc-per-node), or use device=cpu."
        )
    return torch.device("cuda", ranks.local_rank)


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision by its name; ``auto`` is the fastest that is safe on the device.

    Raises `ConfigError` for one that the device cannot do in hardware.
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
    """How images and weights lie in memory. ``auto``: channels last, as convolutions want them on CUDA and the CPU."""
    return torch.contiguous_format if config.channels_last is False else torch.channels_last


def set_up(config: Config, device: torch.device, threads: int) -> None:
    """Make the process ready: CPU threads and memory, the current device, determinism, seeds."""
    torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # To set what is set already would import torch's compiler.
    if config.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(config.deterministic)


def choose_threads(config: Config, ranks: Ranks) -> int:
    """CPU threads of this process: as asked for, or its share of the cores it may run on."""
    if config.launch.threads != AUTO:
        return int(config.launch.threads)
    return max(1, available_cores() // ranks.local_world)


def choose_workers(config: Config, device: torch.device, ranks: Ranks) -> int:
    """Loader processes of this rank. None on the CPU: training has the cores busy already."""
    if config.data.workers != AUTO:
        return int(config.data.workers)
    if device.type == "cpu":
        return 0
    return max(1, min(16, available_cores() // ranks.local_world - 1))


def available_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fastest(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if _cuda_has_bf16(device) else "fp16"
    return "bf16" if _cpu_has("avx512_bf16", "amx_bf16", "bf16") else "fp32"


def _cuda_has_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _cpu_has(*flags: str) -> bool:
    return any(torch.cpu.get_capabilities().get(flag, False) for flag in flags)
