"""Find the network in a file of weights, and the classes of its outputs.

A file may hold a plain state dict, or a checkpoint of another program with one in it. Which of its mappings is the
network, and which prefix its names have (``module.``, ``_orig_mod.``, ``model.``), is decided by the names that the
model has. `Weights.classes` are known for the exports and checkpoints that this program wrote, and for files that hold
them by one of the names in `_NAMES` beside the network, or at one of `_PLACES`. Whether the network fits a model, and
how it comes into it, is weights.py's.
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
"""The entry of a file's metadata that `export` writes: JSON with the model's name and its classes."""

HEAD = "fc."
"""What the names of the last layer's parameters begin with, in every model of the factory."""

_COMPILED = "_orig_mod."
# Where other programs keep class names, in any case: torchvision's data sets have the first, the second is its inverse;
# id2label is Hugging Face's, names is YOLO's, and OpenMMLab's is CLASSES.
_NAMES = ("class_to_idx", "idx_to_class", "classes", "class_names", "id2label", "label_map", "names")
# Mappings beside the network that hold them: OpenMMLab's (dataset_meta is of its newer files), Hugging Face's.
_PLACES = (("meta",), ("meta", "dataset"), ("meta", "dataset_meta"), ("config",))
_DEEPEST = 4  # mappings within mappings that are searched for a network
_NOT_WEIGHTS = (
    (rb"\s*<(!doctype|html|\?xml)", "it is a web page, which a download saved in place of the weights; get it again"),
    (rb"version https://git-lfs", "it is a pointer of Git LFS, and not the file itself; run `git lfs pull`"),
)


@dataclass(frozen=True)
class Weights:
    """The network in a file."""

    origin: str
    """Where it comes from, as messages name it: ``model.weights=net.pth``."""
    state: Mapping[str, Tensor]
    """Its tensors by the model's own names; whether they fit, `load_state` finds out."""
    classes: tuple[str, ...] | None = None
    """The class of each output, where the file says so."""
    model: str | None = None
    """The name of its model, where the file says so."""
    notes: tuple[str, ...] = ()
    """What the user should know of how it was read."""

    @property
    def outputs(self) -> int:
        """Outputs of its last layer; 0 where it has none."""
        head = self.state.get(f"{HEAD}weight")
        return len(head) if isinstance(head, Tensor) and head.ndim else 0


def read_weights(path: str | os.PathLike[str], wanted: Collection[str]) -> Weights:
    """The network of the file `path` that has the most of the names `wanted`. Raises `ConfigError`."""
    origin = f"model.weights={path}"
    content, about = _read(path, origin)
    # Of each mapping with tensors and each prefix of their names: how many of the model's names they have.
    found = [
        (sum(prefix + key in tensors for key in wanted), where, prefix, tensors)
        for where, tensors in _mappings(content)
        for prefix in _prefixes(tensors, next(iter(wanted)))
    ]
    most = max((count for count, *_ in found), default=-1)
    if most < 0:
        raise ConfigError(
            f"{origin}: holds no state dict (names to tensors), by itself or within it; save it with "
            "torch.save(model.state_dict(), path)."
        )
    best = [entry for entry in found if entry[0] == most] if most else found[:1]
    plain = [entry for entry in best if "ema" not in _place(*entry[1:3]).lower()] or best
    if len(plain) > 1:
        places = ", ".join(_place(where, prefix) for _, where, prefix, _ in plain)
        raise ConfigError(f"{origin}: holds more than one network ({places}); save the one that you mean alone.")
    _, where, prefix, tensors = plain[0]
    notes = []
    if len(best) > 1:
        places = ", ".join(_place(*entry[1:3]) for entry in best)
        notes.append(f"{origin}: of {places}, {_place(where, prefix)} is used; save another one alone to take it.")
    beside = [key for key in tensors if not key.startswith(prefix)]
    if beside:
        notes.append(
            f"{origin}: not used, beside the network {prefix}: {counted(len(beside), 'tensor')}: {few(beside)}."
        )
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    _refuse_clashes(origin, _path(content, where)[-1], prefix)
    about = about or _about(content, where)
    model = about.get("model")
    weights = Weights(origin, state, model=model if isinstance(model, str) else None)
    classes, unused = _classes(_named(about), weights.outputs)
    notes += [f"{origin}: its entry {key} is not used: {why}." for key, why in unused]
    return replace(weights, classes=classes, notes=tuple(notes))


def _refuse_clashes(origin: str, mapping: Mapping[Any, Any], prefix: str) -> None:
    """Raise `ConfigError` for different tensors of the network whose names become one."""
    first: dict[str, str] = {}
    clashes = []
    for key, value in mapping.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or not _short(key).startswith(prefix):
            continue
        other = first.setdefault(_short(key), key)
        if other != key and not (mapping[other].dtype == value.dtype and torch.equal(mapping[other], value)):
            clashes.append(f"{other} and {key}")
    if clashes:
        raise ConfigError(
            f"{origin}: {counted(len(clashes), 'tensor')} of the network twice, with other values: {few(clashes)}; "
            "save the network that you mean alone."
        )


def _classes(about: Mapping[str, Any], outputs: int) -> tuple[tuple[str, ...] | None, list[tuple[str, str]]]:
    """The class of each output by the first entry of `about` that names them; and the other entries, each with why."""
    used, chosen, unused = None, "", []
    for key, value in about.items():
        names = _names(value)
        if value is None or not outputs:
            continue
        if names is None:
            why = "it is no list of the names of class 0, 1, ..."
        elif len(names) != outputs:
            why = f"{counted(len(names), 'name')} for {counted(outputs, 'output')}"
        elif len(set(names)) < len(names):
            why = "a name is in it twice"
        elif used is not None and names != used:
            why = f"it differs from {chosen}"
        else:
            used, chosen = names, chosen or key
            continue
        unused.append((key, why))
    return used, unused


def _names(value: object) -> tuple[str, ...] | None:
    """The name of class 0, 1, ... in a list of them, or a mapping from or to their numbers; None for anything else."""
    if isinstance(value, Mapping):
        by_index = {}
        for key, other in value.items():
            index, name = (other, key) if type(other) is int else (key, other)
            # JSON has no other keys than text.
            by_index[int(index) if isinstance(index, str) and re.fullmatch(r"[0-9]{1,9}", index) else index] = name
        value = [by_index.get(index) for index in range(len(value))]
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return None
    return tuple(value)


def _read(path: str | os.PathLike[str], origin: str) -> tuple[Any, dict[str, Any]]:
    """What the file holds, and what safetensors' metadata say of it."""
    name = os.fspath(path)
    if name.endswith(".onnx"):
        raise ConfigError(f"{origin}: a graph is not read; give the .pth or .safetensors of its network.")
    if Path(name).is_dir():
        raise ConfigError(
            f"{origin}: it is a folder; give a file, such as best.pt in a run's checkpoints/. To evaluate a run or to "
            "go on from it: checkpoint.path."
        )
    try:
        with Path(name).open("rb") as file:
            begin = file.read(512)
        if not begin:
            raise ConfigError(f"{origin}: the file is empty; get it again.")
        for pattern, reason in _NOT_WEIGHTS:
            if re.match(pattern, begin, re.IGNORECASE):
                raise ConfigError(f"{origin}: {reason}.")
        if name.endswith(".safetensors"):
            return _read_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True), {}
    except ConfigError:
        raise
    except ImportError:
        raise ConfigError(f"{origin}: this needs the package safetensors: pip install 'lars-train[export]'.") from None
    except OSError as error:
        raise ConfigError(f"{origin}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # a damaged pickle can raise anything: KeyError, UnicodeDecodeError, struct.error
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused or "TorchScript" in str(error):
            what = refused[1] if refused else "a TorchScript program"
            raise ConfigError(
                f"{origin}: beside tensors it holds {what}, and only plain values and tensors are loaded, so that no "
                "code in a file can run. If you trust it, load it in Python (torch.load with weights_only=False, or "
                "torch.jit.load) and save its state_dict() alone with torch.save."
            ) from None
        raise ConfigError(
            f"{origin}: not a file of plain tensors that torch.save (or safetensors) wrote, or damaged "
            f"({type(error).__name__}); get it again, or save it with torch.save(model.state_dict(), path)."
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


def _about(content: Any, where: tuple[str, ...]) -> dict[str, Any]:
    """What the file says of the network at `where`: its ``model``, and what may be its classes, by the entry's name."""
    *outer, inner = _path(content, where)
    metadata = getattr(inner, "_metadata", None)
    if isinstance(metadata, Mapping) and (about := _json(metadata.get(KEY))):
        return about
    around = outer[-1] if outer else {}
    parameters = _within(around, ["hyper_parameters"])  # Lightning's
    # A setting called classes in a config must not hide the names that the file itself has.
    places = [inner, parameters, *reversed(outer), *(_within(around, keys) for keys in _PLACES)]
    names = next(filter(None, map(_named, places)), {})
    if where != ("model",) or "format" not in around:
        return {"model": around.get("arch"), **names}
    config = around.get("config")
    model = config.get("model") if isinstance(config, Mapping) else None
    return {"model": model.get("name") if isinstance(model, Mapping) else None, **names}


def _named(place: Mapping[Any, Any]) -> dict[str, Any]:
    """What may be class names in `place`, in the order of `_NAMES`."""
    found = [key for key in place if isinstance(key, str) and key.lower() in _NAMES]
    return {key: place[key] for key in sorted(found, key=lambda key: _NAMES.index(key.lower()))}


def _within(place: Any, keys: Sequence[str]) -> Mapping[Any, Any]:
    """The mapping at `keys` in `place`; empty where there is none."""
    for key in keys:
        place = place.get(key) if isinstance(place, Mapping) else None
    return place if isinstance(place, Mapping) else {}


def _path(content: Any, where: tuple[str, ...]) -> list[Mapping[Any, Any]]:
    """The mapping at `where`, and before it those around it from the file's own on."""
    found = [content]
    for key in where:
        found.append(found[-1][key])
    return found


def _mappings(value: object, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every mapping with tensors in `value`, with the keys that lead to it."""
    if not isinstance(value, Mapping) or len(where) > _DEEPEST:
        return
    tensors = {_short(key): item for key, item in value.items() if isinstance(key, str) and isinstance(item, Tensor)}
    if tensors:
        yield where, tensors
    for key, item in value.items():
        if isinstance(key, str):
            yield from _mappings(item, (*where, key))


def _short(key: str) -> str:
    return key.replace(_COMPILED, "")


def _prefixes(tensors: Mapping[str, Tensor], first: str) -> list[str]:
    """What may stand before the model's names: what stands before its `first` one, or nothing."""
    ends = (key.removesuffix(first) for key in tensors if key.endswith(f".{first}"))
    return list(dict.fromkeys(["", *ends]))


def _place(where: Sequence[str], prefix: str) -> str:
    return ".".join((*where, prefix.rstrip("."))).strip(".") or "the file itself"


def few(names: Sequence[str], most: int = 3) -> str:
    """The first of `names`, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
