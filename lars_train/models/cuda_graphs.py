"""Record the forward and backward pass of a micro-batch once per shape, and replay it as a CUDA graph.

The host launches a graph in one call, instead of hundreds of operations. `GraphedPass` decides when to record and when
to replay; only `CudaRecorder` needs a GPU.

A graph repeats the recorded operations on the same memory. Python code of the network does not run again, so it must
not depend on values, count its calls or draw random numbers.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lars_train.errors import ConfigError
from lars_train.messages import first_line
from lars_train.models.ghost_norm import launches_are_free

Pass = Callable[..., tuple[Tensor, ...]]
"""A forward and backward pass that adds to the parameters' gradients. Maps tensors to tensors."""
Replay = Callable[[], tuple[Tensor, ...]]
"""Repeats a recorded pass. Returns the same tensors each time, with new values."""

WARM_UPS = 3
"""Ordinary passes of a shape before it is recorded, in which libraries choose and load kernels.

PyTorch's documentation uses three, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""


class Recorder(Protocol):
    """Runs and records passes."""

    def run(self, function: Pass, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the pass."""

    def record(self, function: Pass, inputs: tuple[Tensor, ...]) -> Replay:
        """Record the pass without running it. `Replay` reads the current values of `inputs`."""


class CudaRecorder:
    """Records passes as CUDA graphs, which share one pool of memory because only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        # Recording needs a stream other than the default one, and the passes before it must use the same stream.
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: Pass, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the pass on the stream of the recordings."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with launches_are_free(), torch.cuda.stream(self._stream):
            outputs = function(*inputs)
        # The two waits also keep either stream from reusing freed memory that the other stream still reads.
        current.wait_stream(self._stream)
        return outputs

    def record(self, function: Pass, inputs: tuple[Tensor, ...]) -> Replay:
        """Record the pass. Raises `ConfigError` if CUDA cannot record it, and `torch.OutOfMemoryError`."""
        graph = torch.cuda.CUDAGraph()
        # The loader's threads and NCCL's may call CUDA while this thread records.
        options: dict[str, Any] = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with launches_are_free(), torch.cuda.graph(graph, **options):
                outputs = tuple(output.detach() for output in function(*inputs))
        except RuntimeError as error:
            # If the pass fails, the end of the recording may fail, too, and hide the first error.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise ConfigError(
                f"cuda_graphs=true: CUDA cannot record a pass of this network ({first_line(str(cause))}); omit it."
            ) from error

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return outputs

        return replay


@dataclass(frozen=True)
class _Recording:
    inputs: tuple[Tensor, ...]
    replay: Replay


class GraphedPass:
    """Calls a pass, with a recording for each combination of shapes, strides and dtypes of its inputs.

    The first `WARM_UPS` calls of a combination are ordinary passes, as are calls before all gradients exist. They are
    part of the training, so nothing must be undone. The caller must set gradients to zero in place, because a recording
    adds to the tensors that were the gradients at that time.

    Args:
        function: the pass. The outputs of a call must not depend on the memory of its inputs.
        parameters: all parameters whose gradients `function` changes.
        recorder: runs and records `function`.
    """

    def __init__(self, function: Pass, parameters: Iterable[Tensor], recorder: Recorder) -> None:
        self._function, self._recorder = function, recorder
        self._parameters = list(parameters)
        self._passes: Counter[Any] = Counter()
        self._recordings: dict[Any, _Recording] = {}
        self._gradients: list[Tensor | None] = []

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the pass, in memory that later calls do not change.

        Raises `RuntimeError` if the gradients are no longer the tensors to which the recordings add.
        """
        gradients = [parameter.grad for parameter in self._parameters]
        if self._recordings and not all(map(operator.is_, gradients, self._gradients)):
            raise RuntimeError("CUDA graphs: a gradient was replaced or set to None after it was recorded")
        key = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)
        recording = self._recordings.get(key)
        if recording is None:
            if self._passes[key] < WARM_UPS or any(gradient is None for gradient in gradients):
                self._passes[key] += 1
                return self._recorder.run(self._function, inputs)
            self._gradients = gradients
            kept = tuple(tensor.clone() for tensor in inputs)
            recording = self._recordings[key] = _Recording(kept, self._recorder.record(self._function, kept))
        for kept_input, given in zip(recording.inputs, inputs, strict=True):
            kept_input.copy_(given, non_blocking=True)
        return tuple(output.clone() for output in recording.replay())
