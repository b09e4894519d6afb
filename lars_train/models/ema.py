"""Average a network's weights over the updates: the exponential moving average (EMA), model.ema."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lars_train.errors import ConfigError


class ExponentialMovingAverage:
    """The average of a network's weights over the updates. The attribute `network`, a copy of the network, holds it.

    After update u (counted from 0), the average equals the weights if u <= `start`, and
    ``decay * average + (1 - decay) * weights`` if u > `start`. Batch norm's running statistics are averaged like the
    weights, as in timm's ModelEmaV3
    (https://github.com/huggingface/pytorch-image-models/blob/main/timm/utils/model_ema.py) and Composer's EMA; integers
    are copied. The average has the dtype of the weights.

    torch's `AveragedModel` is not used, because it reads its count of updates on the host, which waits for the device.
    """

    def __init__(self, network: nn.Module, decay: float, start: int) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self._start = start
        self._average: Callable[..., None] = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call,unused-ignore]
        pairs = list(zip(self.network.state_dict().values(), network.state_dict().values(), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._integers = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, update: int) -> None:
        """Include the network's weights after `update`, counted from 0. The host does not wait for the device."""
        averages, weights = map(list, zip(*self._floats, strict=True))
        if update > self._start:
            self._average(averages, weights, None)
        else:
            torch._foreach_copy_(averages, weights)
        if self._integers:
            counts, current = map(list, zip(*self._integers, strict=True))
            torch._foreach_copy_(counts, current)

    def restore(self, content: dict[str, Any]) -> None:
        """Load the average from a checkpoint's `content`, or the stored weights if the checkpoint has no average."""
        self.network.load_state_dict(content["ema"] if "ema" in content else content["model"])


def check_average(content: dict[str, Any], decay: float | None, start: int) -> None:
    """Raise `ConfigError` if a run cannot continue from a checkpoint because the checkpoint has no average.

    `decay`, `start`: the run's ``model.ema`` and ``model.ema_start``.
    """
    update = content["update"]
    if decay is not None and "ema" not in content and update > start + 1:
        raise ConfigError(
            f"model.ema={decay:g}: the checkpoint of update {update:,} has no average of the weights, because its run "
            f"had none. Set model.ema_start={update}, to start the average there, or omit model.ema."
        )


def choose_weights(content: dict[str, Any], average: bool | None, key: str) -> tuple[dict[str, Any], bool]:
    """Return the average or the weights from a checkpoint's `content`, and True if it is the average.

    `average`: True for the average, False for the weights, None for the average if the checkpoint has one. `key`: the
    name of this setting. Raises `ConfigError` if `average` is True and the checkpoint has none.
    """
    found = content.get("ema")
    if average and not isinstance(found, dict):
        raise ConfigError(
            f"{key}=true: the checkpoint has no average of the weights, because its run had no model.ema; omit {key}."
        )
    return (found, True) if isinstance(found, dict) and average is not False else (content["model"], False)
