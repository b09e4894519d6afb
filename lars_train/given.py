"""Hold the objects that a Python program passes to a run in place of names: a network and a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lars_train.data.dataset import Dataset


@dataclass(frozen=True)
class Given:
    """A network and a data set that exist only in this process; None for those that the config names."""

    network: Callable[[int], nn.Module] | None = None
    """Returns the network for a number of classes, on the CPU."""
    dataset: Dataset | None = None
    """The data set of training and evaluation."""


NOTHING = Given()
"""The objects of a command line: none."""
