"""A network written as torch's weights, safetensors or ONNX, with its origin inside. Libraries come in when needed.

- ``.pth``, ``.pt``: a plain state dict that torchvision's model of that name loads; the origin is JSON in the dict's
  ``_metadata["lars_train"]``, an attribute that torch saves with it and no module reads.
- ``.safetensors``: the same tensors; the origin is JSON under ``lars_train`` in the file's metadata.
- ``.onnx``: the graph from normalised float32 images (n, 3, S, S) to logits (n, classes), any n; the origin is JSON in
  the metadata property ``lars_train``.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lars_train.errors import ConfigError, DataError

KEY = "lars_train"
TOLERANCE = 1e-4
"""How far the graph's logits may be from the network's, relative to the largest of them and at least absolutely."""

_EXTRA = "install it with: pip install 'lars-train[export]'"
_CHECKED = 2  # images that the two are compared on


def write_torch(path: Path, network: nn.Module, about: dict[str, Any]) -> str:
    """Write the state dict in float32; a line for the user (empty)."""
    state: Any = _state(network)
    state._metadata[KEY] = json.dumps(about)
    torch.save(state, path)
    return ""


def write_safetensors(path: Path, network: nn.Module, about: dict[str, Any]) -> str:
    """Write the tensors of the state dict in float32; a line for the user (empty). Raises `ConfigError`."""
    _need("safetensors", ".safetensors")
    module = importlib.import_module("safetensors.torch")
    module.save_file(dict(_state(network)), path, metadata={"format": "pt", KEY: json.dumps(about)})
    return ""


def write_onnx(path: Path, network: nn.Module, about: dict[str, Any]) -> str:
    """Write the graph of the network in evaluation; how it was checked, for the user.

    Raises `ConfigError` without the libraries, `DataError` if onnxruntime's logits are not the network's.
    """
    _need("onnx", ".onnx")
    _need("onnxscript", ".onnx")
    network = network.float().eval()
    size = int(about["image_size"])
    images = torch.randn(_CHECKED, 3, size, size, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), torch.inference_mode(False):
        # The exporter's own, of deprecations within torch and onnxscript.
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
    return _compared(path, network, images)


def _compared(path: Path, network: nn.Module, images: Tensor) -> str:
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return f"not compared with the network, for onnxruntime is not there: {_EXTRA}"
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = network(images)
    # Another number of images than the graph was made with.
    found = torch.cat([torch.from_numpy(session.run(None, {"images": image[None].numpy()})[0]) for image in images])
    apart = float((found - expected).abs().max())
    if not apart <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise DataError(
            f"export.path: onnxruntime's logits are {apart:.2g} away from the network's, more than {TOLERANCE:g} "
            "allows; nothing was written. Another version of onnxruntime or torch may do better."
        )
    return f"onnxruntime's logits are the network's to {apart:.1g}"


WRITERS: dict[str, Callable[[Path, nn.Module, dict[str, Any]], str]] = {
    ".pth": write_torch,
    ".pt": write_torch,
    ".safetensors": write_safetensors,
    ".onnx": write_onnx,
}
"""By the suffix of the file."""


def _state(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    for name, tensor in state.items():
        state[name] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
    return state


def _need(name: str, suffix: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"export.path: a file of {suffix} wants the package {name}; {_EXTRA}") from None
