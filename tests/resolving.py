"""Compose and resolve configs, with a cache of composed command lines."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from lars_train.config import Config, config_dir, register, resolve
from lars_train.config.arguments import prepare_arguments
from lars_train.errors import ConfigError


@lru_cache
def composed(*arguments: str) -> DictConfig:
    """Return the composed config of a command line; callers must not change it."""
    register()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", prepare_arguments(list(arguments), None))


def resolved(*arguments: str, **values: Any) -> Config:
    """Resolve the config of `arguments`, with `values` set by dotted key (``__`` for the dot) after composition."""
    raw = deepcopy(composed(*arguments))
    for key, value in values.items():
        # The schema does not restrict a recipe's rows.
        OmegaConf.update(raw, key.replace("__", "."), value, force_add=key.startswith("recipe."))
    return resolve(raw)


def refusal(*arguments: str, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(*arguments, **values)
    return str(caught.value)
