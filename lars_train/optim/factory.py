"""The optimizer that a config asks for: a class of torch.optim by its name, with or without LARS around it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lars_train.config import OptimizerConfig, filled
from lars_train.config.lars_options import lars_keywords
from lars_train.errors import ConfigError, nearest
from lars_train.optim.eager import leave_compiler_out
from lars_train.optim.lars import LARS
from lars_train.optim.param_groups import parameter_groups

# Classes of torch.optim that cannot train these networks, with or without LARS.
_UNFIT = {
    "LBFGS": "it evaluates the loss again within its step, which a trainer of one pass per update does not do",
    "Muon": "it takes matrices only, and these networks are made of convolutions",
    "SparseAdam": "it takes sparse gradients only, and these networks have dense ones",
}
_OURS = ("params", "lr", "momentum", "nesterov", "weight_decay")


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """The optimizer over `model`'s parameters, its lr at the config's peak.

    Raises `ConfigError` for a class that torch.optim does not have and for keywords that it does not take.
    """
    leave_compiler_out()
    base_class = optimizer_class(config.base)
    keywords = _keywords(config, base_class)
    adapt = config.name == "sgd" or config.adapt_norm_bias is not False
    groups = parameter_groups(model, filled(config.weight_decay), filled(config.decay_norm_bias), adapt)
    try:
        base: Optimizer = base_class(groups, lr=filled(config.lr), **keywords)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer.base={config.base} refuses its keywords: {error}") from None
    if config.name == "sgd":
        return base
    try:
        return LARS(base, **lars_keywords(config), record=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.base={config.base}: {error}") from None


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise `ConfigError` if `build_optimizer` would, without a model."""
    build_optimizer(config, nn.Linear(1, 1))


def optimizer_class(name: str) -> Any:
    """The class of torch.optim called `name`. Raises `ConfigError`."""
    choices = sorted(
        key
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer and key not in _UNFIT
    )
    if name in _UNFIT:
        raise ConfigError(f"optimizer.base={name}: {_UNFIT[name]}; choose another of {', '.join(choices)}.")
    if name not in choices:
        raise ConfigError(
            f"optimizer.base={name}: torch.optim has no such class; it has {', '.join(choices)}."
            f"{nearest(name, choices)}"
        )
    return getattr(torch.optim, name)


def _keywords(config: OptimizerConfig, base_class: Any) -> dict[str, Any]:
    known = inspect.signature(base_class).parameters
    keywords = dict(config.kwargs)
    for key in keywords:
        if key in _OURS:
            raise ConfigError(f"optimizer.kwargs.{key}: use optimizer.{key} for it.")
        if key not in known:
            raise ConfigError(
                f"optimizer.kwargs.{key}: torch.optim.{config.base} has no such keyword.{nearest(key, known)}"
            )
    # Lists of YAML stand for the tuples that torch wants (betas).
    keywords = {k: tuple(v) if isinstance(v, list) else v for k, v in keywords.items()}
    if config.momentum is not None:
        if "momentum" not in known:
            raise ConfigError(f"optimizer.momentum={config.momentum}: torch.optim.{config.base} has no momentum.")
        keywords["momentum"] = config.momentum
    if config.nesterov is not None:
        if "nesterov" not in known:
            raise ConfigError(f"optimizer.nesterov={config.nesterov}: torch.optim.{config.base} has no such momentum.")
        keywords["nesterov"] = config.nesterov
    return keywords
