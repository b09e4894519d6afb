"""Resolve the settings that the config leaves to the machine: micro-batch, precision, decoder, threads.

A resumed run keeps these settings. This module also checks the size of the shard cache, and sets up torch.compile.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lars_train.config import AUTO, Config
from lars_train.data.dataset import Dataset, Source
from lars_train.data.decode import native
from lars_train.data.decode.pillow import NATIVE, PILLOW
from lars_train.data.loading.shard_windows import evaluation_room, training_room, training_windows
from lars_train.data.shard_cache import MARK_BYTES
from lars_train.data.sources.index_files import cache_directory
from lars_train.data.sources.remote import RemoteSource
from lars_train.data.transforms import TrainingSizes
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.messages import first_line
from lars_train.run_plan import Plan, accumulation, check_micro_batch
from lars_train.training.device import (
    choose_layout,
    choose_precision,
    choose_threads,
    estimate_ghosts,
    find_largest_ghosts,
    free_memory,
    try_micro_batch,
)
from lars_train.training.distributed import Group
from lars_train.training.evaluation import evaluation_batch


@dataclass(frozen=True)
class Resolved:
    """The resolved settings of a run. `micro_batch` is in samples.

    `threads` was chosen for a world size of `world` and the device type `device`. `decoder` is NATIVE or PILLOW
    (data/decode/pillow.py).
    """

    micro_batch: int
    precision: str
    threads: int
    world: int
    device: str
    decoder: str
    channels_last: bool


def resolve_execution(
    config: Config, plan: Plan, network: nn.Module, device: torch.device, group: Group, stored: dict[str, Any] | None
) -> Resolved:
    """Resolve the settings that the config leaves open. Keep those in `stored`, from a checkpoint. Collective.

    Raises `ConfigError` for a precision that the device does not support, for a decoder that is not available, or if
    not even one ghost batch fits into the device's memory.
    """
    ranks = group.ranks
    kept = None if stored is None else Resolved(**stored)
    most = accumulation(plan, ranks.world, 1)
    name = config.precision.name
    precision = choose_precision(kept.precision if kept is not None and name == AUTO else name, device)
    size = TrainingSizes.from_config(config.data).largest
    known = kept.micro_batch // plan.ghost_batch if kept and kept.micro_batch % plan.ghost_batch == 0 else None
    copies = 2 if config.model.ema is None else 3
    # The memory of a recorded pass stays reserved beside that of ordinary passes: the first ones of another shape.
    passes = 2 if config.cuda_graphs else 1
    if config.micro_batch != AUTO:
        ghosts = check_micro_batch(plan, int(config.micro_batch))
    elif device.type == "cuda":
        # Try a stored micro-batch again, because this device may have less memory than the device of the earlier start.
        ghosts = find_largest_ghosts(
            lambda count: try_micro_batch(
                network, count * plan.ghost_batch, size, precision, device, choose_layout(config), copies, passes
            ),
            ghost_batch=plan.ghost_batch,
            ghosts=min(known or most, most),
        )
    elif known is not None:
        ghosts = known
    else:
        ghosts = estimate_ghosts(
            network,
            ghost_batch=plan.ghost_batch,
            image_size=size,
            ghosts=most,
            free=free_memory(),
            local_world=ranks.local_world,
        )
    # All ranks use the smallest micro-batch: the slowest rank sets the speed anyway, and the record needs one number.
    ghosts = group.all_reduce_min(min(ghosts, most), device)
    threads = choose_threads(config, ranks)
    if kept and config.launch.threads == AUTO and (kept.world, kept.device) == (ranks.world, device.type):
        threads = kept.threads
    decoder = choose_decoder(config, None if kept is None else kept.decoder, group, device)
    return Resolved(
        ghosts * plan.ghost_batch,
        precision.name,
        threads,
        ranks.world,
        device.type,
        decoder,
        channels_last=choose_layout(config) is torch.channels_last,
    )


def check_decoder(config: Config) -> None:
    """Raise `ConfigError` if the config's decoder is not available. Uses no device."""
    if config.data.decoder == NATIVE and not native.is_available():
        raise _no_decoder("the decoder in C is not available.")


def choose_decoder(config: Config, stored: str | None, group: Group, device: torch.device) -> str:
    """Return the config's decoder, or else `stored`, or else the fastest; the same on every rank. Collective.

    An unknown `stored` name, which may come from another version's checkpoint, is ignored. Raises `ConfigError` if the
    config names a decoder that is missing on any rank.
    """
    check_decoder(config)
    setting = config.data.decoder
    if setting == PILLOW or (setting == AUTO and stored == PILLOW):
        return PILLOW
    if group.all_reduce_min(int(native.is_available()), device):
        return NATIVE
    if setting == NATIVE:
        raise _no_decoder("another rank lacks the decoder in C.")
    return PILLOW


def decoder_lines(setting: str, chosen: str, stored: str | None, split: Source) -> Iterator[str]:
    """Yield lines about the decoder to print at the start of a run; none if `split` has no JPEGs.

    Args:
        setting: the config's ``data.decoder``.
        chosen: the return value of `choose_decoder`.
        stored: the decoder of the run up to now; None for a new run.
        split: the images to decode.
    """
    if not native.has_jpegs(split):
        return
    if stored is not None and chosen != stored:
        yield (
            f"WARNING: this run has decoded JPEGs with {stored} so far, and now uses {chosen}. Pixels differ by at "
            "most 1 level, so the weights will not be bit-identical to those of a run without this change."
        )
    if setting != AUTO or chosen == NATIVE:
        return
    if not native.is_available():
        yield (
            "NOTE: Pillow decodes the JPEGs, at less than half the speed: the decoder in C is not available. "
            f"{native.REMEDY}"
        )
    elif stored == PILLOW:
        yield (
            "NOTE: Pillow decodes the JPEGs, as at the start of this run. data.decoder=native is faster, but some "
            "pixels may differ by 1 level."
        )
    else:
        yield "NOTE: Pillow decodes the JPEGs, because another rank lacks the decoder in C."


def _no_decoder(reason: str) -> ConfigError:
    return ConfigError(f"data.decoder=native: {reason} {native.REMEDY} Or: data.decoder=auto.")


def check_cache(
    config: Config, dataset: Dataset, plan: Plan | None, *, micro_batch: int = 1, ranks: Ranks | None = None
) -> None:
    """Raise `ConfigError` if the cache is too small for the shards that this machine's ranks may use at once.

    Local data needs no cache. `plan`: None for an evaluation alone. The defaults of `micro_batch` and `ranks`, for use
    before they are known, give the minimum that any run needs.
    """
    train, val, ranks = dataset.train, dataset.val, ranks or Ranks()
    if not isinstance(train, RemoteSource) or not isinstance(val, RemoteSource):
        return
    needed = train.split.index.size() + MARK_BYTES * (1 + len(train.sizes) + len(val.sizes))
    uses = []
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
        uses.append(f"{_gb(room)} for training with data.window_shards={config.data.window_shards}")
        needed += room
    room = evaluation_room(val.shard, evaluation_batch(micro_batch), ranks.local_world, ranks.world, val.sizes)
    uses.append(f"{_gb(room)} for the evaluation")
    needed += room
    if needed > config.data.cache_gb * 1e9:
        fewer = ", or reduce data.window_shards" if plan is not None else ""
        raise ConfigError(
            f"data.cache_gb={config.data.cache_gb:g}: the run uses up to {_gb(needed)} at once ({' and '.join(uses)}); "
            f"set data.cache_gb={_rounded_up(needed)} or more{fewer}."
        )


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _rounded_up(count: int) -> str:
    return f"{count / 1e9 * 1.005:.3g}"


_WITHOUT_COMPILER = "compile=false gives the same result up to rounding."


def check_compiler(device: torch.device) -> None:
    """Raise `ConfigError` if torch.compile does not work on the device. Compiles one line of code, in seconds."""
    missing = missing_tool(device)
    if missing is not None:
        raise ConfigError(f"compile=true: torch.compile needs {missing}, which was not found; {_WITHOUT_COMPILER}")
    try:
        _keep_compiled()
        torch.compile(_add_relu, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # torch's compiler, and the C++ compiler that it runs, may raise anything
        line = first_line(str(error).strip())
        raise ConfigError(
            f"compile=true: torch.compile does not work here ({type(error).__name__}: {line}); {_WITHOUT_COMPILER}"
        ) from None


def _add_relu(values: Tensor) -> Tensor:
    return values.relu() + 1


def missing_tool(device: torch.device) -> str | None:
    """Return the name of a tool that torch.compile needs for the device if it is not installed, else None."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton"
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    return None if any(map(shutil.which, compilers)) else "a C++ compiler"


# The number of sizes for which a network may be compiled. Beyond torch's own limit of 8, it would run uncompiled.
_MOST_COMPILED = 64


def compile_network(network: nn.Module) -> Any:
    """Return `network` compiled by torch.compile, with the same parameters.

    Each size of micro-batches and of images is compiled separately, because a run has few sizes, and code for dynamic
    sizes is slower.
    """
    _keep_compiled()
    import torch._dynamo.config as compiler

    compiler.cache_size_limit = max(compiler.cache_size_limit, _MOST_COMPILED)
    return torch.compile(network, dynamic=False)


def _keep_compiled() -> None:
    """Keep compiled code between runs, beside the cached indexes, unless ``TORCHINDUCTOR_CACHE_DIR`` is set."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory().parent / "compiled"))
