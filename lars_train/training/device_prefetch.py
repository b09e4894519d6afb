"""Copy a loader's batches to the device, and normalize the images there.

On CUDA, the next batch is copied while the device computes on the current one. On the CPU, batches stay unchanged.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lars_train.config import Config
from lars_train.data.loading.buffers import lend
from lars_train.data.loading.loader import Batch, LoaderStatistics, Stream
from lars_train.training.device import Precision, choose_layout
from lars_train.training.distributed import Group


@dataclass(frozen=True)
class RankContext:
    """The device, process group, precision and normalization that this rank computes with."""

    device: torch.device
    group: Group
    precision: Precision
    normalize: Callable[[Tensor], Tensor]
    """Maps uint8 images (n, 3, S, S) to the network's input on `device`; see `normalizer`."""
    layout: torch.memory_format = torch.channels_last

    @classmethod
    def from_config(cls, config: Config, device: torch.device, group: Group, precision: Precision) -> RankContext:
        """Return the context with the normalization and memory format that `config` sets."""
        layout = choose_layout(config)
        normalize = normalizer(config.data.mean, config.data.std, device, precision, layout)
        return cls(device, group, precision, normalize, layout)

    def place(self, network: nn.Module) -> nn.Module:
        """Return `network` on the device, with weights in the context's precision and memory format."""
        return network.to(device=self.device, dtype=self.precision.weights).to(memory_format=self.layout)


def normalizer(
    mean: list[float],
    std: list[float],
    device: torch.device,
    precision: Precision,
    layout: torch.memory_format = torch.channels_last,
) -> Callable[[Tensor], Tensor]:
    """Return a function that maps uint8 images (n, 3, S, S) to normalized images on `device`.

    The function computes (pixel / 255 - mean) / std in `precision.weights` as one multiply-add. On CUDA one kernel also
    converts the dtype. The result has the dtype `precision.compute` and the memory format `layout`.
    """
    factor = 1 / (torch.tensor(std, dtype=precision.weights) * 255)
    offset = -torch.tensor(mean, dtype=precision.weights) * 255 * factor
    factor, offset = factor.to(device), offset.to(device)
    memory = _ReusedMemory()

    def normalize(images: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        # View the images as rows of pixels, so that kernels process whole vectors rather than three values at a time.
        rows = images.to(device, non_blocking=True).permute(0, 2, 3, 1).reshape(-1, width * channels)
        scale, shift = factor.repeat(width), offset.repeat(width)
        if device.type == "cpu":
            # On the CPU, a kernel with mixed dtypes would copy all of its inputs.
            out = memory.empty(rows.shape, precision.weights).copy_(rows)
            out = torch.addcmul(shift, out, scale, out=out).to(precision.compute)
        else:
            out = torch.empty(rows.shape, dtype=precision.compute, device=device)
            torch.addcmul(shift, rows, scale, out=out)
        return out.view(count, height, width, channels).permute(0, 3, 1, 2).contiguous(memory_format=layout)

    return normalize


class _ReusedMemory:
    """Host memory that is reused once no tensor refers to it, because new pages cost more than the computation."""

    def __init__(self) -> None:
        self._free: queue.SimpleQueue[npt.NDArray[np.uint8]] = queue.SimpleQueue()

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor, like `torch.empty`."""
        size = shape.numel() * dtype.itemsize
        try:
            memory = self._free.get_nowait()
        except queue.Empty:
            memory = np.empty(size, np.uint8)
        if memory.nbytes < size:
            memory = np.empty(size, np.uint8)
        (found,) = lend([memory[:size]], lambda: self._free.put(memory))
        return found.view(dtype).view(shape)


class DevicePrefetcher(Iterator[Batch]):
    """Iterates over a stream's batches on `device`, in order.

    Use the tensors of a batch on the CUDA stream that was current when `next` returned the batch. The prefetcher keeps
    the source of a copy alive until the copy is done.
    """

    def __init__(self, batches: Stream, device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._copies = _side_stream(device) if device.type == "cuda" else None
        self._ahead: deque[Batch | BaseException] = deque()
        self._copied: deque[tuple[torch.cuda.Event, Batch]] = deque()

    def __next__(self) -> Batch:
        if self._copies is None:
            return next(self._batches)
        found = self._ahead.popleft() if self._ahead else self._begin_copy(self._copies)
        if isinstance(found, BaseException):
            raise found
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copies)
        for tensor in (found.images, found.labels):
            tensor.record_stream(current)
        self._copy_ahead(self._copies)
        return found

    def statistics(self) -> LoaderStatistics:
        """See `Stream.statistics`."""
        return self._batches.statistics()

    def close(self) -> None:
        """See `Stream.close`."""
        self._batches.close()
        self._ahead.clear()
        for event, _ in self._copied:
            event.synchronize()
        self._copied.clear()

    def _copy_ahead(self, copies: torch.cuda.Stream) -> None:
        """Start copying the next batch if it is ready, so that the computation does not wait for the loader."""
        try:
            if self._batches.ready():
                self._ahead.append(self._begin_copy(copies))
        except BaseException as error:
            # Raise the error only when this batch is requested.
            self._ahead.append(error)

    def _begin_copy(self, copies: torch.cuda.Stream) -> Batch:
        batch = next(self._batches)
        while self._copied and self._copied[0][0].query():  # type: ignore[no-untyped-call]
            self._copied.popleft()
        with torch.cuda.stream(copies):
            images, labels = (tensor.to(self._device, non_blocking=True) for tensor in (batch.images, batch.labels))
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(copies)
        self._copied.append((event, batch))
        return replace(batch, images=images, labels=labels)


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
