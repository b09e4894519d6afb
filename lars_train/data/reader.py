"""What a loader's worker does: read samples, decode their views into a batch's buffers, and say what was bad.

Nothing here knows of batches, workers or their order: each sample's view and label depend on its id and epoch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lars_train.data.augment import UNIFORMS, Geometry, View
from lars_train.data.decode import GPU, BadImage, decode_into
from lars_train.data.order import batch_uniforms
from lars_train.data.source import Labels, Source
from lars_train.text import printable

_MAX_TRIES = 1000  # neighbours tried in place of a bad picture: more in a row is a broken data set


class BadSample(NamedTuple):
    """A picture that was asked for and cannot be read or decoded."""

    sample: int
    where: str
    reason: str


class Outcome(NamedTuple):
    """What came of reading some samples."""

    bad: tuple[BadSample, ...] = ()
    """The bad pictures met on the way, in order."""
    fast: int = 0
    """How many views another decoder than Pillow decoded."""
    failure: str | None = None
    """Why the stream ends with these samples."""


class Reader(Protocol):
    """Fills a part of a batch."""

    size: int
    """The side of a view in pixels."""

    def fill(
        self, epoch: int, samples: Sequence[int], images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
    ) -> Outcome:
        """Write the views to `images`, uint8 (n, S, S, 3), and `labels`, int64 (n,)."""
        ...


class _Reader:
    def __init__(self, source: Source, view: View, decoder: str) -> None:
        self.size = view.size
        self._source, self._view, self._decoder = source, view, decoder
        self._at_once = None
        if decoder == GPU:
            from lars_train.data.gpu import GpuDecoder, current_device

            # Here, for threads begin with another current device.
            self._at_once = GpuDecoder(current_device())

    def _decoded(
        self,
        samples: Sequence[int],
        geometries: Sequence[Callable[[int, int], Geometry]],
        images: npt.NDArray[np.uint8],
    ) -> list[bool]:
        """Which of the samples are in `images` already, by a decoder that takes several at once."""
        if self._at_once is None:
            return [False] * len(samples)
        return self._at_once.decode([self._read(sample) for sample in samples], geometries, images)

    def _read(self, sample: int) -> object:
        try:
            return self._source.read(sample)
        except (BadImage, OSError):
            return None  # it is read once more, and its reason told

    def _load(
        self, sample: int, geometry: Callable[[int, int], Geometry], out: npt.NDArray[np.uint8]
    ) -> BadSample | bool:
        """Decode into `out`; whether another decoder than Pillow did. A bad sample leaves zeros there."""
        try:
            return decode_into(out, self._source.read(sample), geometry, decoder=self._decoder)
        except BadImage as error:
            reason = str(error)
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        out[:] = 0
        return BadSample(sample, self._source.where(sample), printable(reason))


class TrainReader(_Reader):
    """Augmented views; `on_error` and what stands in for a bad picture: see `loader.train_loader`."""

    def __init__(
        self, source: Source, view: View, decoder: str, seed: int, on_error: str, shard: Labels | None = None
    ) -> None:
        super().__init__(source, view, decoder)
        self._seed, self._on_error, self._shard = seed, on_error, shard

    def fill(
        self, epoch: int, samples: Sequence[int], images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
    ) -> Outcome:
        uniforms = batch_uniforms(self._seed, epoch, samples, UNIFORMS).tolist()
        geometries = [partial(self._view.train, uniforms=one) for one in uniforms]
        bad: list[BadSample] = []
        fast = 0
        decoded = self._decoded(samples, geometries, images)
        for slot, wanted in enumerate(samples):
            if decoded[slot]:
                fast += 1
                labels[slot] = self._source.labels[wanted]
                continue
            before = len(bad)
            for sample in self._candidates(wanted):
                found = self._load(sample, geometries[slot], images[slot])
                if not isinstance(found, BadSample):
                    fast += found
                    labels[slot] = self._source.labels[sample]
                    break
                bad.append(found)
                if self._on_error == "fail":
                    failure = (
                        f"{found.where}: {found.reason.rstrip('.')}. Mend or remove the file, or set "
                        "data.on_error=skip to put the next sample in its place."
                    )
                    return Outcome(tuple(bad), fast, failure)
            else:
                failure = (
                    f"{bad[-1].where}: {bad[-1].reason.rstrip('.')}. It is the last of {len(bad) - before} samples "
                    "in a row that cannot be read; see whether the data set is whole and data.root reachable."
                )
                return Outcome(tuple(bad), fast, failure)
        return Outcome(tuple(bad), fast)

    def _candidates(self, wanted: int) -> Iterator[int]:
        """The sample itself, then those that may stand in for it."""
        yield wanted
        if self._shard is None:
            count = len(self._source)
            yield from ((wanted + step) % count for step in range(1, min(_MAX_TRIES, count)))
        else:
            # Of other shards nobody knows whether they are there.
            near = np.flatnonzero(self._shard == self._shard[wanted])
            after = int(np.searchsorted(near, wanted)) + 1
            yield from [*near[after:].tolist(), *near[: after - 1].tolist()][: _MAX_TRIES - 1]


class EvalReader(_Reader):
    """Views for evaluation; a bad picture is zeros with the label -1."""

    def fill(
        self, epoch: int, samples: Sequence[int], images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
    ) -> Outcome:
        bad: list[BadSample] = []
        fast = 0
        decoded = self._decoded(samples, [self._view.evaluate] * len(samples), images)
        for slot, sample in enumerate(samples):
            found = decoded[slot] or self._load(sample, self._view.evaluate, images[slot])
            if isinstance(found, BadSample):
                bad.append(found)
                labels[slot] = -1
            else:
                fast += found
                labels[slot] = self._source.labels[sample]
        return Outcome(tuple(bad), fast)
