"""What lies in the class folders of one split: every image by its rank, with its label. And which of them to hold out.

It knows no files; how a listing is had from a place is the place's business (directory.py, zips.py, shards.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lars_train.data.source import Labels, Names, NamesBuilder
from lars_train.data.tree import join

# The one key of the generator that says which images are held out: the split must never change.
_HOLDOUT_KEY = 20170813


@dataclass(frozen=True)
class Listing:
    """The images below a folder of class folders, in bytewise order of their paths (rank = sample id)."""

    classes: tuple[bytes, ...]
    """Names of the class folders in bytewise order (label = index), those without images among them."""
    names: Names
    """Paths, class folder included."""
    labels: Labels
    """Shape (N,)."""
    complete: bool = True
    """Whether each class must have an image; not so where a table or the samples themselves give the labels."""

    def counts(self) -> npt.NDArray[np.int64]:
        """Images of each class: int64 (classes,)."""
        return np.bincount(self.labels, minlength=len(self.classes)).astype(np.int64)


def ranked(classes: Sequence[bytes]) -> list[int]:
    """The labels in the order of their samples.

    Samples are ranked by their whole path, in which a slash follows the class: ``a-b/`` comes before ``a/``.
    """
    return sorted(range(len(classes)), key=lambda label: classes[label] + b"/")


def listing_of(classes: Sequence[bytes], images: Sequence[Sequence[bytes]]) -> Listing:
    """The listing of class folders that hold `images`: for each class, paths within its folder in bytewise order."""
    builder = NamesBuilder()
    order = ranked(classes)
    for label in order:
        builder.extend(join(classes[label], image) for image in images[label])
    counts = np.array([len(images[label]) for label in order], np.int64)
    return Listing(tuple(classes), builder.build(), np.repeat(np.array(order, np.int32), counts))


def held_out(count: int, share: float) -> np.ndarray:
    """Which of `count` images are held out: bool (count,). `count` must be at least 2."""
    wanted = min(max(math.floor(count * share + 0.5), 1), count - 1)
    draws = np.random.Philox(key=_HOLDOUT_KEY).random_raw(count)
    mask = np.zeros(count, bool)
    mask[np.argsort(draws, kind="stable")[:wanted]] = True
    return mask


def divide(listing: Listing, share: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The ranks to train on and those to hold out, both int64 in ascending order; each class must have two images.

    Of each class, the nearest whole number to `share` of its images is held out, but at least one and not all. Which
    ones depends on nothing but their rank within the class and the size of the class.
    """
    out = np.zeros(len(listing.names), bool)
    # A stable sort by label keeps the ranks of a class in order.
    by_class = np.argsort(listing.labels, kind="stable")
    for ranks in _runs(by_class, listing.counts()):
        out[ranks] = held_out(len(ranks), share)
    return np.flatnonzero(~out), np.flatnonzero(out)


def _runs(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    ends = np.cumsum(counts)
    return (values[end - count : end] for count, end in zip(counts.tolist(), ends.tolist(), strict=True))
