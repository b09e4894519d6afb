"""Resolve the image sizes, from the data config and the command line, or else from the recipe's row."""

from __future__ import annotations

from typing import Any

from lars_train.config.recipe_schema import RowConfig
from lars_train.config.schema import DataConfig
from lars_train.errors import ConfigError

SIZE, EVAL_CROP = 224, 0.875
"""The values of `image_size` and `eval_crop` if neither a config nor the row sets them."""

TRAINING_SIZES = ("image_size", "train_size", "size_schedule")
"""The size keys of a resolved config that change the time of training and evaluation."""

_MULTIPLE = 32  # pixels; the sizes of a `size_schedule` are multiples of it


def fill_sizes(data: DataConfig, row: RowConfig, shrink: float = 1.0) -> None:
    """Fill in missing sizes in `data` from `row`, then reduce them to fewer keys, in place.

    The sizes of the row apply only if `image_size` is not set. Afterwards, `image_size` is the evaluation size.
    `train_size` is null if training has the same size or a `size_schedule`. `eval_size` and `eval_resize` are null, and
    `eval_crop` is set. `shrink`: the run's epochs relative to the row's, by which the row's `size_schedule` is scaled.

    Raises `ConfigError` if `eval_crop` and `eval_resize` are both set, or if `eval_resize` is below the evaluation
    size.
    """
    if data.image_size is None:
        if data.train_size is None and data.size_schedule is None:
            data.train_size, data.size_schedule = row.train_size, scaled_schedule(row.size_schedule, shrink)
        if data.eval_size is None:
            data.eval_size = row.eval_size
            if data.eval_crop is None and data.eval_resize is None:
                data.eval_resize = row.eval_resize
    if data.eval_size is not None and data.eval_size < 1:
        raise ConfigError(f"data.eval_size={data.eval_size}: it must be above 0.")
    size = SIZE if data.image_size is None else data.image_size
    evaluation = size if data.eval_size is None else data.eval_size
    training = size if data.train_size is None else data.train_size
    data.image_size, data.eval_size = evaluation, None
    if data.size_schedule is None:
        data.train_size = None if training == evaluation else training
    resize = data.eval_resize
    if resize is None:
        data.eval_crop = EVAL_CROP if data.eval_crop is None else data.eval_crop
        return
    if data.eval_crop is not None:
        raise ConfigError(
            f"data.eval_resize={resize}: data.eval_crop={data.eval_crop:g} is set too, on the command line or in the "
            f"config of data={data.name}; omit one of them, or set data.eval_crop=null."
        )
    if resize < max(evaluation, 1):
        raise ConfigError(f"data.eval_resize={resize}: it must be at least the evaluation size, {evaluation}.")
    data.eval_crop, data.eval_resize = evaluation / resize, None


def row_sizes(row: RowConfig, shrink: float) -> dict[str, Any]:
    """Return the sizes, by key, of a resolved config in which only `row` sets them. `shrink`: see `fill_sizes`."""
    data = DataConfig()
    fill_sizes(data, row, shrink)
    return {key: getattr(data, key) for key in (*TRAINING_SIZES, "eval_crop")}


def scaled_schedule(schedule: list[int] | None, factor: float) -> list[int] | None:
    """Return a `size_schedule` with its epochs multiplied by `factor` and rounded down."""
    return schedule and [*schedule[:2], *(int(epoch * factor) for epoch in schedule[2:])]


def check_schedule(data: DataConfig, epochs: int) -> None:
    """Raise `ConfigError` for an invalid `size_schedule` of a run of `epochs`."""
    schedule = data.size_schedule
    if schedule is None:
        return
    key = f"data.size_schedule={schedule}"
    if data.train_size is not None:
        raise ConfigError(f"{key}: data.train_size={data.train_size} is set too; omit one of them.")
    if len(schedule) != 4:
        raise ConfigError(f"{key}: give four numbers: [start, end, first epoch, last epoch].")
    start, end, first, last = schedule
    if start == end or min(start, end) < 1 or start % _MULTIPLE or end % _MULTIPLE:
        raise ConfigError(f"{key}: the sizes must be two different multiples of {_MULTIPLE}.")
    if not 0 <= first <= last < epochs:
        raise ConfigError(
            f"{key}: the epochs {first} and {last} must be in order and below epochs={epochs}. Set other epochs, or "
            "schedule.scale_warmup=true, which scales the epochs of a recipe's row to the length of the run."
        )


def unused_sizes(data: DataConfig, row: RowConfig, shrink: float) -> dict[str, Any]:
    """Return the sizes of `row`, by field, that do not apply to the resolved `data`. `shrink`: see `fill_sizes`."""
    size, crop = data.image_size, data.eval_crop
    used = {
        "train_size": None if data.size_schedule else data.train_size or size,
        "eval_size": size,
        "size_schedule": data.size_schedule,
        "eval_resize": size and crop and round(size / crop),
    }
    own = {key: getattr(row, key) for key in used} | {"size_schedule": scaled_schedule(row.size_schedule, shrink)}
    return {key: value for key, value in own.items() if value not in (None, used[key])}
