"""Data: from files to batches in host memory. `open_dataset` is where it starts."""

from __future__ import annotations

from lars_train.data.open import open_dataset

__all__ = ["open_dataset"]
