"""Fill in values that the command line does not set, from the row of the config's recipe."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import OmegaConf

from lars_train.config.augment import fill_augment
from lars_train.config.lars_options import LARS_OPTIONS, options_of
from lars_train.config.network import BUILTIN
from lars_train.config.recipe_schema import RowConfig
from lars_train.config.rows import UNSCALED, explain_missing_row, row_name
from lars_train.config.schema import Config, nominal_batch, schema_node
from lars_train.config.sizes import TRAINING_SIZES, fill_sizes, row_sizes, unused_sizes
from lars_train.errors import ConfigError, did_you_mean

# Settings that only some forms of the schedule use. Forms that are not in _USED decay by a polynomial.
_FORM_SETTINGS = ("power", "end_lr", "steps", "step_factor")
_POLYNOMIAL = ("power", "end_lr")
_USED = {"cosine": ("end_lr",), "steps": ("steps", "step_factor")}


def fill_from_recipe(config: Config) -> None:
    """Replace each `None` in the config by the value of the recipe's row for ``batch``, if the row has one.

    Raises `ConfigError`.
    """
    row = _recipe_row(config)
    opt, batch = config.optimizer, config.batch
    if batch.nominal != nominal_batch(batch.name):
        raise ConfigError(
            f"batch.name={batch.name} and batch.nominal={batch.nominal} do not match; set batch={batch.name} instead."
        )
    if opt.name == "recipe":
        opt.name = row.optimizer
    if opt.base is None:
        opt.base = row.base
    if opt.base == row.base:
        opt.kwargs = {**row.kwargs, **opt.kwargs}
    _check_ignored_settings(config)
    _check_rate(config, row)
    if opt.name == "lars":
        _fill_lars(config, row)
    _fill_schedule(config, row)
    for node, keys in (
        (opt, ("lr", "weight_decay", "decay_norm_bias")),
        # zero_gamma is for built-in networks only: timm's and the user's keep their own initial weights.
        (config.model, ("ghost_batch", "blurpool", *(("zero_gamma",) if config.model.source == BUILTIN else ()))),
        (config, ("epochs", "label_smoothing", "loss")),
    ):
        for key in keys:
            if getattr(node, key) is None:
                setattr(node, key, getattr(row, key))
    if config.evaluate.flip is None:
        config.evaluate.flip = row.flip_evaluation
    if config.data.min_crop is None and config.data.augment == "inception":
        config.data.min_crop = row.min_crop
    fill_augment(config.augment, row)
    if config.bce_threshold is None and config.loss == "bce":
        config.bce_threshold = row.bce_threshold
    if config.mode != "evaluate" or config.checkpoint.path is None:
        # An evaluation of a checkpoint takes its sizes from the checkpoint.
        _check_length(config)
        fill_sizes(config.data, row, _shrink(config, row))
    # The row's momentum is meant for SGD. Another base gets momentum only from the command line.
    if opt.base == "SGD":
        opt.momentum = row.momentum if opt.momentum is None else opt.momentum
        opt.nesterov = row.nesterov if opt.nesterov is None else opt.nesterov
    if batch.scaled is None:
        batch.scaled = scales_by_default(config)
    if config.data.name != "imagenet":
        _drop_published_results(config)


def scales_by_default(config: Config) -> bool:
    """Return True if a null `batch.scaled` means true: `batch.size` is not set, and the data are not in `UNSCALED`."""
    return config.batch.size is None and config.data.name not in UNSCALED


def _drop_published_results(config: Config) -> None:
    """Remove the published results, which are for ImageNet, from the config and thus from the records of the run."""
    recipe = config.recipe

    def without(values: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in values.items() if key != "published_top1"}
        return {key: without(value) if isinstance(value, dict) else value for key, value in kept.items()}

    config.recipe = dataclasses.replace(recipe, common=without(recipe.common), rows=without(recipe.rows))


def _check_ignored_settings(config: Config) -> None:
    """Raise `ConfigError` for a setting on the command line that the run would ignore."""
    opt, schedule, data = config.optimizer, config.schedule, config.data
    if data.min_crop is not None and data.augment != "inception":
        raise ConfigError(
            f"data.min_crop={data.min_crop} has no effect with data.augment={data.augment}; omit it, or set "
            "data.augment=inception."
        )
    if opt.name == "sgd" and opt.base != "SGD":
        raise ConfigError(
            f"optimizer.base={opt.base}: optimizer=sgd is torch.optim.SGD without LARS. For another base, set "
            "optimizer=torch, or optimizer=lars for LARS over it."
        )
    if opt.name != "lars":
        for key in ("preset", "adapt_norm_bias", *LARS_OPTIONS):
            if getattr(opt, key) is not None:
                raise ConfigError(
                    f"optimizer.{key}={getattr(opt, key)} is an option of LARS, but this run uses plain {opt.base}; "
                    "omit it."
                )
    if schedule.warmup_start is not None and schedule.warmup_epochs == 0:
        raise ConfigError(
            f"schedule.warmup_start={schedule.warmup_start}: schedule.warmup_epochs=0 means no warm-up; omit one."
        )


def _check_rate(config: Config, row: RowConfig) -> None:
    """Raise `ConfigError` if no learning rate is set, and the row's learning rate does not apply to this run."""
    opt, batch = config.optimizer, config.batch
    if opt.lr is not None:
        return
    if batch.size is not None:
        raise ConfigError(
            f"batch.size={batch.size}: recipes give learning rates only for their own batches; set optimizer.lr, and "
            f"for a small batch also optimizer=sgd (row {batch.name} of recipe {config.recipe.name} has "
            f"{row.optimizer} with lr {row.lr})."
        )
    if (opt.name, opt.base) != (row.optimizer, row.base):
        what = f"{opt.name} over {opt.base}" if opt.name == "lars" else f"plain {opt.base}"
        raise ConfigError(
            f"optimizer.lr is not set, and the lr of row {batch.name} of recipe {config.recipe.name} is for "
            f"{row.optimizer} over {row.base}, not for {what}; set optimizer.lr."
        )


def _check_length(config: Config) -> None:
    """Raise `ConfigError` if the row's sizes depend on the run's length, and the row has none for this length."""
    data, name = config.data, row_name(config.recipe.rows, config.batch.name)
    assert name is not None
    lengths = config.recipe.rows[name].get("by_epochs", {})
    own_sizes = (data.image_size, data.train_size, data.size_schedule) != (None, None, None)
    if lengths and str(config.epochs) not in lengths and not config.schedule.scale_warmup and not own_sizes:
        raise ConfigError(
            f"epochs={config.epochs}: recipe {config.recipe.name} has the lengths {', '.join(lengths)}; choose one of "
            "them. For another length, set data.size_schedule, or set schedule.scale_warmup=true, which scales the "
            "schedules of the longest length to this one."
        )


def _fill_lars(config: Config, row: RowConfig) -> None:
    """Fill in the options of LARS that are not set, from `optimizer.preset` or else from the row and its preset."""
    opt = config.optimizer
    given: dict[str, Any]
    if opt.preset is not None:
        given = options_of(opt.preset, f"optimizer.preset={opt.preset}")
    else:
        given = options_of(row.preset, f"recipe {config.recipe.name}, row {config.batch.name}: preset {row.preset}")
        given |= {key: value for key in LARS_OPTIONS if (value := getattr(row, key)) is not None}
        opt.preset = row.preset
    given["adapt_norm_bias"] = row.adapt_norm_bias
    for key, value in given.items():
        if getattr(opt, key) is None:
            setattr(opt, key, value)


def _fill_schedule(config: Config, row: RowConfig) -> None:
    schedule = config.schedule
    shrink = _shrink(config, row)
    if schedule.form is None:
        schedule.form = row.form
    used = _USED.get(schedule.form, _POLYNOMIAL)
    for key in _FORM_SETTINGS:
        if key not in used and getattr(schedule, key) is not None:
            raise ConfigError(
                f"schedule.{key}={getattr(schedule, key)} has no effect with schedule.form={schedule.form}; omit it."
            )
    if schedule.warmup_epochs is None:
        schedule.warmup_epochs = row.warmup_epochs * shrink
        if config.epochs is not None and 0 < config.epochs <= schedule.warmup_epochs:
            raise ConfigError(
                f"epochs={config.epochs}: the run must be longer than its warm-up, which has "
                f"{schedule.warmup_epochs:g} epochs if schedule.warmup_epochs is not set. "
                f"Set schedule.warmup_epochs to less than {config.epochs}, or raise epochs, "
                "or set schedule.scale_warmup=true, which shortens the warm-up in proportion to the run "
                f"({row.warmup_epochs * config.epochs / row.epochs:.3g} epochs)."
            )
    if schedule.warmup_start is None and schedule.warmup_epochs > 0:
        schedule.warmup_start = row.warmup_start
    for key in used:
        if getattr(schedule, key) is None:
            value = getattr(row, key)
            setattr(schedule, key, [step * shrink for step in value] if key == "steps" else value)


def _recipe_row(config: Config) -> RowConfig:
    recipe, batch = config.recipe, config.batch
    name = row_name(recipe.rows, batch.name)
    if name is None:
        raise ConfigError(explain_missing_row(config))
    known = {f.name for f in dataclasses.fields(RowConfig)}
    values = recipe.row(name, config.epochs)
    for key in values:
        if key not in known:
            raise ConfigError(
                f"recipe {recipe.name}, row {name}: {key!r} is not a valid field.{did_you_mean(key, known)}"
            )
    row = OmegaConf.to_object(OmegaConf.merge(schema_node(RowConfig), values))
    assert isinstance(row, RowConfig)
    return row


def with_row(config: Config, name: str) -> Config:
    """Return a copy of a resolved config with the settings of row `name` that determine a run's length and memory.

    These are batch, epochs, warm-up, ghost batch, optimizer and image sizes. A setting that the user has changed from
    the current row stays. So do the learning rate and all other settings. Raises `ConfigError`.
    """
    own, batch = (
        _recipe_row(config),
        dataclasses.replace(config.batch, name=name, nominal=nominal_batch(name), size=None),
    )
    moved = dataclasses.replace(
        config,
        batch=batch,
        model=dataclasses.replace(config.model),
        optimizer=dataclasses.replace(config.optimizer),
        schedule=dataclasses.replace(config.schedule),
    )
    row = _recipe_row(moved)
    if moved.epochs == own.epochs:
        moved.epochs = row.epochs
    if moved.model.ghost_batch == own.ghost_batch:
        moved.model.ghost_batch = row.ghost_batch
    if (moved.optimizer.name, moved.optimizer.base) == (own.optimizer, own.base):
        moved.optimizer.name, moved.optimizer.base = row.optimizer, row.base

    shrink, own_shrink = _shrink(moved, row), _shrink(config, own)
    if moved.schedule.warmup_epochs == own.warmup_epochs * own_shrink:
        moved.schedule.warmup_epochs = row.warmup_epochs * shrink
    sizes, own_sizes = row_sizes(row, shrink), row_sizes(own, own_shrink)
    if all(getattr(config.data, key) == own_sizes[key] for key in TRAINING_SIZES):
        moved.data = dataclasses.replace(config.data, **{key: sizes[key] for key in TRAINING_SIZES})
    return moved


def _shrink(config: Config, row: RowConfig) -> float:
    """Return the factor by which `schedule.scale_warmup` multiplies the epochs of the row's schedules."""
    return (config.epochs or row.epochs) / row.epochs if config.schedule.scale_warmup else 1.0


def row_sizes_left_out(config: Config) -> dict[str, Any]:
    """Return the sizes of the recipe's row, by field, that do not apply to a resolved config."""
    row = _recipe_row(config)
    return unused_sizes(config.data, row, _shrink(config, row))


def published_top1(config: Config) -> float | None:
    """Return the published top-1 (percent) of the config's row in its recipe, or None if the row has none."""
    name = row_name(config.recipe.rows, config.batch.name)
    if config.batch.size is not None or name is None:
        return None
    value = config.recipe.row(name, config.epochs).get("published_top1")
    return None if value is None else float(value)


def lacks(config: Config) -> list[str]:
    """Return what the source of the config's row has, but lars-train lacks."""
    name = row_name(config.recipe.rows, config.batch.name)
    return [] if name is None else [str(item) for item in config.recipe.row(name, config.epochs).get("lacks", [])]
