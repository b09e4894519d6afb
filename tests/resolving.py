"""Compose and resolve configs."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf
from tiny import composed

from lars_train.config import Config, resolve
from lars_train.errors import ConfigError


def resolved(*arguments: str, **values: Any) -> Config:
    """Resolve the config of `arguments`, with `values` set by dotted key (``__`` for the dot) after composition."""
    raw = composed(*arguments)
    for key, value in values.items():
        # The schema does not restrict a recipe's rows.
        OmegaConf.update(raw, key.replace("__", "."), value, force_add=key.startswith("recipe."))
    return resolve(raw)


def refusal(*arguments: str, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(*arguments, **values)
    return str(caught.value)
