"""Which parameters are decayed: the parameter groups that an optimizer is built with.

Only weight decay is decided here. LARS adapts every parameter of every group.
"""

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


def parameter_groups(model: nn.Module, weight_decay: float, decay_norm_bias: bool) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer, with every parameter of `model` in exactly one.

    A group has the keys ``params`` (in the order of ``model.named_parameters()``), ``weight_decay`` and
    ``name``: ``"decay"`` or ``"no_decay"``. A group that would be empty is left out.

    Args:
        weight_decay: of the ``"decay"`` group.
        decay_norm_bias: True puts all parameters into that group. False puts the biases of all layers and
            the parameters of torch's normalisation layers into ``"no_decay"``, whose weight decay is 0.
    """
    exempt: set[int] = set()
    if not decay_norm_bias:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, _NORMALISATION) or name.endswith("bias"):
                    exempt.add(id(parameter))
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in parameters if id(p) not in exempt],
            "weight_decay": weight_decay,
            "name": "decay",
        },
        {"params": [p for p in parameters if id(p) in exempt], "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [group for group in groups if group["params"]]
