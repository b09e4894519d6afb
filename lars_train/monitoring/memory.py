"""Measure the memory that rank 0 uses, from the system and torch's allocator, without waiting for the device."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_GIB = 1 << 30


def memory(device: torch.device) -> dict[str, float]:
    """Return the log's memory fields, in GiB. The device's value is the peak since the last call."""
    values = {}
    resident = _resident()
    if resident:
        values["memory/host"] = resident / _GIB
    if device.type == "cuda":
        values["memory/device"] = torch.cuda.max_memory_allocated(device) / _GIB
        torch.cuda.reset_peak_memory_stats(device)
    return values


def _resident() -> int:
    """Return the resident memory of this process in bytes; 0 where the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
