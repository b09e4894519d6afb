"""Measure the energy that a GPU uses, by the driver's counter, through NVML (nvidia-ml-py, the extra ``gpu``)."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

JOULES_PER_KWH = 3.6e6


class EnergyMeter:
    """The energy of a device since the last reading.

    The counter is NVML's ``nvmlDeviceGetTotalEnergyConsumption``, which GPUs have since Volta. On other devices, and on
    GPUs without NVML or with MIG, the energy cannot be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._counter = _counter_of(device)
        self._last = self._read()

    def take(self) -> float | None:
        """Return the joules since the last call, or since the meter was made; None if they cannot be measured."""
        before, self._last = self._last, self._read()
        # A driver that was loaded again counts from 0.
        return None if before is None or self._last is None or self._last < before else self._last - before

    def _read(self) -> float | None:
        """Return the counter in joules. A counter that fails once is not read again."""
        if self._counter is None:
            return None
        try:
            return self._counter() / 1000
        except Exception:  # NVML's own error, which this module cannot import without NVML
            self._counter = None
            return None


def _counter_of(device: torch.device) -> Callable[[], int] | None:
    """Return a function that reads the device's counter in millijoules, or None."""
    if device.type != "cuda":
        return None
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        # NVML numbers all GPUs of the machine, torch only those that the process may use.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # the package or the driver's library is missing, or NVML's own error
        return None
    return lambda: int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
