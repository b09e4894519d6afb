"""``mode=export``: write the weights of a checkpoint in the format of the file's suffix, and a model card."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lars_train.config import Config
from lars_train.config.network import BUILTIN, CUSTOM, TIMM, ModelConfig
from lars_train.errors import ConfigError, DataError
from lars_train.fsutil import user_path, write_atomic
from lars_train.messages import first_line, utf8
from lars_train.models.ema import choose_weights
from lars_train.models.factory import is_torchvision_model
from lars_train.models.weight_files import KEY
from lars_train.models.weights import load_state
from lars_train.networks import build_network
from lars_train.report.model_card import CARD, MARK, card, merge_cards, origin
from lars_train.targets import check_named
from lars_train.training import checkpoint

TOLERANCE = 1e-4
"""Largest difference between the graph's and the network's logits, relative to max(1, the largest logit)."""

_EXTRA = "install it with: pip install '.[export]' in a clone of lars-train"
_CHECKED = 2  # images for the comparison


def export(config: Config) -> tuple[Path, str]:
    """Write the checkpoint's weights in float32, and ``MODEL.md`` beside them. Return the file and a line for the user.

    ``export.path`` is a ``.pth``, ``.pt``, ``.safetensors`` or ``.onnx`` file; by default a ``.pth`` beside the
    checkpoint. ``export.ema``: see `choose_weights`. Raises `ConfigError`, and `DataError` for a graph whose results
    differ from the network's.
    """
    assert config.checkpoint.path is not None
    source, content = checkpoint.find(config.checkpoint.path)
    name = str(checkpoint.value(content, "config", "model", "name"))
    # Build the network first, because this checks the model's name, which becomes part of the file's name.
    network = build_network(_with_network_of(config, content), len(content["classes"]))
    state, average = choose_weights(content, config.export.ema, "export.ema")
    load_state(network, state, f"checkpoint.path={config.checkpoint.path}")
    if source.name.startswith(checkpoint.SET_ASIDE):
        raise ConfigError(
            f"checkpoint.path={config.checkpoint.path}: the run diverged with these weights, and set them aside. "
            "Pass an earlier checkpoint, or the run directory."
        )
    broken = [key for key, value in network.state_dict().items() if not bool(value.isfinite().all())]
    if broken:
        raise ConfigError(
            f"checkpoint.path={config.checkpoint.path}: {source.name} contains values that are not finite "
            f"({broken[0]}{f' and {len(broken) - 1} more' if broken[1:] else ''}): the run diverged. Pass an earlier "
            "checkpoint."
        )
    target = (
        user_path(config.export.path) if config.export.path else source.with_name(f"{name}-{source.stem}-weights.pth")
    )
    _check_target(target, source, config)
    about = origin(source, content, average=average)
    if about.get("source") == CUSTOM:
        about["target"] = config.model.target  # the code that has made this network
    if target.suffix == ".onnx" and not isinstance(about["image_size"], int):
        raise ConfigError(f"checkpoint.path={config.checkpoint.path}: the checkpoint has no image size.")
    # Keep the suffix, by which some writers choose the format.
    partial = target.with_name(f".partial-{target.name}")
    try:
        check = WRITERS[target.suffix](partial, network, about)
        # Some writers create a file that only its owner can read.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        partial.replace(target)
        _describe(target, about)
    except DataError:
        raise
    except (OSError, RuntimeError) as error:  # torch reports a file that it cannot write as RuntimeError
        raise ConfigError(f"export.path={target}: cannot be written ({first_line(error)}).") from None
    finally:
        partial.unlink(missing_ok=True)
    return target, "; ".join(filter(None, ("the average of the weights (model.ema)" if average else "", check)))


def _with_network_of(config: Config, content: dict[str, Any]) -> Config:
    """Return `config` with the network of the checkpoint `content`.

    Raises `ConfigError` for a custom network if `config` does not name its code.
    """
    stored = content["config"]["model"]
    source, kwargs = stored.get("source", BUILTIN), stored.get("kwargs", {})
    if source not in (BUILTIN, TIMM, CUSTOM) or not isinstance(kwargs, dict):
        raise ConfigError(f"checkpoint.path={config.checkpoint.path}: it holds a network of unknown source {source}.")
    if source == CUSTOM and config.model.target is None:
        check_named("model.target", str(stored.get("target")), ())
    network = ModelConfig(
        str(checkpoint.value(content, "config", "model", "name")),
        source=source,
        target=config.model.target or str(stored.get("target")),
        kwargs=kwargs,
        ghost_batch=1,
        zero_gamma=False,
        blurpool=bool(stored.get("blurpool")),
    )
    return dataclasses.replace(config, model=network)


def _describe(target: Path, about: dict[str, Any]) -> None:
    path = target.with_name(CARD)
    text = card(target.name, about, torchvision=is_torchvision_model(about["model"]) and not about["blurpool"])
    old_text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    write_atomic(path, [utf8(merge_cards(text, old_text, {file.name for file in target.parent.iterdir()}))])


def _check_target(target: Path, source: Path, config: Config) -> None:
    if target.suffix not in WRITERS:
        raise ConfigError(
            f"export.path={config.export.path}: the suffix selects the format. Use one of {', '.join(WRITERS)}."
        )
    if target.resolve() in {path.resolve() for path in (source, *checkpoint.listing(source.parent))}:
        raise ConfigError(f"export.path={config.export.path}: is a checkpoint of the run. Pass another file to write.")
    if target.is_dir():
        raise ConfigError(f"export.path={config.export.path}: is a folder. Pass a file to write.")
    if not target.parent.is_dir():
        raise ConfigError(f"export.path={target}: the folder {target.parent} does not exist.")
    path = target.with_name(CARD)
    if path.exists() and not _is_ours(path):
        raise ConfigError(
            f"export.path={target}: would overwrite {path}, which lars-train did not write. Choose another folder."
        )


def _is_ours(path: Path) -> bool:
    try:
        return path.is_file() and path.read_bytes().startswith(MARK.encode())
    except OSError:
        return False


def write_torch(path: Path, network: nn.Module, about: dict[str, Any]) -> str:
    """Write the state dict in float32. Return an empty string, because there is no check to report."""
    state: Any = _state(network)
    state._metadata[KEY] = json.dumps(about)
    torch.save(state, path)
    return ""


def write_safetensors(path: Path, network: nn.Module, about: dict[str, Any]) -> str:
    """Write the tensors of the state dict in float32. Return an empty string. Raises `ConfigError`."""
    _require("safetensors", ".safetensors")
    module = importlib.import_module("safetensors.torch")
    # The format has no tensors that share memory, such as those of a layer that is used twice.
    state = {name: tensor.clone() for name, tensor in _state(network).items()}
    module.save_file(state, path, metadata={"format": "pt", KEY: json.dumps(about)})
    return ""


def write_onnx(path: Path, network: nn.Module, about: dict[str, Any]) -> str:
    """Write the graph of the network in evaluation mode. Return a line for the user that says how it was checked.

    Raises `ConfigError` if a package is missing, and `DataError` if onnxruntime's logits differ from the network's.
    """
    _require("onnx", ".onnx")
    _require("onnxscript", ".onnx")
    network = network.float().eval()
    size = int(about["image_size"])
    images = torch.randn(_CHECKED, 3, size, size, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), torch.inference_mode(False):
        # The exporter warns of deprecations within torch and onnxscript.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[KEY] = json.dumps(about)
    program.save(str(path), external_data=False)
    return _compare(path, network, images)


def _compare(path: Path, network: nn.Module, images: Tensor) -> str:
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return f"not compared with the network, because onnxruntime is not installed; {_EXTRA}"
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = network(images)
    # One image at a time: the graph was traced with another batch size.
    found = torch.cat([torch.from_numpy(session.run(None, {"images": image[None].numpy()})[0]) for image in images])
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise DataError(
            f"export.path: onnxruntime's logits differ from the network's by {difference:.2g}, more than the tolerance "
            f"of {TOLERANCE:g}. No file was written. Try another version of onnxruntime or torch."
        )
    return f"onnxruntime's logits match the network's to {difference:.1g}"


WRITERS: dict[str, Callable[[Path, nn.Module, dict[str, Any]], str]] = {
    ".pth": write_torch,
    ".pt": write_torch,
    ".safetensors": write_safetensors,
    ".onnx": write_onnx,
}
"""Writers by the suffix of the file."""


def _state(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    for name, tensor in state.items():
        state[name] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
    return state


def _require(name: str, suffix: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"export.path: writing {suffix} requires the package {name}; {_EXTRA}") from None
