"""What a recipe's row gives to a config: every value that the command line left open."""

from __future__ import annotations

import dataclasses

from omegaconf import OmegaConf

from lars_train.config.schema import Config, RowConfig, nominal_batch
from lars_train.errors import ConfigError, nearest


def fill_from_recipe(config: Config) -> None:
    """Fill in every `None` that the row of ``batch`` in the chosen recipe has a value for. Raises `ConfigError`."""
    row = _recipe_row(config)
    opt, batch = config.optimizer, config.batch
    if batch.nominal != nominal_batch(batch.name):
        raise ConfigError(
            f"batch.name={batch.name} and batch.nominal={batch.nominal} differ: choose batch={batch.name}."
        )
    chosen = opt.name
    if chosen == "recipe":
        opt.name = row.optimizer
    if opt.name == "sgd" and opt.base != "SGD":
        raise ConfigError(
            f"optimizer.base={opt.base} needs optimizer=lars; optimizer=sgd is torch.optim.SGD without LARS."
        )
    if opt.name == "sgd":
        for key in ("eps", "trust_coef"):
            if getattr(opt, key) is not None:
                raise ConfigError(
                    f"optimizer.{key}={getattr(opt, key)} is LARS's, and this run has none (sgd); drop it."
                )
    if opt.lr is None:
        if batch.size is not None:
            raise ConfigError(
                f"batch.size={batch.size} is no row of a recipe, so it wants its own learning rate: "
                f"set optimizer.lr (row {batch.name} of recipe {config.recipe.name} has {row.lr})."
            )
        if opt.name != row.optimizer or opt.base != "SGD":
            what = f"{opt.name} over {opt.base}" if opt.name == "lars" else opt.name
            raise ConfigError(
                f"optimizer.lr is not set, and row {batch.name} of recipe {config.recipe.name} gives it for "
                f"{row.optimizer} over SGD only, not for {what}: set optimizer.lr."
            )
    if config.schedule.scale_warmup and config.schedule.warmup_epochs is None and config.epochs is not None:
        config.schedule.warmup_epochs = row.warmup_epochs * config.epochs / row.epochs
    for node, keys in (
        (opt, ("lr", "weight_decay", "decay_norm_bias", "eps", "trust_coef")),
        (config.schedule, ("warmup_epochs", "power", "form")),
        (config.model, ("ghost_batch", "zero_gamma")),
        (config, ("epochs", "label_smoothing")),
    ):
        for key in keys:
            if getattr(node, key) is None:
                setattr(node, key, getattr(row, key))
    # Momentum is SGD's word: a base of another kind gets it only when it is asked for.
    if opt.momentum is None and opt.base == "SGD":
        opt.momentum = row.momentum
    if batch.scaled is None:
        batch.scaled = config.data.name != "imagenet" and batch.size is None


def _recipe_row(config: Config) -> RowConfig:
    recipe, name = config.recipe, config.batch.name
    if name not in recipe.rows:
        raise ConfigError(
            f"batch={name}: recipe {recipe.name} has no row for it; its rows are {', '.join(recipe.rows)}. "
            "Choose one of them; for another size add batch.size=N and optimizer.lr=X to the nearest of them."
        )
    known = {f.name for f in dataclasses.fields(RowConfig)}
    values = {**recipe.common, **recipe.rows[name]}
    for key in values:
        if key not in known:
            raise ConfigError(
                f"recipe {recipe.name}, row {name}: {key!r} is not a field of a row.{nearest(key, known)}"
            )
    row = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RowConfig), values))
    assert isinstance(row, RowConfig)
    return row


def published_top1(config: Config) -> float | None:
    """The published best top-1 (percent) of the config's recipe row, or None where there is none."""
    if config.batch.size is not None:
        return None
    value = config.recipe.rows.get(config.batch.name, {}).get("published_top1")
    return None if value is None else float(value)
