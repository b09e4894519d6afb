"""Whether the cache of shards is large enough for a run on a remote store; told before the run begins."""

from __future__ import annotations

from lars_train.config import Config
from lars_train.data.remote import RemoteSource
from lars_train.data.shard_cache import MARK_BYTES
from lars_train.data.source import Dataset
from lars_train.data.windows import evaluation_room, training_room, training_windows
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.plan import Plan
from lars_train.training.evaluation import evaluation_batch


def check_cache(
    config: Config, dataset: Dataset, plan: Plan | None, *, micro_batch: int = 1, ranks: Ranks | None = None
) -> None:
    """Raise `ConfigError` unless all that the ranks of this machine may hold at once fits; nothing for local data.

    `plan`: None for an evaluation alone. Without `micro_batch` and `ranks`, which are known when a device is, it is
    what the smallest of them need.
    """
    train, val, ranks = dataset.train, dataset.val, ranks or Ranks()
    if not isinstance(train, RemoteSource) or not isinstance(val, RemoteSource):
        return
    needed = train.split.index.size() + MARK_BYTES * (1 + len(train.sizes) + len(val.sizes))
    told = []
    if plan is not None:
        windows = training_windows(
            train.shard,
            config.data.window_shards,
            seed=config.seed,
            batch=plan.global_batch,
            updates_per_epoch=plan.updates_per_epoch,
            updates=plan.stop,
        )
        room = training_room(windows, plan.global_batch, train.sizes)
        told.append(f"{_gb(room)} for training, by windows of data.window_shards={config.data.window_shards} shards")
        needed += room
    room = evaluation_room(val.shard, evaluation_batch(micro_batch), ranks.local_world, ranks.world, val.sizes)
    told.append(f"{_gb(room)} for the evaluation")
    needed += room
    if needed > config.data.cache_gb * 1e9:
        fewer = ", or fewer shards at a time" if plan is not None else ""
        raise ConfigError(
            f"data.cache_gb={config.data.cache_gb:g}: up to {_gb(needed)} are in use at once ({' and '.join(told)}); "
            f"allow data.cache_gb={_rounded_up(needed)} at least{fewer}."
        )


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _rounded_up(count: int) -> str:
    return f"{count / 1e9 * 1.005:.3g}"
