"""Find the row of a recipe for a batch, or explain the alternatives if there is none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import OmegaConf

from lars_train.config.recipe_schema import RecipeConfig, RowConfig
from lars_train.config.schema import Config, choices_of, config_dir, nominal_batch

UNSCALED = ("imagenet", "folder", "huggingface", "custom")
"""Data sets for which a null ``batch.scaled`` means false: ImageNet, and the user's own data."""


def row_name(rows: Iterable[str], batch: str) -> str | None:
    """Return the name of the row for `batch`, or None. ``4k`` and ``4096`` name the same row."""
    if batch in rows:
        return batch
    size = nominal_batch(batch)
    return next((name for name in rows if size and nominal_batch(name) == size), None)


def explain_missing_row(config: Config) -> str:
    """Return an error message for a batch without a row, with the nearest rows and an interpolation between them."""
    recipe, batch, literal = config.recipe, config.batch.name, config.batch.size
    text = f"batch={batch}: recipe {recipe.name} has no row for it; its rows are {', '.join(recipe.rows)}."
    rows = sorted(recipe.rows, key=nominal_batch)
    size = nominal_batch(batch)
    if not rows or not size:
        return text
    if literal is not None:
        near = min(rows, key=lambda name: abs(math.log(nominal_batch(name) / literal)))
        return f"{text} With batch.size, all other values come from a row; choose a row, such as batch={near}."
    below = max((name for name in rows if nominal_batch(name) < size), key=nominal_batch, default=None)
    above = min((name for name in rows if nominal_batch(name) > size), key=nominal_batch, default=None)
    if below is None or above is None:
        near = rows[0] if below is None else rows[-1]
        having = ", ".join(_recipes_with_row(batch))
        elsewhere = f", or a recipe that has the batch ({having})" if having else ""
        added = " ".join([f"batch.size={size}", *_scaled_setting(config)])
        return (
            f"{text} The nearest is {_row_summary(recipe, near)}; the source has no values beyond that row, and "
            f"lars-train does not extrapolate. Choose that row{elsewhere}, or set {added} and your own optimizer.lr "
            f"with batch={near}."
        )
    text = f"{text} The nearest are {_row_summary(recipe, below)} and {_row_summary(recipe, above)}. Choose one of them"
    first, second = (_row_values(recipe, name)["optimizer"] for name in (below, above))
    if first != second:
        return f"{text}; interpolation is not possible, because one is for {first} and the other for {second}."
    settings, shrunk = _interpolated(config, below, above)
    given = any(value is not None for value in (config.optimizer.lr, config.schedule.warmup_epochs))
    kept = " (the values that you set stay)" if given else ""
    return (
        f"{text}; or interpolate by hand, linearly in the logarithms of batch and lr{kept}: {settings}, "
        f"which no source confirms (docs/recipes.md).{shrunk}"
    )


def _recipes_with_row(batch: str) -> list[str]:
    """Return the names of the built-in recipes that have a row for `batch`."""
    rows = {name: OmegaConf.load(config_dir() / "recipe" / f"{name}.yaml").rows for name in choices_of("recipe")}
    return [name for name in rows if row_name([str(row) for row in rows[name]], batch)]


def _scaled_setting(config: Config) -> list[str]:
    """Return the setting that scales `batch.size` to the data set, as rows are scaled; an empty list if not needed."""
    scaled = config.batch.scaled
    if scaled is not None:
        return [f"batch.scaled={str(scaled).lower()}"]
    return [] if config.data.name in UNSCALED else ["batch.scaled=true"]


def _interpolated(config: Config, below: str, above: str) -> tuple[str, str]:
    """Return the settings for a batch between two rows, and a sentence about the scaled warm-up (empty if unscaled).

    The settings are those of the nearer row, except for lr, warm-up, ghost batch and values that the user has set.
    """
    recipe, size, schedule = config.recipe, nominal_batch(config.batch.name), config.schedule
    low, high = nominal_batch(below), nominal_batch(above)
    share = math.log(size / low) / math.log(high / low)
    first, second = _row_values(recipe, below), _row_values(recipe, above)
    near, values = (below, first) if share < 0.5 else (above, second)
    lr, shrunk = f"{first['lr'] ** (1 - share) * second['lr'] ** share:.3g}", ""
    if config.optimizer.lr is not None:
        lr = str(config.optimizer.lr)
    warmup = schedule.warmup_epochs
    if warmup is None:
        warmup = first["warmup_epochs"] * (1 - share) + second["warmup_epochs"] * share
        if schedule.scale_warmup and config.epochs not in (None, values["epochs"]):
            # `scale_warmup` scales a row's warm-up, but not a given one. So the message gives the scaled value.
            whole, warmup = warmup, warmup * config.epochs / values["epochs"]
            shrunk = (
                f" The interpolated warm-up is {whole:.3g} of the {values['epochs']} epochs of batch={near}. Because "
                f"schedule.scale_warmup is true, it is scaled to this run's epochs={config.epochs}: {whole:.3g} * "
                f"{config.epochs} / {values['epochs']} = {warmup:.3g}."
            )
    settings = [f"batch={near} batch.size={size} optimizer.lr={lr} schedule.warmup_epochs={warmup:.3g}"]
    ghost = config.model.ghost_batch or int(values["ghost_batch"])
    if size > ghost and size % ghost:
        # The largest divisor of the batch that is at most the row's ghost batch.
        ghost = max(n for n in range(1, ghost + 1) if size % n == 0)
    if config.model.ghost_batch is not None or ghost != int(values["ghost_batch"]):
        settings.append(f"model.ghost_batch={ghost}")
    return " ".join([*settings, *_scaled_setting(config)]), shrunk


def _row_summary(recipe: RecipeConfig, name: str) -> str:
    values = _row_values(recipe, name)
    return f"batch={name} (lr {values['lr']:g}, warm-up {values['warmup_epochs']:g} epochs)"


def _row_values(recipe: RecipeConfig, name: str) -> Mapping[str, Any]:
    return {**dataclasses.asdict(RowConfig(lr=1.0)), **recipe.row(name)}
