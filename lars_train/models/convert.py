"""Give any network ghost batch norm, and freeze its parameters by name. The names of the state dict stay the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lars_train.errors import ConfigError, did_you_mean
from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.weight_files import few


class GhostBatchNorm1d(GhostBatchNorm2d):
    """Ghost batch norm of features (n, C) or (n, C, L), with the state dict of `nn.BatchNorm1d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`; the output has the same shape."""
        return super().forward(input.reshape(*input.shape[:2], -1, 1)).reshape(input.shape)


class GhostBatchNormAct2d(GhostBatchNorm2d):
    """Ghost batch norm followed by dropout and activation, as in timm's ``BatchNormAct2d``."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalize and activate `input` (n, C, H, W)."""
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


_GHOSTS: dict[type, type[GhostBatchNorm2d]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.SyncBatchNorm: GhostBatchNorm2d,
}
# Classes of timm, which this module does not import. Their state is that of batch norm and of the modules drop and act.
_TIMM = {"timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct"}


def use_ghost_batch_norm(network: nn.Module, ghost_batch: int) -> None:
    """Turn the batch norm layers of `network` into ghost batch norm, in place, with the same parameters and buffers.

    The layers change their class, so hooks and other references to them stay valid. Other layers stay unchanged.

    Raises `ConfigError` for batch norm of another kind, without running statistics, or with a cumulative average
    (``momentum=None``).
    """
    for name, layer in network.named_modules():
        where = f"the network's layer {name or '(the network itself)'}, a {type(layer).__name__}"
        if isinstance(layer, torch.jit.ScriptModule):
            raise ConfigError(f"{where}: a compiled TorchScript module hides its batch norm; pass the Python module.")
        if isinstance(layer, GhostBatchNorm2d):
            layer.ghost_batch = ghost_batch
        elif isinstance(layer, _BatchNorm):
            kind, own = type(layer), f"{type(layer).__module__}.{type(layer).__qualname__}"
            ghost = GhostBatchNormAct2d if own in _TIMM and hasattr(layer, "act") else _GHOSTS.get(kind)
            if ghost is None:
                raise ConfigError(
                    f"{where}: this kind of batch norm has no ghost-batch version; use nn.BatchNorm2d, "
                    "nn.BatchNorm1d, or a normalization that does not depend on the batch."
                )
            if layer.running_mean is None or not layer.track_running_stats or layer.momentum is None:
                raise ConfigError(
                    f"{where}: it has track_running_stats={layer.track_running_stats} and momentum={layer.momentum}; "
                    "a run needs running statistics with a momentum, such as 0.1."
                )
            layer.__class__ = ghost
            cast(GhostBatchNorm2d, layer).add_sums(ghost_batch)


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters of `network` whose names match one of `patterns` (those of `fnmatch`).

    Batch norm whose parameters are all frozen, by this function or by the caller, uses its running statistics and keeps
    them.

    Raises `ConfigError` for a pattern that matches nothing, and if all parameters are frozen.
    """
    named = list(network.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = [parameter for name, parameter in named if fnmatchcase(name, pattern)]
        if not matched:
            names = [name for name, _ in named]
            prefixes = {f"{name.rsplit('.', depth)[0]}.*" for name in names for depth in (1, 2, 3) if "." in name}
            raise ConfigError(
                f"model.freeze: the pattern {pattern} matches none of the network's {len(names)} parameters, such as "
                f"{few(names)}.{did_you_mean(f'{pattern}.*', prefixes)}"
            )
        for parameter in matched:
            parameter.requires_grad_(False)
    if named and not any(parameter.requires_grad for _, parameter in named):
        raise ConfigError("model.freeze: all parameters are frozen, so there is nothing to train; freeze fewer.")
    for layer in network.modules():
        if isinstance(layer, GhostBatchNorm2d) and (parameters := list(layer.parameters())):
            layer.is_frozen = not any(parameter.requires_grad for parameter in parameters)
            layer.train(layer.training)


def find_head(network: nn.Module) -> str | None:
    """Return the name of the last layer: timm's ``get_classifier`` if defined, else the last `nn.Linear`, or None."""
    named = list(network.named_modules())
    get_classifier: Callable[[], object] | None = getattr(network, "get_classifier", None)
    if get_classifier is not None:
        classifier = get_classifier()
        return next((name for name, layer in named if layer is classifier), None)
    return next((name for name, layer in reversed(named) if isinstance(layer, nn.Linear)), None)


def head_layer(network: nn.Module, outputs: int, key: str) -> nn.Linear | nn.Conv2d:
    """Return the last layer.

    Raises `ConfigError`, which names `key`, unless the layer is found and has `outputs` outputs.
    """
    name = find_head(network)
    layer = None if name is None else network.get_submodule(name)
    if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[0] == outputs:
        return layer
    found = "there is none" if layer is None else f"{name}, a {type(layer).__name__}, does not have {outputs} outputs"
    raise ConfigError(f"{key} needs a last layer of type nn.Linear, one output per class: {found}.")
