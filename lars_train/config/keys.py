"""Look up the types of config keys, and suggest keys for unknown names. This module does not import torch."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any, Optional

from lars_train.config.schema import Config
from lars_train.errors import closest

GROUPS = ("batch", "recipe", "data", "model", "optimizer", "schedule", "precision")
# Names that other programs use, and the equivalent keys here.
_ALIASES = {
    "amp": "precision",
    "arch": "model",
    "ckpt": "checkpoint.path",
    "data.path": "data.root",
    "data_dir": "data.root",
    "data_path": "data.root",
    "dataset": "data",
    "decay": "optimizer.weight_decay",
    "devices": "launch.nproc",
    "dtype": "precision",
    "eval_every": "evaluate.every_epochs",
    "gpus": "launch.nproc",
    "iterations": "max_updates",
    "log_interval": "log_every",
    "max_steps": "max_updates",
    "model.path": "model.weights",
    "ngpus": "launch.nproc",
    "nnodes": "launch.nodes",
    "nproc_per_node": "launch.nproc",
    "num_gpus": "launch.nproc",
    "num_workers": "data.workers",
    "output": "run.dir",
    "output_dir": "run.dir",
    "pretrained": "model.weights",
    "resume_from": "checkpoint.path",
    "save_every": "checkpoint.every_updates",
    "warmup": "schedule.warmup_epochs",
    "wd": "optimizer.weight_decay",
    "world_size": "launch.nproc",
}
_MOST_SUGGESTIONS = 3
TEXT = (str, Optional[str])
"""The type hints of keys that hold text."""


@functools.cache
def key_types() -> dict[str, Any]:
    """Return the type hint of every key by its dotted name. The hint of a section, such as ``run``, is a dataclass."""
    return types_within(Config)


def types_within(kind: type, prefix: str = "") -> dict[str, Any]:
    """Return the type hints of the fields of dataclass `kind` and of its sections, by dotted name with `prefix`."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        found[f"{prefix}{name}"] = hint
        if dataclasses.is_dataclass(hint):
            found |= types_within(typing.cast(type, hint), f"{prefix}{name}.")
    return found


def is_text(key: str) -> bool:
    """Return True if the type of `key` is text, with or without null."""
    return key_types().get(key) in TEXT


def section_keys(name: str) -> list[str]:
    """Return the dotted names of the keys in section `name`, or an empty list if there is no such section."""
    hint = key_types().get(name)
    return [key for key in key_types() if key.startswith(f"{name}.")] if dataclasses.is_dataclass(hint) else []


def leaf_keys() -> list[str]:
    """Return the dotted name of every key that has a value."""
    return [key for key, hint in key_types().items() if not dataclasses.is_dataclass(hint)]


def probable_keys(key: str) -> list[str]:
    """Return at most three keys or groups that the user probably meant by the unknown `key`."""
    known = [*leaf_keys(), *GROUPS]
    section, _, leaf = key.rpartition(".")
    candidates = [
        [name for name in dict.fromkeys((key, leaf)) if name in known],
        [_ALIASES[name] for name in (key, leaf) if name in _ALIASES][:1],
        [name for name in known if name.rpartition(".")[2] == leaf],
        [name for name in [None if section in key_types() else closest(key, known)] if name],
        [name for name in known if _one_extends_other(leaf, name.rpartition(".")[2])],
    ]
    # A similar name in the given section has priority over the same name in another section.
    near = closest(leaf, [name.removeprefix(f"{section}.") for name in section_keys(section)])
    if near and key not in _ALIASES:
        return [f"{section}.{near}"]
    return next((found for found in candidates if 1 <= len(found) <= _MOST_SUGGESTIONS), [])


def suggestion(key: str) -> str:
    """Return ``" Did you mean 'x'?"`` for the unknown `key`, or an empty string."""
    found = probable_keys(key)
    if not found and key.startswith("optimizer."):
        return f" To pass it to the base class: optimizer.kwargs.{key.removeprefix('optimizer.')}."
    if not found and key.startswith("model."):
        return f" To pass it to a timm network or your own: model.kwargs.{key.removeprefix('model.')}."
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""


def _one_extends_other(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return len(short) >= 3 and long.startswith(f"{short}_")
