"""Define and check the config section ``augment``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from lars_train.config.recipe_schema import RowConfig
from lars_train.errors import ConfigError

MAX_MAGNITUDE = 30
_RANDAUGMENT = ("randaugment_ops", "randaugment_magnitude")


@dataclass
class AugmentConfig:
    """Augmentation of the training images beyond crop and flip (docs/methods.md)."""

    mixup: Optional[float] = None
    """Blend the images of a ghost batch in pairs, with shares drawn from Beta(mixup, mixup). 0: off."""
    cutmix: Optional[float] = None
    """Paste a box from one image of a pair into the other, with the share of the area drawn from Beta(cutmix, cutmix).
    0: off. If `mixup` is on too, half of the ghost batches get cutmix, and the others mixup.
    """
    auto: Optional[str] = None
    """none, trivial (TrivialAugment) or randaugment: random operations on each image after crop and flip."""
    randaugment_ops: Optional[int] = None
    """For ``auto=randaugment``: operations per image."""
    randaugment_magnitude: Optional[int] = None
    """For ``auto=randaugment``: strength of the operations, from 0 to 30."""


def check_augment(augment: AugmentConfig, ghost_batch: int) -> None:
    """Raise `ConfigError` for settings that conflict. `ghost_batch`: the images of a ghost batch."""
    for key in ("mixup", "cutmix"):
        value = getattr(augment, key)
        if value and ghost_batch < 2:
            raise ConfigError(
                f"augment.{key}={value:g}: a ghost batch of one image has no pairs; raise model.ghost_batch."
            )
    for key in _RANDAUGMENT:
        value = getattr(augment, key)
        if value is not None and augment.auto != "randaugment":
            raise ConfigError(f"augment.{key}={value} has no effect with augment.auto={augment.auto}; omit it.")
    if (augment.randaugment_magnitude or 0) > MAX_MAGNITUDE:
        raise ConfigError(
            f"augment.randaugment_magnitude={augment.randaugment_magnitude}: it must be at most {MAX_MAGNITUDE}."
        )


def fill_augment(augment: AugmentConfig, row: RowConfig) -> None:
    """Replace each `None` by the value of the recipe's row, if the setting has an effect."""
    given = ("mixup", "cutmix", "auto")
    for key in (*given, *(_RANDAUGMENT if (augment.auto or row.auto) == "randaugment" else ())):
        if getattr(augment, key) is None:
            setattr(augment, key, getattr(row, key))
