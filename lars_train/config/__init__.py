"""A run's config: schema, recipe, checks. ``resolve`` turns what Hydra composed into a checked `Config`.

No torch is imported here: ``lars-train --help`` must answer at once.
"""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lars_train.config.checks import check_choices, check_values, refuse_unknown_keys
from lars_train.config.recipe import fill_from_recipe, published_top1, with_row
from lars_train.config.recipe_schema import RecipeConfig
from lars_train.config.schema import (
    AUTO,
    BatchConfig,
    CheckConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    LaunchConfig,
    ModelConfig,
    OptimizerConfig,
    PlanConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    choices_of,
    config_dir,
    nominal_batch,
    register,
)
from lars_train.config.stored import restore
from lars_train.config.values import EXECUTION_KEYS, absolute_paths, experiment_settings, filled, flatten, run_hash
from lars_train.errors import ConfigError

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
    "nominal_batch",
    "published_top1",
    "register",
    "resolve",
    "restore",
    "run_hash",
    "with_row",
]


def resolve(raw: DictConfig) -> Config:
    """The composed config as a checked `Config` in which nothing is left for the recipe to say.

    Raises `ConfigError` for every value that can be judged without the data and without a device.
    """
    refuse_unknown_keys(raw, OmegaConf.structured(Config))
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
