"""The weights of a model as bytes: their hash."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_sha256(network: nn.Module, rounded_to: torch.dtype | None = None) -> str:
    """SHA-256, in hex, over the names and bytes (C order) of all parameters and buffers, in bytewise order of names.

    `rounded_to`: of floating-point values rounded to this dtype first.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        if rounded_to is not None and tensor.is_floating_point():
            tensor = tensor.to(rounded_to)
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
