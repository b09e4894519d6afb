"""How much memory rank 0 uses, asked of the system and of torch's allocator; no device is waited for."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_GIB = 1 << 30


def memory(device: torch.device) -> dict[str, float]:
    """GiB, by the names of `fields.FIELDS`; the device's peak is that since the last call."""
    values = {}
    resident = _resident()
    if resident:
        values["memory/host"] = resident / _GIB
    if device.type == "cuda":
        values["memory/device"] = torch.cuda.max_memory_allocated(device) / _GIB
        torch.cuda.reset_peak_memory_stats(device)
    return values


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
