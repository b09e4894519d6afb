"""Read images and load them as batches in host memory. `open_dataset` is the entry point."""

from __future__ import annotations

from lars_train.data.open import open_dataset

__all__ = ["open_dataset"]
