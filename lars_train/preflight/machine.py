"""What a machine and a device say of themselves: limits, free memory, versions, precisions. Nothing is judged here."""

from __future__ import annotations

import platform
import resource
import shutil
from pathlib import Path

import torch

from lars_train.config import AUTO, Config, run_hash
from lars_train.data.decode import native
from lars_train.errors import ConfigError
from lars_train.preflight.facts import Device, Host
from lars_train.training.device import PRECISIONS, available_cores, choose_precision, free_memory
from lars_train.training.metrics import peak_flops
from lars_train.training.run_directory import git_state, versions

_SHARED_MEMORY = Path("/dev/shm")


def host() -> Host:
    """The machine of this process."""
    soft, hard = (
        2**31 if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    try:
        shared: int | None = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        shared = None
    return Host(platform.node(), available_cores(), free_memory(), soft, hard, shared)


def device_of(device: torch.device, threads: int) -> Device:
    """The device of this rank, with what it does in each precision. To be asked before anything is allocated on it.

    Takes a fraction of a second; torch's threads are set to `threads`.
    """
    torch.set_num_threads(threads)
    if device.type == "cpu":
        return Device("cpu", _cpu_name(), memory=free_memory(), precisions=_precisions(device, threads))
    torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)
    found = torch.cuda.get_device_properties(device)
    major, minor = torch.cuda.get_device_capability(device)
    return Device(
        "cuda",
        f"{found.name}, compute capability {major}.{minor}",
        str(getattr(found, "uuid", "")),
        total,
        total - free,
        _precisions(device, threads),
    )


def _precisions(device: torch.device, threads: int) -> dict[str, float]:
    speeds = {}
    # In software, as a CPU may have to do bfloat16, it would be of no use.
    names = PRECISIONS if device.type == "cuda" else {"fp32", "fp64", "fp16", choose_precision(AUTO, device).name}
    for name in (name for name in PRECISIONS if name in names):
        try:
            speeds[name] = peak_flops(choose_precision(name, device), device, threads)
        except (ConfigError, RuntimeError):  # the second is of a library that has no such product
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


def version_facts(config: Config, device: torch.device) -> dict[str, str]:
    """What should be the same on every rank: versions, the commit, the decoder in C, and the config's hash."""
    git = git_state(Path(__file__).resolve().parent)
    found = {
        **versions(),
        "the commit": "an installed package" if git is None else git["commit"][:12] + (" + changes" * git["dirty"]),
        "the decoder in C": "there" if native.is_there() else "not there",
        "config": run_hash(config),
    }
    if device.type == "cuda":
        found |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}  # type: ignore[no-untyped-call]
        found["cuDNN"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return found
