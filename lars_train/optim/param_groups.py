"""Split a model's parameters into groups by weight decay and by whether LARS adapts them."""

from __future__ import annotations

from typing import Any

from torch import nn

from .schedule import check_not_negative

_NORM_LAYERS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()),  # torch 2.4
)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the weights of `model`, and separately its biases and the parameters of torch's normalization layers.

    Both lists are in the order of ``model.named_parameters()``; every parameter is in exactly one of them. Many recipes
    neither decay nor adapt the second list. `parameter_groups` makes parameter groups of both lists. Its
    `norm_bias_lr_factor` sets the second list's learning rate as a multiple of the first's. Most schedulers keep this
    factor.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"pass the model, a torch.nn.Module, not {type(model).__name__}")
    exempt = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if _is_bias_name(name)}
    for module in model.modules():
        if isinstance(module, _NORM_LAYERS):
            exempt.update(id(p) for p in module.parameters())
    parameters = list(model.parameters())
    return [p for p in parameters if id(p) not in exempt], [p for p in parameters if id(p) in exempt]


def _is_bias_name(name: str) -> bool:
    """Return True for biases, including ``bias_ih_l0`` (LSTM), ``in_proj_bias``, ``parametrizations.bias.original``."""
    *path, leaf = name.split(".")
    if "parametrizations" in path:
        leaf = [*path, leaf][path.index("parametrizations") + 1]
    return leaf.startswith("bias") or leaf.endswith("bias")


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    decay_norm_bias: bool = False,
    adapt_norm_bias: bool = False,
    *,
    lr: float | None = None,
    norm_bias_lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer, with every parameter of `model` in exactly one.

    A group has the keys ``params`` (in the order of ``model.named_parameters()``), ``weight_decay``, ``name``, and
    ``lr`` if `lr` is given. The name is ``"decay"`` for the weights. For biases and normalization layers, it is
    ``"norm_bias"`` if they are decayed, else ``"no_decay"``. Empty groups are left out.

    Args:
        weight_decay: the weight decay of decayed groups.
        decay_norm_bias: decay biases and normalization layers too (the second list of `split_parameters`).
        adapt_norm_bias: if False, the group of biases and normalization layers gets ``exclude=True``, so that `LARS`
            does not adapt it. With both flags and a factor of 1, all parameters are in one group, ``"decay"``.
        lr: the learning rate of the weights. None: the optimizer's.
        norm_bias_lr_factor: the learning rate of biases and normalization layers, as a multiple of `lr`. Most of
            torch's schedulers keep the factor, because they multiply each group's initial rate.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `weight_decay` or `norm_bias_lr_factor` is negative or not finite, or the factor differs from 1
            without `lr`.
    """
    check_not_negative(weight_decay=weight_decay, norm_bias_lr_factor=norm_bias_lr_factor)
    if lr is None and norm_bias_lr_factor != 1:
        raise ValueError(f"norm_bias_lr_factor={norm_bias_lr_factor} is a multiple of lr: pass lr, too")
    alike = decay_norm_bias and adapt_norm_bias and norm_bias_lr_factor == 1
    weights, rest = (list(model.parameters()), []) if alike else split_parameters(model)
    others = {"weight_decay": weight_decay, "name": "norm_bias"} if decay_norm_bias else {}
    exclude = {} if adapt_norm_bias else {"exclude": True}
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay, "name": "decay"},
        {"params": rest, "weight_decay": 0.0, "name": "no_decay", **others, **exclude},
    ]
    if lr is not None:
        groups[0]["lr"], groups[1]["lr"] = lr, lr * norm_bias_lr_factor
    return [group for group in groups if group["params"]]
