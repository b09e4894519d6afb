"""The config that a checkpoint keeps, read back. Checkpoints come from anywhere: it is judged as a command line is."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lars_train.config.checks import check_choices, check_values
from lars_train.config.schema import Config
from lars_train.errors import ConfigError
from lars_train.messages import first_line


def restore(values: Any) -> Config:
    """The `Config` that the plain `values` (``dataclasses.asdict`` of a resolved one) stand for.

    Nothing that they name is looked up or imported, and no interpolation is followed. Raises `ConfigError` for
    what is not in the schema, is of another type, or would be refused on the command line.
    """
    # A run stores what interpolations came to; one that is left could show what stands in the environment.
    if _is_open(values):
        raise ConfigError("it holds an interpolation, ${...}, or a missing value, ???, which no run stores.")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
        assert isinstance(config, Config)
        check_choices(config)
        check_values(config)
    except (ConfigError, OmegaConfBaseException) as error:
        raise ConfigError(first_line(error)) from None
    except (AssertionError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"it is not the config of a run ({type(error).__name__}).") from None
    return config


def _is_open(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_is_open(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return any(map(_is_open, value))
    return isinstance(value, str) and ("${" in value or value == "???")
