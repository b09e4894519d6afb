"""Norms, update ratios and trust ratios of an update, per layer and per stage of the network.

A layer is one parameter tensor, as in LARS. The first part of a layer's name is its stage; `conv1` and `bn1` form the
stage `stem`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_STEM = ("conv1", "bn1")


@dataclass(frozen=True)
class LayerValues:
    """Values of one update. Element i of each list belongs to the parameter `names[i]`.

    `ratios`: LARS's trust ratio by parameter name, for the parameters that have one. `lr`: the learning rate.
    `lr_factors`: the factor by which a parameter's learning rate differs from `lr`, by parameter name; 1 if missing.
    """

    names: list[str]
    weights: list[float]
    """|w| before the update."""
    gradients: list[float]
    """|g|, before LARS."""
    updates: list[float]
    """|w_after - w_before|."""
    lr: float
    ratios: dict[str, float] = field(default_factory=dict)
    lr_factors: dict[str, float] = field(default_factory=dict)

    def by_layer(self) -> dict[str, list[float]]:
        """Return the values of each histogram; ``trust_ratio`` and ``layer_lr`` only if LARS adapts any layer."""
        values = {
            "weight_norm": self.weights,
            "grad_norm": self.gradients,
            "update_ratio": [_ratio(u, w) for u, w in zip(self.updates, self.weights, strict=True)],
        }
        if self.ratios:
            values["trust_ratio"] = list(self.ratios.values())
            values["layer_lr"] = list(self._rates().values())
        return values

    def by_stage(self) -> Iterator[tuple[str, str, float]]:
        """Yield (quantity, stage, value): norms over the stage's parameters, medians of its layers' trust ratios."""
        for stage, places in self._stages().items():
            weight, grad, update = (_norm(norms[i] for i in places) for norms in self._norms())
            yield "weight_norm", stage, weight
            yield "grad_norm", stage, grad
            yield "update_ratio", stage, _ratio(update, weight)
            adapted = [self.names[i] for i in places if self.names[i] in self.ratios]
            if adapted:
                yield "trust_ratio", stage, statistics.median(self.ratios[name] for name in adapted)
                yield "layer_lr", stage, statistics.median(self._rates()[name] for name in adapted)

    def _rates(self) -> dict[str, float]:
        """Return the learning rate times the trust ratio of each adapted parameter."""
        return {name: self.lr * self.lr_factors.get(name, 1.0) * ratio for name, ratio in self.ratios.items()}

    def _norms(self) -> tuple[list[float], list[float], list[float]]:
        return self.weights, self.gradients, self.updates

    def _stages(self) -> dict[str, list[int]]:
        stages: dict[str, list[int]] = {}
        for place, name in enumerate(self.names):
            stages.setdefault(stage_of(name), []).append(place)
        return stages


def stage_of(name: str) -> str:
    """Return the stage of a parameter: ``layer2`` of ``layer2.0.conv1.weight``, ``stem`` of ``conv1.weight``."""
    first = name.partition(".")[0]
    return "stem" if first in _STEM else first


def _norm(parts: Iterable[float]) -> float:
    return math.hypot(*parts)


def _ratio(part: float, whole: float) -> float:
    # A bias that starts at zero has no norm to compare with.
    return part / whole if whole else 0.0
