"""How the layers of a network fare in an update: one value per layer, and one per stage.

A layer is a parameter tensor, as for LARS; a stage is what its name begins with, in which the stem is one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_STEM = ("conv1", "bn1")


@dataclass(frozen=True)
class LayerValues:
    """Of one update, value i of each list that of the parameter `names[i]`.

    `ratios`: LARS's trust ratios of those parameters that have one, by name. `lr`: the update's learning rate.
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

    def by_layer(self) -> dict[str, list[float]]:
        """What a histogram shows: ``trust_ratio`` and ``layer_lr`` of the layers that LARS adapts, if there are any."""
        found = {
            "weight_norm": self.weights,
            "grad_norm": self.gradients,
            "update_ratio": [_share(u, w) for u, w in zip(self.updates, self.weights, strict=True)],
        }
        if self.ratios:
            found["trust_ratio"] = list(self.ratios.values())
            found["layer_lr"] = [self.lr * ratio for ratio in self.ratios.values()]
        return found

    def by_stage(self) -> Iterator[tuple[str, str, float]]:
        """What, the stage, and its value: norms of all its parameters as one, medians of what is a layer's own."""
        for stage, places in self._stages().items():
            weight, grad, update = (_norm(norms[i] for i in places) for norms in self._norms())
            yield "weight_norm", stage, weight
            yield "grad_norm", stage, grad
            yield "update_ratio", stage, _share(update, weight)
            ratios = [self.ratios[self.names[i]] for i in places if self.names[i] in self.ratios]
            if ratios:
                yield "trust_ratio", stage, statistics.median(ratios)
                yield "layer_lr", stage, self.lr * statistics.median(ratios)

    def _norms(self) -> tuple[list[float], list[float], list[float]]:
        return self.weights, self.gradients, self.updates

    def _stages(self) -> dict[str, list[int]]:
        stages: dict[str, list[int]] = {}
        for place, name in enumerate(self.names):
            stages.setdefault(stage_of(name), []).append(place)
        return stages


def stage_of(name: str) -> str:
    """The stage of the parameter `name`: ``layer2`` of ``layer2.0.conv1.weight``, ``stem`` of what comes before."""
    first = name.partition(".")[0]
    return "stem" if first in _STEM else first


def _norm(parts: Iterable[float]) -> float:
    return math.hypot(*parts)


def _share(part: float, whole: float) -> float:
    # A bias that begins at zero has no size that it could be compared with.
    return part / whole if whole else 0.0
