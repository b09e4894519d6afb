"""A run's config: schema, recipe and checks. `resolve` turns the config that Hydra composed into a checked `Config`.

This package does not import torch, so that ``lars-train --help`` answers at once.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lars_train.config.checks import check_choices, check_known_keys, check_values
from lars_train.config.mode_schema import CheckConfig, EvaluateConfig, PlanConfig
from lars_train.config.network import ModelConfig
from lars_train.config.recipe import fill_from_recipe, lacks, published_top1, row_sizes_left_out, with_row
from lars_train.config.recipe_schema import RecipeConfig
from lars_train.config.schema import (
    AUTO,
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LaunchConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    choices_of,
    config_dir,
    nominal_batch,
    register,
    schema_node,
)
from lars_train.config.values import EXECUTION_KEYS, absolute_paths, experiment_settings, filled, flatten, run_hash
from lars_train.errors import ConfigError
from lars_train.messages import first_line

__all__ = [
    "AUTO",
    "EXECUTION_KEYS",
    "BatchConfig",
    "CheckConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "LaunchConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlanConfig",
    "PrecisionConfig",
    "RecipeConfig",
    "RunConfig",
    "ScheduleConfig",
    "absolute_paths",
    "choices_of",
    "config_dir",
    "experiment_settings",
    "filled",
    "flatten",
    "lacks",
    "nominal_batch",
    "published_top1",
    "register",
    "resolve",
    "restore",
    "row_sizes_left_out",
    "run_hash",
    "with_row",
]


def resolve(raw: DictConfig) -> Config:
    """Return the composed config as a checked `Config`, with the recipe's values filled in.

    Raises `ConfigError` for an invalid value, as far as this can be checked without the data and a device.
    """
    check_known_keys(raw, schema_node(Config))
    try:
        config = OmegaConf.to_object(raw)
    except OmegaConfBaseException as error:
        key, what = getattr(error, "full_key", None), str(error).partition("\n")[0]
        raise ConfigError(f"{key}: {what}" if key else what) from None
    assert isinstance(config, Config)
    check_choices(config)
    fill_from_recipe(config)
    check_values(config)
    return config


def restore(values: Any) -> Config:
    """Return the `Config` stored in a checkpoint as plain `values` (``dataclasses.asdict`` of a resolved config).

    A checkpoint may come from an untrusted source, so the values pass the same checks as a command line. Nothing that
    they name is looked up or imported, and no interpolation is resolved. Raises `ConfigError` for a key that is not in
    the schema, and for a value that has the wrong type or is invalid on the command line.
    """
    # Runs store resolved values. Resolving an interpolation from the file could reveal environment variables.
    if _has_interpolation(values):
        raise ConfigError("it holds an interpolation (${...}) or a missing value (???), which no run stores.")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema_node(Config), values))
        assert isinstance(config, Config)
        check_choices(config)
        check_values(config)
        filled(config.data.image_size)
        filled(config.data.eval_crop)
    except (ConfigError, OmegaConfBaseException) as error:
        raise ConfigError(first_line(error)) from None
    except (AssertionError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"it is not the config of a run ({type(error).__name__}).") from None
    return config


def _has_interpolation(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_interpolation(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return any(map(_has_interpolation, value))
    return isinstance(value, str) and ("${" in value or value == "???")
