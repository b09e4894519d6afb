"""Build the batch streams of training and evaluation: choose the samples of each batch, and their order.

stream.py runs the workers that fill the batches. Batches are in host memory and not normalized. The trainer decides how
many bad images end a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lars_train.data.auto_augment import AutoAugment
from lars_train.data.dataset import Labels, Source, sample_shards
from lars_train.data.decode.pillow import PILLOW
from lars_train.data.loading.reader import BadSample, EvalReader, TrainReader
from lars_train.data.loading.shard_prefetch import ShardPrefetcher
from lars_train.data.loading.shard_windows import Span, by_shard, evaluation_windows, training_windows
from lars_train.data.loading.stream import Batch, BatchRequest, LoaderStatistics, Stream, usable_workers, worker_kind
from lars_train.data.mixing import Mixing
from lars_train.data.order import SHARDS, checksum, epoch_order, eval_range, micro_batches, micro_bounds, shard_order
from lars_train.data.sources.remote import RemoteSource
from lars_train.data.transforms import View

if TYPE_CHECKING:
    from lars_train.config import Config
    from lars_train.launch import Ranks
    from lars_train.run_plan import Plan

__all__ = [
    "BadSample",
    "Batch",
    "EvalSpec",
    "LoaderSpec",
    "LoaderStatistics",
    "Stream",
    "View",
    "eval_loader",
    "train_loader",
]


@dataclass(frozen=True, kw_only=True)
class LoaderSpec:
    """The settings of one rank's stream of training micro-batches: source, order and workers.

    Raises ValueError if an epoch's updates need more samples than the source has, for an unknown `on_error`, and for a
    remote source that is not read by shards.
    """

    source: Source
    view: View
    seed: int
    batch: int
    """The global batch: samples of an update, over all ranks."""
    ghost_batch: int
    ghosts_per_micro: int
    """Ghost batches in a micro-batch."""
    updates_per_epoch: int
    rank: int
    world: int
    workers: int
    """Number of workers. With 0, the calling thread fills the batches."""
    pin_memory: bool
    """Page-lock the buffers, for asynchronous copies to a CUDA device."""
    on_error: str
    """The treatment of an image that cannot be read or decoded. "fail": end the stream with `DataError`.

    "skip": replace the image by the next sample that can be decoded, with the label of the replacement and the
    augmentation of the bad image. Ids are in the order of paths, so the next sample nearly always has the same class,
    which preserves the balance of classes. `Batch.bad` lists the bad image each time. After 1,000 bad images in a row,
    the stream ends with `DataError`.
    """
    decoder: str = PILLOW
    """See `pillow.decode_into`."""
    kind: str | None = None
    """The kind of workers: "processes" (on Linux) or "threads"; None: `stream.worker_kind` decides."""
    window: int | None = None
    """Shards in a window of `order.shard_order`; None to use `order.epoch_order`.

    With a window, the next sample of the same shard replaces a bad image. The shards of a remote source are fetched
    into the cache and held there while they are needed.
    """
    mixing: Mixing | None = None
    """Draws `Batch.mixes`; None for no mixes."""
    auto: AutoAugment | None = None
    """Augments each view with Pillow, which holds the GIL; None to leave the view unchanged."""

    def __post_init__(self) -> None:
        if self.on_error not in ("skip", "fail"):
            raise ValueError(f"on_error must be 'skip' or 'fail', not {self.on_error!r}")
        if self.updates_per_epoch * self.batch > len(self.source):
            needed = f"{self.updates_per_epoch} updates of {self.batch}"
            raise ValueError(f"{needed} need more than {len(self.source)} samples")
        _check_order(self.source, self.window is not None)

    @classmethod
    def from_config(
        cls,
        config: Config,
        plan: Plan,
        source: Source,
        ranks: Ranks,
        *,
        ghosts_per_micro: int,
        workers: int,
        pin_memory: bool,
        decoder: str,
    ) -> LoaderSpec:
        """Return the spec of the run that `config` and `plan` describe, for rank `ranks.rank`."""
        return cls(
            source=source,
            view=View.for_training(config.data),
            seed=config.seed,
            batch=plan.global_batch,
            ghost_batch=plan.ghost_batch,
            ghosts_per_micro=ghosts_per_micro,
            updates_per_epoch=plan.updates_per_epoch,
            rank=ranks.rank,
            world=ranks.world,
            workers=workers,
            pin_memory=pin_memory,
            on_error=config.data.on_error,
            decoder=decoder,
            window=config.data.window_shards if config.data.order == SHARDS else None,
            mixing=Mixing.from_config(config),
            auto=AutoAugment.from_config(config.augment),
        )

    @property
    def shard(self) -> Labels | None:
        """Return the shard of every sample; None if the order does not depend on shards."""
        return None if self.window is None else sample_shards(self.source)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the sample ids of an epoch in order."""
        if self.shard is None or self.window is None:
            return epoch_order(self.seed, epoch, len(self.source))
        return shard_order(self.seed, epoch, self.shard, self.window)

    def bounds(self) -> list[tuple[int, int]]:
        """Return this rank's micro-batches as [start, stop) positions among an update's samples."""
        return micro_bounds(self.batch, self.ghost_batch, self.ghosts_per_micro, self.rank, self.world)

    def spans(self, update: int) -> list[Span]:
        """Return the spans of this rank's micro-batches. Positions count the samples from the start of the run."""
        # Prefetch up to the end of the next update, because another rank may be one update ahead.
        first, last = update * self.batch, (update + 2) * self.batch - 1
        return [Span(first + i, first + j, last) for i, j in self.bounds()]


def train_loader(spec: LoaderSpec, start_update: int, stop_update: int) -> Stream:
    """Return the stream of one rank's micro-batches for the updates [start_update, stop_update), across epochs.

    `order.micro_bounds` gives the micro-batches of an update: the same number each time, and none for a rank without
    ghost batches. From update k on, a stream that starts at update k yields the same batches as one that starts
    at 0.
    """
    source, updates = spec.source, range(start_update, stop_update)

    def prefetcher(source: RemoteSource) -> ShardPrefetcher:
        assert spec.shard is not None
        assert spec.window is not None
        windows = training_windows(
            spec.shard,
            spec.window,
            seed=spec.seed,
            batch=spec.batch,
            updates_per_epoch=spec.updates_per_epoch,
            updates=stop_update,
        )
        spans = (span for update in updates for span in spec.spans(update))
        return ShardPrefetcher(source.split.hold, windows, spans, spec.rank, source.split.objects.url)

    return Stream(
        _requests(spec, updates),
        TrainReader(_for_workers(source), spec.view, spec.decoder, spec.seed, spec.on_error, spec.shard, spec.auto),
        max((j - i for i, j in spec.bounds()), default=1),
        usable_workers(source, spec.workers),
        spec.pin_memory,
        spec.kind or worker_kind(source, spec.decoder if spec.auto is None else PILLOW),
        partial(prefetcher, source) if isinstance(source, RemoteSource) else None,
    )


def _requests(spec: LoaderSpec, updates: range) -> Iterator[BatchRequest]:
    epoch, order, view = -1, np.empty(0, dtype=np.int64), spec.view
    for update in updates:
        if update // spec.updates_per_epoch != epoch:
            epoch = update // spec.updates_per_epoch
            order, view = spec.order(epoch), spec.view.in_epoch(epoch)
        micros = micro_batches(
            order,
            update,
            batch=spec.batch,
            updates_per_epoch=spec.updates_per_epoch,
            ghost_batch=spec.ghost_batch,
            ghosts_per_micro=spec.ghosts_per_micro,
            rank=spec.rank,
            world=spec.world,
        )
        for samples, span, bounds in zip(micros, spec.spans(update), spec.bounds(), strict=True):
            mixes = spec.mixing.draw(epoch, update, bounds, spec.ghost_batch) if spec.mixing is not None else ()
            yield BatchRequest(epoch, view.size, samples, span, mixes=mixes)


def _check_order(source: Source, by_shards: bool) -> None:
    if isinstance(source, RemoteSource) and not by_shards:
        raise ValueError("a remote source can only be read by shards")


def _for_workers(source: Source) -> Source:
    """Return the source that workers read: for a remote one, the shards that the prefetcher holds."""
    return source.held if isinstance(source, RemoteSource) else source


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """The settings of one rank's stream of evaluation micro-batches. `LoaderSpec` describes the other fields.

    Raises ValueError for a remote source that is not read by shards.
    """

    source: Source
    view: View
    micro_batch: int
    """Samples in a micro-batch; the last one may be smaller."""
    rank: int
    world: int
    workers: int
    pin_memory: bool
    decoder: str = PILLOW
    kind: str | None = None
    by_shards: bool = False
    """True to read the samples shard by shard; False for the order of ids."""

    def __post_init__(self) -> None:
        _check_order(self.source, self.by_shards)

    @classmethod
    def from_config(
        cls,
        config: Config,
        source: Source,
        ranks: Ranks,
        *,
        micro_batch: int,
        workers: int,
        pin_memory: bool,
        decoder: str,
    ) -> EvalSpec:
        """Return the spec of the evaluation of `source` that `config` describes, for rank `ranks.rank`."""
        return cls(
            source=source,
            view=View.from_config(config.data),
            micro_batch=micro_batch,
            rank=ranks.rank,
            world=ranks.world,
            workers=workers,
            pin_memory=pin_memory,
            decoder=decoder,
            by_shards=config.data.order == SHARDS,
        )

    def bounds(self) -> tuple[int, int]:
        """Return the (start, stop) of this rank's samples."""
        return eval_range(len(self.source), self.rank, self.world)


def eval_loader(spec: EvalSpec) -> Stream:
    """Return the stream of one rank's samples, each exactly once, in batches of `spec.micro_batch`.

    An image that cannot be read or decoded keeps its place, with zeros for pixels and the label -1.
    """
    source, micro_batch = spec.source, spec.micro_batch
    start, stop = spec.bounds()
    shard = sample_shards(source) if spec.by_shards else None
    order = np.arange(len(source)) if shard is None else by_shard(shard)
    spans = [
        Span(first, min(first + micro_batch, stop), min(first + 2 * micro_batch, stop) - 1)
        for first in range(start, stop, micro_batch)
    ]

    def prefetcher(source: RemoteSource) -> ShardPrefetcher:
        assert shard is not None
        return ShardPrefetcher(source.split.hold, evaluation_windows(shard), spans, spec.rank, source.split.objects.url)

    return Stream(
        (
            BatchRequest(0, spec.view.size, part := order[span.start : span.stop], span, checksum(part))
            for span in spans
        ),
        EvalReader(_for_workers(source), spec.view, spec.decoder),
        max(1, min(micro_batch, stop - start)),
        usable_workers(source, spec.workers),
        spec.pin_memory,
        spec.kind or worker_kind(source, spec.decoder),
        partial(prefetcher, source) if isinstance(source, RemoteSource) else None,
    )
