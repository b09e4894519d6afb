"""Watches the training loss for divergence, without a wait for the device, and says what led to it."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lars_train.optim.lars import LARS

_SHOWN = 5


@dataclass(frozen=True)
class Divergence:
    """The first `update` whose training loss was not finite or above the limit.

    `layers`: per adapted parameter (name, |w|, |g|, trust ratio) of `layers_of`, the update before it, whose weights
    made that loss; of that update itself, where it is the first since the run was started or rolled back. Empty
    for an optimizer other than LARS.
    """

    update: int
    loss: float
    lr: float
    layers: tuple[tuple[str, float, float, float], ...]
    layers_of: int

    def record(self) -> dict[str, Any]:
        """As values for JSON; the layers with the largest trust ratios and gradients."""
        return {
            "update": self.update,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "lr": self.lr,
            "layers_of_update": self.layers_of,
            "largest_trust_ratios": {name: ratio for name, _, _, ratio in self._largest(3)},
            "largest_gradients": {name: norm for name, _, norm, _ in self._largest(2)},
        }

    def lines(self) -> list[str]:
        """The same for people."""
        lines = [f"diverged at update {self.update:,}: loss {self.loss:g}, lr {self.lr:.4g}."]
        if self.layers:
            for what, column in (("trust ratios", 3), ("gradient norms", 2)):
                shown = ", ".join(f"{layer[0]} {layer[column]:.3g}" for layer in self._largest(column))
                lines.append(f"largest {what} at update {self.layers_of:,}: {shown}")
        return lines

    def _largest(self, column: int) -> list[Any]:
        def size(layer: Any) -> float:
            value = float(layer[column])
            return value if value == value else math.inf

        return sorted(self.layers, key=size, reverse=True)[:_SHOWN]


class Guard:
    """Keeps, on the device, the first update that went wrong and what the layers were like before it.

    `max_loss`: the mean loss of a global batch above which an update counts as diverged; None: only if it is
    not finite. What is kept is the same on all ranks if the losses that they give are.
    """

    def __init__(self, max_loss: float | None, device: torch.device) -> None:
        # The largest number that is finite: a loss above it, or of which no comparison is true, is not.
        self._max_loss = min(math.inf if max_loss is None else max_loss, sys.float_info.max)
        self._device = device
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        # The first such update, and its loss.
        self._seen = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._before: Tensor | None = None
        self._kept: Tensor | None = None
        self._parameters: list[Tensor] = []
        self._first = 0

    def watch(self, update: int, loss: Tensor, optimizer: Optimizer) -> None:
        """Note the mean `loss` (a scalar on the device) of `update`, which `optimizer` has just made."""
        unseen = self._seen[0] == 0
        loss = loss.double()
        now = torch.stack((torch.full_like(loss, update), loss))
        self._seen = torch.where(unseen & ~(loss <= self._max_loss), now, self._seen)
        self._first = self._first or update
        layers = optimizer.layers() if isinstance(optimizer, LARS) else None
        if layers is None:
            return
        self._parameters, latest = layers
        earlier = latest if self._before is None else self._before
        kept = self._kept
        fits = kept is not None and kept.shape == earlier.shape
        self._kept = torch.where(unseen, earlier, kept) if kept is not None and fits else earlier
        self._before = latest

    def found(self, network: nn.Module, lr_of: Any) -> Divergence | None:
        """The first divergence since the start, if there was one; here the host waits for the device.

        `lr_of`: the learning rate of an update, by its number.
        """
        update, loss = self._seen.tolist()
        if update == 0:
            return None
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        columns = [] if self._kept is None else self._kept.T.tolist()
        layers = [(names[id(p)], *column) for p, column in zip(self._parameters, columns, strict=False)]
        at = int(update)
        return Divergence(at, loss, lr_of(at), tuple(layers), at if at == self._first else at - 1)
