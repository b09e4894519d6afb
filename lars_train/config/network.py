"""Define the config's section ``model``, and check it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from lars_train.errors import ConfigError
from lars_train.targets import OBJECT

BUILTIN, TIMM, CUSTOM = "builtin", "timm", "custom"
"""Values of ``model.source``."""


@dataclass
class ModelConfig:
    """The network (docs/models.md)."""

    name: str = "resnet50"
    """A model of ``configs/choices.yaml``; with ``model=timm``, the name of one of timm's networks."""
    source: str = BUILTIN
    """builtin, timm or custom (``model=timm`` and ``model=custom`` set it)."""
    target: Optional[str] = None
    """For ``model=custom``: the function or class that makes the network, ``package.module:function``. It is called
    with the keyword num_classes and with `kwargs`.
    """
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for timm's create_model, or for `target`."""
    weights: Optional[str] = None
    """Weights to start from or to evaluate: a state_dict, a checkpoint that contains one, or ``.safetensors``."""
    new_head: bool = False
    """Load all layers except the last from `weights`, for data with other classes."""
    head_lr: Optional[float] = None
    """Learning rate of the new last layer, as a multiple of the others' (null: 1). Requires `new_head`."""
    freeze: list[str] = field(default_factory=list)
    """Patterns of parameter names, such as ``layer1.*``. These parameters stay unchanged; batch norm whose parameters
    are all frozen uses its running statistics.
    """
    ghost_batch: Optional[int] = None
    """Samples over which batch norm computes each mean and variance in training."""
    zero_gamma: Optional[bool] = None
    """Start the last gamma of every residual block at 0. Not for timm and custom networks, which keep their own
    initial weights.
    """
    blurpool: Optional[bool] = None
    """Blur the input of strided convolutions (antialiased downsampling, docs/methods.md)."""
    ema: Optional[float] = None
    """Average the weights over the updates with this decay per update, such as 0.9999; evaluate the average, too. null:
    no average.
    """
    ema_start: int = 0
    """The average starts with the weights after this update, counted from 0."""


def check_network(model: ModelConfig, *, stored: bool) -> None:
    """Raise `ConfigError` for settings of `model` that conflict. `stored`: the network comes from a checkpoint."""
    if model.ema is not None and not 0 < model.ema < 1:
        raise ConfigError(f"model.ema={model.ema}: the decay must be above 0 and below 1, such as 0.9999.")
    if model.ema is None and model.ema_start:
        raise ConfigError(f"model.ema_start={model.ema_start} has no effect without model.ema; omit it.")
    if model.head_lr is not None and not model.new_head:
        raise ConfigError(f"model.head_lr={model.head_lr:g} needs model.new_head=true, a new last layer.")
    if model.source == TIMM and model.name == TIMM:
        raise ConfigError("model=timm: set model.name to the name of one of timm's networks, such as resnet50d.")
    if model.source == CUSTOM and model.target is None:
        raise ConfigError("model=custom: set model.target=package.module:function, which returns the network.")
    if model.source == CUSTOM and model.name != CUSTOM:
        raise ConfigError(f"model.name={model.name} has no effect with model=custom; omit it, or set model=timm.")
    if model.source != CUSTOM and model.target is not None and not stored:
        raise ConfigError(f"model.target={model.target} has no effect with model={model.name}; set model=custom.")
    if model.source == BUILTIN:
        if model.kwargs and not stored:
            raise ConfigError(
                f"model.kwargs.{next(iter(model.kwargs))} has no effect with model={model.name}; for timm's network of "
                f"that name: model=timm model.name={model.name}"
            )
        return
    if model.blurpool:
        raise ConfigError(
            f"model.blurpool=true: it is not implemented for model={model.source}; set model.blurpool=false, which "
            "also overrides the recipe."
        )
    if model.zero_gamma is not None:
        key = f"model.zero_gamma={str(model.zero_gamma).lower()}"
        remedy = "set model.kwargs.zero_init_last, if the network has it, instead"
        if model.source == CUSTOM:
            remedy = "omit it, and initialize the weights in your function"
        raise ConfigError(f"{key}: it applies to built-in networks only, not to model={model.source}; {remedy}.")


def describe_network(model: ModelConfig) -> str:
    """Return the network's name for a message or a table: ``timm/resnet50d``, or the target of a custom one.

    A network of a Python program has the name of its class.
    """
    if str(model.target).startswith(OBJECT):
        return f"{str(model.target).split(':')[1]} (an object)"
    return {TIMM: f"timm/{model.name}", CUSTOM: str(model.target)}.get(model.source, model.name)
