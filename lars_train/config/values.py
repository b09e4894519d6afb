"""Derive plain values from a config: its leaves, its hash, its settings, absolute paths."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
from typing import Any, Optional, TypeVar

from lars_train.config.schema import Config
from lars_train.fsutil import user_path
from lars_train.messages import is_url

_T = TypeVar("_T")

# Keys that determine where and how a run is executed, but not its result. The run's hash excludes them, so that the
# same experiment finds its directory on other hardware and with other logging.
EXECUTION_KEYS = (
    "mode",
    "max_updates",
    "micro_batch",
    "channels_last",
    "compile",
    "cuda_graphs",
    "device",
    "resume",
    "log_every",
    "verbosity",
    "run",
    "launch",
    "distributed",
    "checkpoint.every_updates",
    "checkpoint.every_minutes",
    "checkpoint.keep",
    # The guard acts only if a run would otherwise be lost, and it records each of its actions.
    "guard",
    "evaluate.report",
    "evaluate.outputs",
    "evaluate.ema",
    "log",
    "export",
    "plan",
    "check",
    "data.workers",
    # Pixels differ between decoders by at most one level, which matters less than the arithmetic of another device.
    "data.decoder",
    "data.cache_dir",
    "data.cache_gb",
    # These decide when a run with damaged images ends, but do not change its result up to that point.
    "data.on_error",
    "data.max_bad",
    # The hash includes the options that the preset fills in.
    "optimizer.preset",
    "recipe.rows",
    "recipe.common",
    "recipe.source",
)

# Keys that the first version did not have, each with the value that keeps the behavior of that version. The hash omits
# a key with this value, so the same command finds a run of an older version.
LATER_KEYS: dict[str, Any] = {
    "loss": "cross_entropy",
    "bce_threshold": None,
    "cuda_graphs": False,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "augment.auto": "none",
    "augment.randaugment_ops": None,
    "augment.randaugment_magnitude": None,
    "evaluate.flip": False,
    "model.source": "builtin",
    "model.target": None,
    "model.kwargs": {},
    "model.head_lr": None,
    "model.freeze": [],
    "model.blurpool": False,
    "model.ema": None,
    "model.ema_start": 0,
    "optimizer.clip_grad_norm": None,
    "data.train_size": None,
    "data.eval_size": None,
    "data.size_schedule": None,
    "data.eval_resize": None,
    "data.target": None,
    "data.kwargs": {},
    "log.wandb": None,
    "log.mlflow": None,
}


def run_hash(config: Config) -> str:
    """Return the first eight hex digits of the SHA-256 of the settings that determine the run's result."""
    plain = dataclasses.asdict(config)
    for key, off in LATER_KEYS.items():
        *path, leaf = key.split(".")
        node = functools.reduce(operator.getitem, path, plain)
        if node[leaf] == off:
            node.pop(leaf)
    for key in EXECUTION_KEYS:
        *path, leaf = key.split(".")
        # A key that is also in LATER_KEYS may be gone.
        functools.reduce(operator.getitem, path, plain).pop(leaf, None)
    if config.data.order == "global":
        # The global order does not use windows of shards.
        plain["data"].pop("window_shards")
    plain = {section: values for section, values in plain.items() if values != {}}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def filled(value: Optional[_T]) -> _T:
    """Return `value`, typed as not None, because `resolve` has filled it in. Raises `AssertionError` for None."""
    assert value is not None, "the config was not resolved"
    return value


def absolute_paths(config: Config) -> Config:
    """Return the config with absolute input paths, because a checkpoint may be read from any working directory."""

    def absolute(path: Optional[str]) -> Optional[str]:
        return path if path is None or is_url(path) else str(user_path(path).resolve())

    data = dataclasses.replace(
        config.data,
        root=absolute(config.data.root),
        val_labels=absolute(config.data.val_labels),
        cache_dir=absolute(config.data.cache_dir),
    )
    return dataclasses.replace(config, data=data)


def experiment_settings(config: Config, global_batch: int) -> dict[str, Any]:
    """Return the settings that determine the run's result, by key, with ``batch`` set to `global_batch`."""
    left_out = (*EXECUTION_KEYS, "batch")
    settings = {
        key: value
        for key, value in flatten(config).items()
        if not any(key == name or key.startswith(f"{name}.") for name in left_out)
    }
    return {"batch": global_batch, **settings}


def flatten(config: Config) -> dict[str, Any]:
    """Return every leaf of the config by its dotted key."""
    leaves: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            leaves[prefix] = node

    walk("", dataclasses.asdict(config))
    return leaves
