"""Build models by name: torchvision's ResNets and the networks of `resnet_cifar`, all with ghost batch norm."""

from __future__ import annotations

import functools

from torch import nn

from lars_train.errors import ConfigError, did_you_mean
from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.blurpool import add_blurpool
from lars_train.models.resnet_cifar import CifarResNet

# The number of blocks per stage, and the stride of the first convolution.
_CIFAR = {
    "tiny": (1, 2),
    "small": (1, 1),
    "resnet20": (3, 1),
    "resnet32": (5, 1),
    "resnet44": (7, 1),
    "resnet56": (9, 1),
}
# Listed here because importing torchvision to get the names takes seconds.
_TORCHVISION = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)


def model_names() -> tuple[str, ...]:
    """Return every name that `build_model` knows.

    ``small`` is a CIFAR ResNet of 8 layers; ``tiny`` is ``small`` with stride 2 in the first convolution.
    """
    return (*_CIFAR, *_TORCHVISION)


def is_torchvision_model(name: str) -> bool:
    """Return True if `name` is a torchvision model."""
    return name in _TORCHVISION


def is_builtin(network: nn.Module) -> bool:
    """Return True if `network` is of a class that `build_model` returns."""
    return type(network).__module__ in (CifarResNet.__module__, "torchvision.models.resnet")


def build_model(
    name: str, *, num_classes: int, ghost_batch: int, zero_gamma: bool, blurpool: bool = False
) -> nn.Module:
    """Return a newly initialized model on the CPU, from (n, 3, H, W) images to (n, `num_classes`) logits.

    A torchvision model has torchvision's modules, so state dicts are interchangeable with torchvision.

    Args:
        name: one of `model_names`.
        ghost_batch: samples over which batch norm computes each mean and variance in training.
        zero_gamma: initialize the last gamma of every residual block to 0 rather than 1 (Goyal et al. 2017,
            https://arxiv.org/abs/1706.02677, section 5.1).
        blurpool: blur the input of strided convolutions; see `blurpool.add_blurpool`. The initial weights and the
            state dict are those of the model without it.

    Raises:
        ConfigError: `name` is unknown.
    """
    norm_layer = functools.partial(GhostBatchNorm2d, ghost_batch=ghost_batch)
    model: nn.Module
    if name in _CIFAR:
        blocks, stride = _CIFAR[name]
        model = CifarResNet(blocks, num_classes=num_classes, norm_layer=norm_layer, stem_stride=stride)
    elif name in _TORCHVISION:
        from torchvision.models import get_model

        model = get_model(name, weights=None, num_classes=num_classes, norm_layer=norm_layer)
    else:
        raise ConfigError(
            f"model.name={name}: no such model.{did_you_mean(name, model_names())} "
            f"Choose one of {', '.join(model_names())}."
        )
    if blurpool:
        add_blurpool(model)
    if zero_gamma:
        _zero_last_gammas(model)
    return model


def _zero_last_gammas(model: nn.Module) -> None:
    for block in model.modules():
        last = getattr(block, "bn3", getattr(block, "bn2", None))
        if last is not None:
            nn.init.zeros_(last.weight)
