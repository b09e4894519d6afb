"""Watches the training loss for divergence, without a wait for the device, and says what led to it."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lars_train.optim.lars import LARS
from lars_train.optim.rescale import Layers

_SHOWN = 5
# Between two looks, which come with log lines and checkpoints, there are rarely so many updates.
_MOST_LOSSES = _MOST_LAYERS = 1024


@dataclass(frozen=True)
class Divergence:
    """The first `update` whose training loss was not finite or above the limit.

    `layers`: per adapted parameter (name, |w|, |g|, trust ratio) of `layers_of`, the update before it, whose weights
    made that loss; of that update itself, where it is the first since the run was started or rolled back. Empty
    for an optimizer other than LARS, and where more than a thousand updates came between two looks.
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
    """Keeps on the device the loss of each update until the host looks at them, with what the layers were like.

    `max_loss`: the mean loss of a global batch above which an update counts as diverged; None: only if it is
    not finite. What is found is the same on all ranks if the losses that they give are.
    """

    def __init__(self, max_loss: float | None) -> None:
        # The largest number that is finite: a loss above it, or of which no comparison is true, is not.
        self._max_loss = min(math.inf if max_loss is None else max_loss, sys.float_info.max)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        # Of consecutive updates, the last of which is `_last`; those before `_seen` have been looked at.
        self._losses: list[Tensor] = []
        self._began = self._seen = self._last = 0
        self._layers: deque[Callable[[], Layers] | None] = deque(maxlen=_MOST_LAYERS)

    def watch(self, update: int, loss: Tensor, optimizer: Optimizer) -> None:
        """Note the mean `loss` (one element, on the device) of `update`, which `optimizer` has just made."""
        if not self._began:
            self._began = self._seen = update
        self._last = update
        self._losses.append(loss)
        if len(self._losses) == _MOST_LOSSES:
            # Each small tensor takes a block of memory.
            self._losses = [self._all_losses()]
        self._layers.append(optimizer.recorded() if isinstance(optimizer, LARS) else None)

    def found(self, network: nn.Module, lr_of: Any) -> Divergence | None:
        """The first divergence since the start, if there was one; here the host waits for the device.

        `lr_of`: the learning rate of an update, by its number.
        """
        losses = self._all_losses().tolist() if self._losses else []
        for update, loss in enumerate(losses, start=self._seen):
            if not loss <= self._max_loss:
                of = max(update - 1, self._began)
                return Divergence(update, loss, lr_of(update), self._layers_of(of, network), of)
        self._losses, self._seen = [], self._last + 1
        # The update before the next.
        self._layers = deque(list(self._layers)[-1:], maxlen=_MOST_LAYERS)
        return None

    def _all_losses(self) -> Tensor:
        return torch.cat([loss.reshape(-1) for loss in self._losses])

    def _layers_of(self, update: int, network: nn.Module) -> tuple[tuple[str, float, float, float], ...]:
        """Nothing where that is too long ago."""
        place = update - (self._last - len(self._layers) + 1)
        layers = self._layers[place] if place >= 0 else None
        if layers is None:
            return ()
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        parameters, values = layers()
        return tuple((names[id(p)], *column) for p, column in zip(parameters, values.T.tolist(), strict=True))
