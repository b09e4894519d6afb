"""Fuse batch norm with the ReLU after it, and with the sum with the shortcut, in residual blocks of known classes.

On CUDA one autograd function then computes what torch computes by two or three: see `ghost_kernels`. Elsewhere, in
evaluation, under torch.compile, for a single small ghost batch, and with hooks or another activation, blocks call the
same layers as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.ghost_norm import can_fuse

# An entry disables fusing.
_disabled: list[None] = []
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(torch_module, f"_global{hooks}") for hooks in _HOOKS]


def norm_relu(norm: nn.Module, relu: nn.Module, input: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """Return relu(norm(input)), or relu(norm(input) + shortcut)."""
    if not _disabled and can_fuse(input, shortcut) and _are_plain(norm, relu):
        assert isinstance(norm, GhostBatchNorm2d)
        if norm.uses_kernels(input):
            return norm.forward_relu(input, shortcut)
    output: Tensor = norm(input)
    if shortcut is not None:
        # With hooks of the backward pass the output is a view, which must not change in place.
        is_view = norm._backward_hooks or norm._backward_pre_hooks
        output = output + shortcut if is_view else output.add_(shortcut)
    activated: Tensor = relu(output)
    return activated


@contextmanager
def without_fusing() -> Iterator[None]:
    """Call the layers of all blocks one by one within the context, to compare them with fused blocks."""
    _disabled.append(None)
    try:
        yield
    finally:
        _disabled.pop()


def _are_plain(norm: nn.Module, relu: nn.Module) -> bool:
    return (
        type(norm) is GhostBatchNorm2d
        and norm.training
        and type(relu) is nn.ReLU
        and not any(_GLOBAL_HOOKS)
        and not any(getattr(layer, hooks) for layer in (norm, relu) for hooks in _HOOKS)
        and not any("forward" in vars(layer) for layer in (norm, relu))
    )


def fuse_blocks(network: nn.Module) -> None:
    """Replace, in place, the forward pass of each block in `network` that is of a known class by a fused one.

    The blocks become objects of a subclass with the same name. Their layers and state dicts stay the same, and their
    results differ by rounding only. Blocks without ghost batch norm, blocks with other parts between batch norm and
    ReLU (dropout, drop path, attention, another activation), and all other layers, stay unchanged.
    """
    for layer in network.modules():
        kind: Any = type(layer)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in _FORWARDS and not hasattr(kind, "_unfused") and _is_known(layer, _FORWARDS[name][0]):
            layer.__class__ = _fused_class(kind)


def _is_known(block: nn.Module, method: str) -> bool:
    own = getattr(block, method)
    if method in vars(block) or own.__module__ != type(block).__module__ or hasattr(own, "__wrapped__"):
        return False  # a program has replaced the method
    if not any(isinstance(layer, GhostBatchNorm2d) for layer in block.children()):
        return False
    nothing_between = all(getattr(block, name, None) is None for name in ("se", "drop_path"))
    activations = [getattr(block, name, None) for name in ("relu", "act1", "act2", "act3")]
    return (
        nothing_between
        and type(getattr(block, "drop_block", None)) in (type(None), nn.Identity)
        and all(type(activation) in (type(None), nn.ReLU) for activation in activations)
    )


@functools.cache
def _fused_class(kind: Any) -> Any:
    method, forward = _FORWARDS[f"{kind.__module__}.{kind.__qualname__}"]
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {**names, method: forward, "_unfused": kind, "__reduce_ex__": _reduce})


def _reduce(block: Any, _protocol: object) -> tuple[Any, ...]:
    """Make blocks picklable: pickle finds the class by its name, which is that of the class before fusing."""
    return _make_empty, (block._unfused,), block.__dict__


def _make_empty(kind: Any) -> Any:
    fused = _fused_class(kind)
    return fused.__new__(fused)


def _torchvision_stem(self: Any, x: Tensor) -> Tensor:
    x = self.maxpool(norm_relu(self.bn1, self.relu, self.conv1(x)))
    x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
    logits: Tensor = self.fc(self.avgpool(x).flatten(1))
    return logits


def _shortcut(self: Any, x: Tensor) -> Tensor:
    shortcut: Tensor = x if self.downsample is None else self.downsample(x)
    return shortcut


def _torchvision_basic(self: Any, x: Tensor) -> Tensor:
    out = norm_relu(self.bn1, self.relu, self.conv1(x))
    return norm_relu(self.bn2, self.relu, self.conv2(out), _shortcut(self, x))


def _torchvision_bottleneck(self: Any, x: Tensor) -> Tensor:
    out = norm_relu(self.bn1, self.relu, self.conv1(x))
    out = norm_relu(self.bn2, self.relu, self.conv2(out))
    return norm_relu(self.bn3, self.relu, self.conv3(out), _shortcut(self, x))


def _timm_basic(self: Any, x: Tensor) -> Tensor:
    out = self.aa(norm_relu(self.bn1, self.act1, self.conv1(x)))
    return norm_relu(self.bn2, self.act2, self.conv2(out), _shortcut(self, x))


def _timm_bottleneck(self: Any, x: Tensor) -> Tensor:
    out = norm_relu(self.bn1, self.act1, self.conv1(x))
    out = self.aa(norm_relu(self.bn2, self.act2, self.conv2(out)))
    return norm_relu(self.bn3, self.act3, self.conv3(out), _shortcut(self, x))


# The method to replace, by class. This module imports neither torchvision nor timm.
_FORWARDS: dict[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    "torchvision.models.resnet.ResNet": ("_forward_impl", _torchvision_stem),
    "torchvision.models.resnet.BasicBlock": ("forward", _torchvision_basic),
    "torchvision.models.resnet.Bottleneck": ("forward", _torchvision_bottleneck),
    "timm.models.resnet.BasicBlock": ("forward", _timm_basic),
    "timm.models.resnet.Bottleneck": ("forward", _timm_bottleneck),
}
