"""Find the network in a weights file, and the classes of its outputs.

A file may hold a plain state dict, or another program's checkpoint that contains one. The names of the model's tensors
show which mapping in the file is the network, and which prefix its names have (``module.``, ``_orig_mod.``,
``model.``). Exports and checkpoints of this program contain the classes. Other files may have them under one of
`_CLASS_KEYS`, beside the network or at one of `_CLASS_PLACES`. `weights` checks that the network fits a model, and
loads it.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lars_train.errors import ConfigError
from lars_train.messages import counted

KEY = "lars_train"
"""The metadata entry that `export` writes: JSON with the model's name, its classes, and whether it has blurpool."""

HEAD = "fc."
"""The prefix of the last layer's parameter names in every model of the factory: the default of `head` below."""

_COMPILED = "_orig_mod."
# Keys of class names in files of other programs, in upper or lower case. The first is from torchvision's data sets, and
# the second is its inverse; id2label is Hugging Face's, names is YOLO's, CLASSES is OpenMMLab's.
_CLASS_KEYS = ("class_to_idx", "idx_to_class", "classes", "class_names", "id2label", "label_map", "names")
# Mappings beside the network that hold class names: OpenMMLab's (dataset_meta in newer files), Hugging Face's.
_CLASS_PLACES = (("meta",), ("meta", "dataset"), ("meta", "dataset_meta"), ("config",))
_MAX_DEPTH = 4  # levels of nested mappings in which to look for a network
_NOT_WEIGHTS = (
    (rb"\s*<(!doctype|html|\?xml)", "it is a web page, not the weights; download them again"),
    (rb"version https://git-lfs", "it is a Git LFS pointer, not the file itself; run `git lfs pull`"),
)


@dataclass(frozen=True)
class Weights:
    """The network in a file."""

    origin: str
    """The source, as messages name it: ``model.weights=net.pth``."""
    state: Mapping[str, Tensor]
    """The tensors by their names in the model. `load_state` checks that they fit."""
    classes: tuple[str, ...] | None = None
    """The class of each output, if the file has them."""
    model: str | None = None
    """The name of the model, if the file has it."""
    blurpool: bool | None = None
    """The value of ``model.blurpool`` for the model; None if the file does not state it."""
    notes: tuple[str, ...] = ()
    """Messages for the user about how the file was read."""
    head: str = HEAD
    """The prefix of the last layer's parameter names."""

    @property
    def outputs(self) -> int:
        """The number of outputs: of the last layer, or else the number of classes; 0 if neither is known."""
        head = self.state.get(f"{self.head}weight")
        return len(head) if isinstance(head, Tensor) and head.ndim else len(self.classes or ())


def read_weights(path: str | os.PathLike[str], names: Collection[str], head: str = HEAD) -> Weights:
    """Return the network in the file `path` that has the most tensors with these `names`. Raises `ConfigError`.

    `head`: the prefix of the last layer's names.
    """
    origin = f"model.weights={path}"
    content, about = _read(path, origin)
    # For each mapping with tensors and each prefix of their names: the number of `names` that match.
    found = [
        (sum(prefix + key in tensors for key in names), where, prefix, tensors)
        for where, tensors in _mappings(content)
        for prefix in _prefixes(tensors, next(iter(names)))
    ]
    most = max((count for count, *_ in found), default=-1)
    if most < 0:
        raise ConfigError(
            f"{origin}: the file holds no state dict (a mapping of names to tensors); save one with "
            "torch.save(model.state_dict(), path)."
        )
    best = [entry for entry in found if entry[0] == most] if most else found[:1]
    plain = [entry for entry in best if "ema" not in _location(*entry[1:3]).lower()] or best
    if len(plain) > 1:
        places = ", ".join(_location(where, prefix) for _, where, prefix, _ in plain)
        raise ConfigError(f"{origin}: the file holds more than one network ({places}); save only the one to use.")
    _, where, prefix, tensors = plain[0]
    notes = []
    if len(best) > 1:
        places = ", ".join(_location(*entry[1:3]) for entry in best)
        notes.append(
            f"{origin}: the file holds {places}; {_location(where, prefix)} is used. To use another, save it alone."
        )
    unused_tensors = [key for key in tensors if not key.startswith(prefix)]
    if unused_tensors:
        notes.append(
            f"{origin}: not used: {counted(len(unused_tensors), 'tensor')} whose names do not begin with {prefix!r}: "
            f"{few(unused_tensors)}."
        )
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    _check_clashes(origin, _mappings_to(content, where)[-1], prefix)
    about = about or _description(content, where)
    model = about.get("model")
    blurpool = about.get("blurpool")
    weights = Weights(
        origin,
        state,
        model=model if isinstance(model, str) else None,
        blurpool=blurpool if isinstance(blurpool, bool) else None,
        head=head,
    )
    classes, unused = _classes(_class_entries(about), weights.outputs)
    notes += [f"{origin}: the entry {key} is not used: {why}." for key, why in unused]
    return replace(weights, classes=classes, notes=tuple(notes))


def _check_clashes(origin: str, mapping: Mapping[Any, Any], prefix: str) -> None:
    """Raise `ConfigError` if two tensors of the network differ, but their names differ only in `_COMPILED`."""
    first: dict[str, str] = {}
    clashes = []
    for key, value in mapping.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or not _plain_name(key).startswith(prefix):
            continue
        other = first.setdefault(_plain_name(key), key)
        if other != key and not (mapping[other].dtype == value.dtype and torch.equal(mapping[other], value)):
            clashes.append(f"{other} and {key}")
    if clashes:
        raise ConfigError(
            f"{origin}: the network has {counted(len(clashes), 'tensor')} twice, with different values: "
            f"{few(clashes)}; save only the network to use."
        )


def _classes(about: Mapping[str, Any], outputs: int) -> tuple[tuple[str, ...] | None, list[tuple[str, str]]]:
    """Return the class of each output, from the first valid entry of `about`, and the unused entries with reasons."""
    used, chosen, unused = None, "", []
    for key, value in about.items():
        names = _names(value)
        if value is None or not outputs:
            continue
        if names is None:
            why = "it is not a list of the names of class 0, 1, ..."
        elif len(names) != outputs:
            why = f"{counted(len(names), 'name')} for {counted(outputs, 'output')}"
        elif len(set(names)) < len(names):
            why = "a name occurs twice"
        elif used is not None and names != used:
            why = f"it differs from {chosen}"
        else:
            used, chosen = names, chosen or key
            continue
        unused.append((key, why))
    return used, unused


def _names(value: object) -> tuple[str, ...] | None:
    """Return the names of class 0, 1, ...; None if `value` is neither a list nor a mapping from or to class numbers."""
    if isinstance(value, Mapping):
        by_index = {}
        for key, other in value.items():
            index, name = (other, key) if type(other) is int else (key, other)
            # JSON keys are always text.
            by_index[int(index) if isinstance(index, str) and re.fullmatch(r"[0-9]{1,9}", index) else index] = name
        value = [by_index.get(index) for index in range(len(value))]
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return None
    return tuple(value)


def _read(path: str | os.PathLike[str], origin: str) -> tuple[Any, dict[str, Any]]:
    """Return the file's content, and its metadata about the network, which is empty unless the file is safetensors."""
    name = os.fspath(path)
    if name.endswith(".onnx"):
        raise ConfigError(f"{origin}: ONNX graphs are not supported; give the network's .pth or .safetensors file.")
    if Path(name).is_dir():
        raise ConfigError(
            f"{origin}: it is a folder; give a file, such as best.pt in a run's checkpoints/. To evaluate or resume a "
            "run, set checkpoint.path."
        )
    try:
        with Path(name).open("rb") as file:
            begin = file.read(512)
        if not begin:
            raise ConfigError(f"{origin}: the file is empty; download or save it again.")
        for pattern, reason in _NOT_WEIGHTS:
            if re.match(pattern, begin, re.IGNORECASE):
                raise ConfigError(f"{origin}: {reason}.")
        if name.endswith(".safetensors"):
            return _read_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True), {}
    except ConfigError:
        raise
    except ImportError:
        raise ConfigError(f"{origin}: the package safetensors is not installed; pip install safetensors.") from None
    except OSError as error:
        raise ConfigError(f"{origin}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # a damaged pickle can raise anything: KeyError, UnicodeDecodeError, struct.error
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused or "TorchScript" in str(error):
            what = refused[1] if refused else "a TorchScript program"
            raise ConfigError(
                f"{origin}: the file holds {what}. Only plain values and tensors are loaded, so that no code in a file "
                "can run. If you trust the file, load it in Python (torch.load with weights_only=False, or "
                "torch.jit.load) and save its state_dict() alone with torch.save."
            ) from None
        raise ConfigError(
            f"{origin}: the file is damaged, or neither torch.save nor safetensors wrote it ({type(error).__name__}); "
            "download it again, or save it with torch.save(model.state_dict(), path)."
        ) from error


def _read_safetensors(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    package = importlib.import_module("safetensors")
    with package.safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, _json((file.metadata() or {}).get(KEY))


def _json(text: object) -> dict[str, Any]:
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def _description(content: Any, where: tuple[str, ...]) -> dict[str, Any]:
    """Return entries that describe the network at `where`: ``model`` (its name), ``blurpool``, possible class names.

    Class names keep their key in the file.
    """
    *outer, inner = _mappings_to(content, where)
    metadata = getattr(inner, "_metadata", None)
    if isinstance(metadata, Mapping) and (about := _json(metadata.get(KEY))):
        return about
    around = outer[-1] if outer else {}
    parameters = _mapping_at(around, ["hyper_parameters"])  # Lightning's
    # The file's own entries come first: a setting named "classes" in a config must not hide them.
    places = [inner, parameters, *reversed(outer), *(_mapping_at(around, keys) for keys in _CLASS_PLACES)]
    names = next(filter(None, map(_class_entries, places)), {})
    if where != ("model",) or "format" not in around:
        return {"model": around.get("arch"), **names}
    config = around.get("config")
    model = _mapping_at(config, ["model"])
    return {"model": model.get("name"), "blurpool": bool(model.get("blurpool")), **names}


def _class_entries(place: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the entries of `place` that may be class names, in the order of `_CLASS_KEYS`."""
    found = [key for key in place if isinstance(key, str) and key.lower() in _CLASS_KEYS]
    return {key: place[key] for key in sorted(found, key=lambda key: _CLASS_KEYS.index(key.lower()))}


def _mapping_at(place: Any, keys: Sequence[str]) -> Mapping[Any, Any]:
    """Return the mapping at `keys` in `place`; empty if there is none."""
    for key in keys:
        place = place.get(key) if isinstance(place, Mapping) else None
    return place if isinstance(place, Mapping) else {}


def _mappings_to(content: Any, where: tuple[str, ...]) -> list[Mapping[Any, Any]]:
    """Return the mappings along the path from the whole file to `where`, including both ends."""
    found = [content]
    for key in where:
        found.append(found[-1][key])
    return found


def _mappings(value: object, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield every mapping with tensors in `value` as a pair: the keys that lead to it, and its tensors."""
    if not isinstance(value, Mapping) or len(where) > _MAX_DEPTH:
        return
    tensors = {
        _plain_name(key): item for key, item in value.items() if isinstance(key, str) and isinstance(item, Tensor)
    }
    if tensors:
        yield where, tensors
    for key, item in value.items():
        if isinstance(key, str):
            yield from _mappings(item, (*where, key))


def _plain_name(key: str) -> str:
    return key.replace(_COMPILED, "")


def _prefixes(tensors: Mapping[str, Tensor], first: str) -> list[str]:
    """Return the possible prefixes of the model's names: the empty one, and each that precedes the name `first`."""
    ends = (key.removesuffix(first) for key in tensors if key.endswith(f".{first}"))
    return list(dict.fromkeys(["", *ends]))


def _location(where: Sequence[str], prefix: str) -> str:
    return ".".join((*where, prefix.rstrip("."))).strip(".") or "the file itself"


def few(names: Sequence[str], most: int = 3) -> str:
    """Join the first `most` of `names` for a message, followed by ``...`` if there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
