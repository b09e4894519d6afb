"""Check that weights fit a model, match their classes, and load them. Compute the hash of a model's weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lars_train.errors import ConfigError
from lars_train.messages import counted
from lars_train.models.blurpool import has_blurpool
from lars_train.models.convert import find_head, head_layer
from lars_train.models.factory import build_model, model_names
from lars_train.models.weight_files import HEAD, Weights, few, read_weights


def weights_sha256(network: nn.Module, rounded_to: torch.dtype | None = None) -> str:
    """Return the SHA-256, in hex, of the names and bytes (C order) of all parameters and buffers.

    Tensors are hashed in bytewise order of their names. `rounded_to`: round floating-point values to this dtype first.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        if rounded_to is not None and tensor.is_floating_point():
            tensor = tensor.to(rounded_to)
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    new_head: bool = False,
) -> tuple[str, ...]:
    """Load the network in the file `path` into `model`, in place, and return messages for the user.

    The file must hold exactly the model's parameters and buffers, by name and shape. Only the counters
    ``num_batches_tracked`` may be missing, as in old files. No code in the file is run.

    Args:
        name: the model's name. A file that names another model is rejected.
        classes: the class of each output of `model`. If the file names the same classes in another order, the rows of
            the last layer are reordered; if it names other classes, it is rejected.
        new_head: keep the last layer of `model`, and ignore that of the file.

    Raises:
        ConfigError: the file is missing, holds no network, does not fit the model, or has non-finite values; or only
            one of file and model has blurpool.
    """
    head = head_prefix(model)
    weights = read_weights(path, model.state_dict(), head)
    check_name(weights, name)
    check_blurpool(weights, model)
    check_finite(weights)
    notes = list(weights.notes)
    if new_head:
        own = {key: value for key, value in model.state_dict().items() if key.startswith(head)}
        kept = {key: value for key, value in weights.state.items() if not key.startswith(head)}
        load_state(model, {**kept, **own}, weights.origin)
        return (
            *notes,
            f"{weights.origin}: used for all layers but the last, which is newly initialized (model.new_head=true).",
        )
    known, classes = weights.classes, tuple(classes or ())
    if known and classes:
        _check_same_classes(weights.origin, known, classes)
    load_state(model, weights.state, weights.origin)
    if known and classes and known != classes:
        keep_outputs(model, [known.index(label) for label in classes], len(classes))
        notes.append(f"{weights.origin}: the outputs are reordered to match the data set's classes by name.")
    return tuple(notes)


def check_name(weights: Weights, name: str | None) -> None:
    """Raise `ConfigError` if the file names another of this program's models."""
    # The shapes do not suffice: those of tiny and small are equal.
    if name is not None and weights.model in model_names() and weights.model != name:
        raise ConfigError(
            f"{weights.origin}: the weights are for model {weights.model}, not {name}; choose model={weights.model}."
        )


def check_blurpool(weights: Weights, model: nn.Module) -> None:
    """Raise `ConfigError` if the file states that its network has blurpool and `model` has not, or the reverse."""
    # The names and shapes of the tensors are the same.
    if weights.blurpool not in (None, has_blurpool(model)):
        value = str(weights.blurpool).lower()
        raise ConfigError(
            f"{weights.origin}: the weights are for a network with model.blurpool={value}; any other value gives "
            f"wrong results. Set model.blurpool={value}."
        )


def _check_same_classes(origin: str, known: Sequence[str], classes: Sequence[str]) -> None:
    sides = (("in the file", known, set(classes)), ("in the data set", classes, set(known)))
    only_in = [(side, [label for label in names if label not in others]) for side, names, others in sides]
    differences = "; ".join(f"only {side}: {few(names)}" for side, names in only_in if names)
    if differences:
        raise ConfigError(
            f"{origin}: the file's {len(known):,} classes are not the data set's {len(classes):,} ({differences}). If "
            "only the names differ, rename the folders. If the outputs are in the order of the data set's classes, "
            "save the network without class names. Otherwise set model.new_head=true, which starts a new last layer."
        )


def head_prefix(model: nn.Module) -> str:
    """Return the prefix of the last layer's parameter names, such as ``fc.``.

    If the model has no last layer, return ``-.``, with which no name begins.
    """
    return f"{find_head(model) or '-'}."


def keep_outputs(model: nn.Module, rows: Sequence[int], outputs: int) -> None:
    """Keep only the outputs `rows` of the last layer of `model`, in this order. `outputs`: its current number.

    Raises `ConfigError` if the last layer is not known.
    """
    if list(rows) == list(range(outputs)):
        return
    head = head_layer(model, outputs, "selecting or reordering outputs")
    index = torch.tensor(list(rows))
    for name, value in list(head.named_parameters()):
        setattr(head, name, nn.Parameter(value.detach()[index]))
    setattr(head, "out_features" if isinstance(head, nn.Linear) else "out_channels", len(index))


def load_state(model: nn.Module, loaded: Mapping[str, Any], origin: str) -> None:
    """Load the state dict `loaded` into `model`, in place. See `load_weights` for the required content.

    Raises `ConfigError` if it does not fit; the message names its `origin`.
    """
    expected, head = model.state_dict(), head_prefix(model)
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()):
        raise ConfigError(
            f"{origin}: it is not a plain state dict (a mapping of names to tensors); save one with "
            "torch.save(model.state_dict(), path)."
        )
    both = [key for key in expected if key in loaded]
    faults = {
        "missing": [key for key in expected if key not in loaded and not key.endswith("num_batches_tracked")],
        "not in the model": [key for key in loaded if key not in expected],
        "of a different shape": [
            f"{key} {tuple(loaded[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in both
            if loaded[key].shape != expected[key].shape
        ],
        "of a different kind": [
            f"{key} {loaded[key].dtype}"
            for key in both
            if loaded[key].is_floating_point() != expected[key].is_floating_point()
        ],
    }
    found = [f"{len(names)} {fault}: {few(names)}" for fault, names in faults.items() if names]
    if found and all(name.startswith(head) for names in faults.values() for name in names):
        theirs, mine = loaded.get(f"{head}weight"), len(expected[f"{head}weight"])
        outputs = "no last layer" if theirs is None else f"a last layer of {len(theirs):,} outputs"
        raise ConfigError(
            f"{origin}: the network has {outputs}, but the data set has {mine:,} classes ({'; '.join(found)}). Set "
            "model.new_head=true to start a new last layer and take all others from the file."
        )
    if found:
        other = _model_of(loaded)
        unknown = "Check model.name or model.target, and how the file was saved"
        remedy = unknown if other is None else f"It fits model={other}"
        raise ConfigError(f"{origin}: the weights do not fit the model: {'; '.join(found)}. {remedy}.")
    model.load_state_dict(loaded, strict=False)


def check_finite(weights: Weights) -> None:
    """Raise `ConfigError` if a tensor has non-finite values."""
    # A state dict has no checksum, so non-finite values are the only sign of damaged bytes.
    floats = {key: value for key, value in weights.state.items() if value.is_floating_point()}
    faulty = [key for key, value in floats.items() if not value.float().isfinite().all()]
    if faulty:
        raise ConfigError(
            f"{weights.origin}: {counted(len(faulty), 'tensor')} with non-finite values: {few(faulty)}. The file is "
            "damaged, or from a run that diverged."
        )


def _model_of(state: Mapping[str, Tensor]) -> str | None:
    """Return the first of this program's models that `state` fits, apart from the last layer, or None."""
    shapes = {key: value.shape for key, value in state.items() if _is_compared(key)}
    if not all(value.is_floating_point() for key, value in state.items() if key in shapes):
        return None
    for name in model_names():
        with torch.device("meta"):
            model = build_model(name, num_classes=1, ghost_batch=1, zero_gamma=False)
        if shapes == {key: value.shape for key, value in model.state_dict().items() if _is_compared(key)}:
            return name
    return None


def _is_compared(key: str) -> bool:
    return not key.startswith(HEAD) and not key.endswith("num_batches_tracked")
