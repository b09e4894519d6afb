"""The keys of the config by name: their types, and which key an unknown name may stand for. No torch is imported."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any, Optional

from lars_train.config.schema import Config
from lars_train.errors import closest

GROUPS = ("batch", "recipe", "data", "model", "optimizer", "schedule", "precision")
# Words that other programs use for keys of this one.
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
_FEW = 3
TEXT = (str, Optional[str])
"""The types of keys that hold text."""


@functools.cache
def key_types() -> dict[str, Any]:
    """The type hint of every key by its dotted name; a section, such as ``run``, has its dataclass."""
    return types_within(Config)


def types_within(kind: type, prefix: str = "") -> dict[str, Any]:
    """The type hints of the dataclass `kind` and of its sections, by their dotted names behind `prefix`."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        found[f"{prefix}{name}"] = hint
        if dataclasses.is_dataclass(hint):
            found |= types_within(typing.cast(type, hint), f"{prefix}{name}.")
    return found


def is_text(key: str) -> bool:
    """Return True if the type of `key` is text, perhaps null."""
    return key_types().get(key) in TEXT


def section_keys(name: str) -> list[str]:
    """The keys of section `name` by their dotted names; none for another word."""
    hint = key_types().get(name)
    return [key for key in key_types() if key.startswith(f"{name}.")] if dataclasses.is_dataclass(hint) else []


def leaf_keys() -> list[str]:
    """Every key that has a value, by its dotted name."""
    return [key for key, hint in key_types().items() if not dataclasses.is_dataclass(hint)]


def meant_by(key: str) -> list[str]:
    """The keys, or groups, that the unknown `key` probably stands for, at most three."""
    known = [*leaf_keys(), *GROUPS]
    section, _, leaf = key.rpartition(".")
    candidates = [
        [name for name in dict.fromkeys((key, leaf)) if name in known],
        [_ALIASES[name] for name in (key, leaf) if name in _ALIASES][:1],
        [name for name in known if name.rpartition(".")[2] == leaf],
        [name for name in [None if section in key_types() else closest(key, known)] if name],
        [name for name in known if _begins(leaf, name.rpartition(".")[2])],
    ]
    # In the section that was given, a near name comes before an equal one elsewhere.
    near = closest(leaf, [name.removeprefix(f"{section}.") for name in section_keys(section)])
    if near and key not in _ALIASES:
        return [f"{section}.{near}"]
    return next((found for found in candidates if 1 <= len(found) <= _FEW), [])


def suggestion(key: str) -> str:
    """``" Did you mean 'x'?"`` for the unknown `key`, or an empty string."""
    found = meant_by(key)
    if not found and key.startswith("optimizer."):
        return f" A keyword of the base class is optimizer.kwargs.{key.removeprefix('optimizer.')}."
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""


def _begins(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return len(short) >= 3 and long.startswith(f"{short}_")
