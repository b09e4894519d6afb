"""The smallest run, on synthetic images, which tests of training share."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from lars_train.config import Config, resolve

TINY: dict[str, Any] = {
    "epochs": 2,
    "device": "cpu",
    "batch": {"size": 8},
    "recipe": {"rows": {"32k": {}}},
    "data": {
        "name": "synthetic",
        "image_size": 8,
        "augment": "none",
        "eval_crop": 1.0,
        "train_count": 24,
        "val_count": 4,
        "num_classes": 4,
        "workers": 0,
    },
    "model": {"name": "small", "ghost_batch": 4},
    "optimizer": {"lr": 1.0},
    "precision": {"name": "fp32"},
    "launch": {"threads": 1},
}


def tiny(*changes: dict[str, Any], **values: Any) -> Config:
    """Return its config with nested `changes` and then `values`, by keys in which two underscores are a dot."""
    raw = OmegaConf.merge(OmegaConf.structured(Config), TINY, *changes)
    for key, value in values.items():
        OmegaConf.update(raw, key.replace("__", "."), value)
    assert isinstance(raw, DictConfig)
    return resolve(raw)
