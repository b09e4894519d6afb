"""Which parameters are decayed, and which LARS adapts: the parameter groups that an optimizer is built with."""

from __future__ import annotations

from typing import Any

from torch import nn

_NORMALISATION = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights of `model`, and the biases of all layers with the parameters of torch's normalisation layers.

    Each in the order of ``model.named_parameters()``, every parameter in exactly one of the two. Many recipes
    neither decay nor adapt the second: a group with ``weight_decay=0`` and ``exclude=True``.
    """
    exempt = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if _names_a_bias(name)}
    for module in model.modules():
        if isinstance(module, _NORMALISATION):
            exempt.update(id(p) for p in module.parameters())
    parameters = list(model.parameters())
    return [p for p in parameters if id(p) not in exempt], [p for p in parameters if id(p) in exempt]


def _names_a_bias(name: str) -> bool:
    """Also ``bias_ih_l0`` of an LSTM, ``in_proj_bias`` of attention, ``parametrizations.bias.original``."""
    *path, leaf = name.split(".")
    if "parametrizations" in path:
        leaf = [*path, leaf][path.index("parametrizations") + 1]
    return leaf.startswith("bias") or leaf.endswith("bias")


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_norm_bias: bool, adapt_norm_bias: bool = True
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer, with every parameter of `model` in exactly one.

    A group has the keys ``params`` (in the order of ``model.named_parameters()``), ``weight_decay`` and
    ``name``: ``"decay"`` for the weights, and for what `split_parameters` gives second ``"no_decay"`` without
    decay, or ``"norm_bias"`` with it. A group that would be empty is left out.

    Args:
        weight_decay: of the groups that are decayed.
        decay_norm_bias: whether what `split_parameters` gives second is decayed.
        adapt_norm_bias: False gives its group ``exclude=True``, with which `LARS` leaves it to the base. True
            with `decay_norm_bias` puts all parameters into one group, ``"decay"``.
    """
    alike = decay_norm_bias and adapt_norm_bias
    weights, rest = (list(model.parameters()), []) if alike else split_parameters(model)
    others = {"weight_decay": weight_decay, "name": "norm_bias"} if decay_norm_bias else {}
    exclude = {} if adapt_norm_bias else {"exclude": True}
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay, "name": "decay"},
        {"params": rest, "weight_decay": 0.0, "name": "no_decay", **others, **exclude},
    ]
    return [group for group in groups if group["params"]]
