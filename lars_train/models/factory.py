"""Models by name, and weights from a file.

The names are torchvision's ResNets and the small networks of `resnet_cifar`; all get ghost batch norm.
Training checkpoints are not read here.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lars_train.errors import ConfigError, nearest
from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.resnet_cifar import CifarResNet

# Blocks of each stage, and the stride of the first convolution.
_CIFAR = {
    "tiny": (1, 2),
    "small": (1, 1),
    "resnet20": (3, 1),
    "resnet32": (5, 1),
    "resnet44": (7, 1),
    "resnet56": (9, 1),
}
# Written out, so that the names can be listed without the seconds that importing torchvision takes.
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
    """Every name that `build_model` knows; ``small`` is a CIFAR ResNet of 8 layers, ``tiny`` one at half the width
    and height."""
    return (*_CIFAR, *_TORCHVISION)


def is_torchvisions(name: str) -> bool:
    """Whether `build_model` takes the network of that name from torchvision."""
    return name in _TORCHVISION


def build_model(name: str, *, num_classes: int, ghost_batch: int, zero_gamma: bool) -> nn.Module:
    """A freshly initialised model on the CPU, from (n, 3, H, W) images to (n, `num_classes`) logits.

    A model with a torchvision name has torchvision's modules, so its state dict loads there and back.

    Args:
        name: one of `model_names`.
        ghost_batch: samples per batch-norm statistics.
        zero_gamma: start the last gamma of every residual block at 0 rather than 1 (Goyal et al. 2017,
            https://arxiv.org/abs/1706.02677, section 5.1).

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
            f"model.name={name}: no such model.{nearest(name, model_names())} Choose one of {', '.join(model_names())}."
        )
    if zero_gamma:
        _zero_last_gammas(model)
    return model


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load into `model`, in place, the plain state dict that ``torch.save`` or safetensors wrote to `path`.

    Every parameter and buffer must be there, by name and shape, and nothing else; only the counters
    ``num_batches_tracked`` may be missing, as they are in old files. No code in the file is run.

    Raises:
        ConfigError: the file is missing, is no state dict, does not fit the model, or has values that are not finite.
    """
    if os.fspath(path).endswith(".onnx"):
        raise ConfigError(f"model.weights={path}: a graph is not read; give the .pth or .safetensors of its network.")
    try:
        loaded = _read(path)
    except ImportError:
        raise ConfigError(
            f"model.weights={path}: this wants the package safetensors: pip install 'lars-train[export]'."
        ) from None
    except OSError as error:
        raise ConfigError(f"model.weights={path}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # a damaged pickle can raise anything: KeyError, UnicodeDecodeError, struct.error
        raise ConfigError(
            f"model.weights={path}: not a file of plain tensors that torch.save (or safetensors) wrote, or damaged "
            f"({type(error).__name__}); save it with torch.save(model.state_dict(), path)."
        ) from error
    load_state(model, loaded, f"model.weights={path}")
    # What else tells of bytes that have changed: a state dict has no checksum.
    faulty = [name for name, value in loaded.items() if value.is_floating_point() and not value.isfinite().all()]
    if faulty:
        raise ConfigError(
            f"model.weights={path}: {len(faulty)} tensor(s) hold values that are not finite: {_few(faulty)}. The "
            "file is damaged, or of a run that has diverged."
        )


def _read(path: str | os.PathLike[str]) -> Any:
    if os.fspath(path).endswith(".safetensors"):
        return importlib.import_module("safetensors.torch").load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_state(model: nn.Module, loaded: object, origin: str) -> None:
    """Load the state dict `loaded` into `model`, in place; what must be in it, `load_weights` says.

    Raises `ConfigError`, in which `origin` says where it comes from, when it is none or does not fit.
    """
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise ConfigError(
            f"{origin}: holds no plain state dict (names to tensors); save it with "
            "torch.save(model.state_dict(), path)."
        )
    wanted = model.state_dict()
    faults = {
        "missing": [k for k in wanted if k not in loaded and not k.endswith("num_batches_tracked")],
        "not in the model": [k for k in loaded if k not in wanted],
        "of another shape": [
            f"{k} {tuple(loaded[k].shape)} instead of {tuple(wanted[k].shape)}"
            for k in wanted
            if k in loaded and loaded[k].shape != wanted[k].shape
        ],
    }
    found = [f"{len(names)} {fault}: {_few(names)}" for fault, names in faults.items() if names]
    if found:
        raise ConfigError(
            f"{origin}: does not fit the model; {'; '.join(found)}. Check model.name and the number of classes."
        )
    model.load_state_dict(loaded, strict=False)


def _zero_last_gammas(model: nn.Module) -> None:
    for block in model.modules():
        last = getattr(block, "bn3", getattr(block, "bn2", None))
        if last is not None:
            nn.init.zeros_(last.weight)


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
