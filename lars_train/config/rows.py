"""The rows of a recipe by their batch, and what to do about a batch that has none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from lars_train.config.schema import Config, RecipeConfig, RowConfig, nominal_batch


def row_name(rows: Iterable[str], batch: str) -> str | None:
    """The row for the batch called `batch`, however either is written (``4k`` is ``4096``); None if there is none."""
    if batch in rows:
        return batch
    size = nominal_batch(batch)
    return next((name for name in rows if size and nominal_batch(name) == size), None)


def no_row(config: Config) -> str:
    """Why the recipe has no row for the config's batch, the nearest rows, and how to interpolate by hand."""
    recipe, batch, literal = config.recipe, config.batch.name, config.batch.size
    text = f"batch={batch}: recipe {recipe.name} has no row for it; its rows are {', '.join(recipe.rows)}."
    rows = sorted(recipe.rows, key=nominal_batch)
    size = nominal_batch(batch)
    if not rows or not size:
        return text
    if literal is not None:
        near = min(rows, key=lambda name: abs(math.log(nominal_batch(name) / literal)))
        return f"{text} batch.size takes what it leaves open from a row: choose one, such as batch={near}."
    below = max((name for name in rows if nominal_batch(name) < size), key=nominal_batch, default=None)
    above = min((name for name in rows if nominal_batch(name) > size), key=nominal_batch, default=None)
    if below is None or above is None:
        near = rows[0] if below is None else rows[-1]
        return (
            f"{text} The nearest is {_told(recipe, near)}; beyond it the source says nothing. Choose it, or a recipe "
            f"that has the batch, or add batch.size={size} and an optimizer.lr of your own to batch={near}."
        )
    text = f"{text} The nearest are {_told(recipe, below)} and {_told(recipe, above)}. Choose one of them"
    first, second = (_values(recipe, name)["optimizer"] for name in (below, above))
    if first != second:
        return f"{text}; there is no way from one to the other, for one is {first}'s and one {second}'s."
    settings = _interpolated(config, below, above)
    return (
        f"{text}; or, by hand, on the line between the two in the logarithms of batch and lr: {settings}, "
        "which no source vouches for (docs/recipes.md)."
    )


def _interpolated(config: Config, below: str, above: str) -> str:
    """The settings of a batch between two rows: the nearer row's, but for lr, warm-up and ghost batch."""
    recipe, size = config.recipe, nominal_batch(config.batch.name)
    low, high = nominal_batch(below), nominal_batch(above)
    share = math.log(size / low) / math.log(high / low)
    first, second = _values(recipe, below), _values(recipe, above)
    near, values = (below, first) if share < 0.5 else (above, second)
    lr = first["lr"] ** (1 - share) * second["lr"] ** share
    warmup = first["warmup_epochs"] * (1 - share) + second["warmup_epochs"] * share
    if config.schedule.scale_warmup and config.epochs is not None:
        warmup *= config.epochs / values["epochs"]
    text = f"batch={near} batch.size={size} optimizer.lr={lr:.3g} schedule.warmup_epochs={warmup:.3g}"
    ghost = int(values["ghost_batch"])
    if size > ghost and size % ghost:
        # The largest divisor up to it, of which there is always one.
        text += f" model.ghost_batch={max(n for n in range(1, ghost + 1) if size % n == 0)}"
    return text if config.data.name == "imagenet" else f"{text} batch.scaled=true"


def _told(recipe: RecipeConfig, name: str) -> str:
    values = _values(recipe, name)
    return f"batch={name} (lr {values['lr']:g}, warm-up {values['warmup_epochs']:g} epochs)"


def _values(recipe: RecipeConfig, name: str) -> Mapping[str, Any]:
    return {**dataclasses.asdict(RowConfig(lr=1.0)), **recipe.common, **recipe.rows[name]}
