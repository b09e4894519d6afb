"""Define and check the config section ``augment``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from lars_train.errors import ConfigError


@dataclass
class AugmentConfig:
    """Augmentation of the training images beyond crop and flip (docs/methods.md)."""

    mixup: Optional[float] = None
    """Blend the images of a ghost batch in pairs, with shares drawn from Beta(mixup, mixup). 0: off."""
    cutmix: Optional[float] = None
    """Paste a box from one image of a pair into the other, with the share of the area drawn from Beta(cutmix, cutmix).
    0: off. If `mixup` is on too, half of the ghost batches get each.
    """


def check_augment(augment: AugmentConfig, ghost_batch: int) -> None:
    """Raise `ConfigError` for settings that conflict. `ghost_batch`: the images of a ghost batch."""
    for key in ("mixup", "cutmix"):
        value = getattr(augment, key)
        if value and ghost_batch < 2:
            raise ConfigError(
                f"augment.{key}={value:g}: a ghost batch of one image has no pairs; raise model.ghost_batch."
            )
