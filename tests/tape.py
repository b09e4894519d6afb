"""Stands in for CUDA graphs on the CPU: records a pass as its list of operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lars_train.models.cuda_graphs import Pass, Replay


class Operations(TorchDispatchMode):
    """Lists the operators that run, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def computes(operator: Any) -> bool:
    """Return False for operators that only make views or allocate memory."""
    aliases = [argument.alias_info for argument in operator._schema.arguments]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return not is_view and not any(word in operator.name() for word in ("empty", "_unsafe_view", "detach", "profiler"))


class Tape:
    """Stands in for `CudaRecorder` on the CPU. A replay repeats the operators on the recorded memory, without Python.

    The tape must run a pass to record it. It restores what the pass changed.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.runs, self.records, self.replays = network, 0, 0, 0

    def run(self, function: Pass, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.runs += 1
        return function(*inputs)

    def record(self, function: Pass, inputs: tuple[Tensor, ...]) -> Replay:
        self.records += 1
        changed = [p.grad for p in self.network.parameters() if p.grad is not None] + list(self.network.buffers())
        before = [tensor.clone() for tensor in changed]
        with Operations() as operations:
            outputs = tuple(output.detach() for output in function(*inputs))
        for tensor, value in zip([*changed, *outputs], [*before, *map(torch.zeros_like, outputs)], strict=True):
            tensor.copy_(value)

        def replay() -> tuple[Tensor, ...]:
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, result in operations.calls:
                    new = func(*args, **kwargs)
                    for old, value in zip(tensors(result), tensors(new), strict=True):
                        if old.data_ptr() != value.data_ptr():  # neither a view nor an operation in place
                            old.copy_(value)
            return outputs

        return replay


def tensors(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, tuple | list) else [result]
    return [part for part in parts if isinstance(part, Tensor)]
