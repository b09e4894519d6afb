"""Read samples, decode their views into a batch's buffers, and report bad images: the work of a loader's worker.

The view and the label of a sample depend only on its id and the epoch, not on batches or workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lars_train.data.auto_augment import AutoAugment
from lars_train.data.dataset import Labels, Source
from lars_train.data.decode.pillow import BadImage, decode_into
from lars_train.data.order import batch_uniforms
from lars_train.data.transforms import UNIFORMS, Geometry, View
from lars_train.messages import printable

_MAX_TRIES = 1000  # samples tried for one place in a batch; more bad images in a row mean a broken data set


class BadSample(NamedTuple):
    """An image that cannot be read or decoded."""

    sample: int
    where: str
    reason: str


class Outcome(NamedTuple):
    """The result of reading some samples."""

    bad: tuple[BadSample, ...] = ()
    """The bad images encountered, in order."""
    fast: int = 0
    """Views decoded by a decoder other than Pillow."""
    failure: str | None = None
    """The message of the error that ends the stream; None to continue."""


class Reader(Protocol):
    """Fills a part of a batch."""

    size: int
    """The largest side of a view in pixels."""

    def fill(
        self, epoch: int, samples: Sequence[int], images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
    ) -> Outcome:
        """Write the views of `samples` to `images`, uint8 (n, S, S, 3), and their labels to `labels`, int64 (n,)."""
        ...


class _Reader:
    def __init__(self, source: Source, view: View, decoder: str) -> None:
        self.size = view.size
        self._source, self._view, self._decoder = source, view, decoder

    def _load(
        self, sample: int, geometry: Callable[[int, int], Geometry], out: npt.NDArray[np.uint8]
    ) -> BadSample | bool:
        """Decode a sample into `out`, and return True if a decoder other than Pillow decoded it.

        For a bad image, write zeros and return the `BadSample`.
        """
        try:
            return decode_into(out, self._source.read(sample), geometry, decoder=self._decoder)
        except BadImage as error:
            reason = str(error)
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        out[:] = 0
        return BadSample(sample, self._source.location(sample), printable(reason))


class TrainReader(_Reader):
    """Fill batches with augmented views. `loader.LoaderSpec` describes `on_error` and the replacement of bad images."""

    def __init__(
        self,
        source: Source,
        view: View,
        decoder: str,
        seed: int,
        on_error: str,
        shard: Labels | None = None,
        auto: AutoAugment | None = None,
    ) -> None:
        super().__init__(source, view, decoder)
        self._seed, self._on_error, self._shard, self._auto = seed, on_error, shard, auto

    def fill(
        self, epoch: int, samples: Sequence[int], images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
    ) -> Outcome:
        """Write augmented views to `images`; see `Reader.fill`."""
        count = UNIFORMS + (0 if self._auto is None else self._auto.uniforms)
        uniforms = batch_uniforms(self._seed, epoch, samples, count).tolist()
        view = self._view.in_epoch(epoch)
        geometries = [partial(view.train, uniforms=one) for one in uniforms]
        bad: list[BadSample] = []
        fast = 0
        for slot, requested in enumerate(samples):
            before = len(bad)
            for sample in self._candidates(requested):
                found = self._load(sample, geometries[slot], images[slot])
                if not isinstance(found, BadSample):
                    fast += found
                    labels[slot] = self._source.labels[sample]
                    if self._auto is not None:
                        self._auto(images[slot], uniforms[slot][UNIFORMS:])
                    break
                bad.append(found)
                if self._on_error == "fail":
                    failure = (
                        f"{found.where}: {found.reason.rstrip('.')}. Fix or remove the file, or set "
                        "data.on_error=skip to use the next sample instead."
                    )
                    return Outcome(tuple(bad), fast, failure)
            else:
                failure = (
                    f"{bad[-1].where}: {bad[-1].reason.rstrip('.')}. This is the last of {len(bad) - before} samples "
                    "in a row that cannot be read; check that the data set is complete and data.root reachable."
                )
                return Outcome(tuple(bad), fast, failure)
        return Outcome(tuple(bad), fast)

    def _candidates(self, sample: int) -> Iterator[int]:
        """Yield the sample, then its possible replacements."""
        yield sample
        if self._shard is None:
            count = len(self._source)
            yield from ((sample + step) % count for step in range(1, min(_MAX_TRIES, count)))
        else:
            # Stay within the shard, because others may not be in the cache.
            near = np.flatnonzero(self._shard == self._shard[sample])
            after = int(np.searchsorted(near, sample)) + 1
            yield from [*near[after:].tolist(), *near[: after - 1].tolist()][: _MAX_TRIES - 1]


class EvalReader(_Reader):
    """Fill batches with evaluation views. A bad image becomes zeros with the label -1."""

    def fill(
        self, epoch: int, samples: Sequence[int], images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
    ) -> Outcome:
        """Write evaluation views to `images`; see `Reader.fill`."""
        bad: list[BadSample] = []
        fast = 0
        for slot, sample in enumerate(samples):
            found = self._load(sample, self._view.evaluate, images[slot])
            if isinstance(found, BadSample):
                bad.append(found)
                labels[slot] = -1
            else:
                fast += found
                labels[slot] = self._source.labels[sample]
        return Outcome(tuple(bad), fast)
