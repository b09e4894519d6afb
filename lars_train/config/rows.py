"""Find the row of a recipe for a batch. If there is none, explain what to do instead."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import OmegaConf

from lars_train.config.recipe_schema import RecipeConfig, RowConfig
from lars_train.config.schema import Config, choices_of, config_dir, nominal_batch


def row_name(rows: Iterable[str], batch: str) -> str | None:
    """Return the row for the batch called `batch`, where ``4k`` equals ``4096``; None if there is none."""
    if batch in rows:
        return batch
    size = nominal_batch(batch)
    return next((name for name in rows if size and nominal_batch(name) == size), None)


def explain_missing_row(config: Config) -> str:
    """Return a message for a batch without a row: the nearest rows, and how to interpolate by hand."""
    recipe, batch, literal = config.recipe, config.batch.name, config.batch.size
    text = f"batch={batch}: recipe {recipe.name} has no row for it; its rows are {', '.join(recipe.rows)}."
    rows = sorted(recipe.rows, key=nominal_batch)
    size = nominal_batch(batch)
    if not rows or not size:
        return text
    if literal is not None:
        near = min(rows, key=lambda name: abs(math.log(nominal_batch(name) / literal)))
        return f"{text} batch.size takes the other values from a row: choose one, such as batch={near}."
    below = max((name for name in rows if nominal_batch(name) < size), key=nominal_batch, default=None)
    above = min((name for name in rows if nominal_batch(name) > size), key=nominal_batch, default=None)
    if below is None or above is None:
        near = rows[0] if below is None else rows[-1]
        having = ", ".join(_recipes_with_row(batch))
        elsewhere = f", or a recipe that has the batch ({having})" if having else ""
        added = " ".join([f"batch.size={size}", *_scaled_setting(config)])
        return (
            f"{text} The nearest is {_row_summary(recipe, near)}; the source has no values beyond it, and nothing is "
            f"extrapolated. Choose it{elsewhere}, or add {added} and your own optimizer.lr to batch={near}."
        )
    text = f"{text} The nearest are {_row_summary(recipe, below)} and {_row_summary(recipe, above)}. Choose one of them"
    first, second = (_row_values(recipe, name)["optimizer"] for name in (below, above))
    if first != second:
        return f"{text}; they cannot be interpolated, because one is for {first} and the other for {second}."
    settings, shrunk = _interpolated(config, below, above)
    given = any(value is not None for value in (config.optimizer.lr, config.schedule.warmup_epochs))
    kept = ", except for the given values" if given else ""
    return (
        f"{text}; or interpolate by hand, linearly in the logarithms of batch and lr{kept}: {settings}, "
        f"which no source confirms (docs/recipes.md).{shrunk}"
    )


def _recipes_with_row(batch: str) -> list[str]:
    """Return the built-in recipes that have a row for the batch called `batch`."""
    rows = {name: OmegaConf.load(config_dir() / "recipe" / f"{name}.yaml").rows for name in choices_of("recipe")}
    return [name for name in rows if row_name([str(row) for row in rows[name]], batch)]


def _scaled_setting(config: Config) -> list[str]:
    """Return the setting that scales a literal batch with the data set as a row's batch is, or the given setting."""
    scaled = config.batch.scaled
    if scaled is not None:
        return [f"batch.scaled={str(scaled).lower()}"]
    return [] if config.data.name == "imagenet" else ["batch.scaled=true"]


def _interpolated(config: Config, below: str, above: str) -> tuple[str, str]:
    """Return the settings for a batch between two rows, and a sentence if the warm-up shrinks with the run.

    The settings are those of the nearer row, except for lr, warm-up, ghost batch and given values.
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
            # The key is used as given; only a row's warm-up shrinks with the run.
            whole, warmup = warmup, warmup * config.epochs / values["epochs"]
            shrunk = (
                f" Its warm-up is {whole:.3g} of the {values['epochs']} epochs of batch={near}, shrunk to this run's "
                f"epochs={config.epochs}, because schedule.scale_warmup is true: {whole:.3g} * {config.epochs} / "
                f"{values['epochs']} = {warmup:.3g}."
            )
    settings = [f"batch={near} batch.size={size} optimizer.lr={lr} schedule.warmup_epochs={warmup:.3g}"]
    ghost = config.model.ghost_batch or int(values["ghost_batch"])
    if size > ghost and size % ghost:
        # The largest divisor of the batch up to the row's ghost batch; 1 always divides it.
        ghost = max(n for n in range(1, ghost + 1) if size % n == 0)
    if config.model.ghost_batch is not None or ghost != int(values["ghost_batch"]):
        settings.append(f"model.ghost_batch={ghost}")
    return " ".join([*settings, *_scaled_setting(config)]), shrunk


def _row_summary(recipe: RecipeConfig, name: str) -> str:
    values = _row_values(recipe, name)
    return f"batch={name} (lr {values['lr']:g}, warm-up {values['warmup_epochs']:g} epochs)"


def _row_values(recipe: RecipeConfig, name: str) -> Mapping[str, Any]:
    return {**dataclasses.asdict(RowConfig(lr=1.0)), **recipe.common, **recipe.rows[name]}
