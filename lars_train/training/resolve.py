"""Decide for this machine, when a run starts, what the config leaves open (micro-batch, precision, decoder, threads).

A resumed run keeps these decisions. Also here: whether the shard cache is large enough, and torch.compile.
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
from lars_train.data.sources.index_files import cache_directory
from lars_train.data.sources.remote import RemoteSource
from lars_train.data.sources.shard_cache import MARK_BYTES
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.messages import first_line
from lars_train.plan import Plan, accumulation, check_micro_batch
from lars_train.training.device import (
    choose_layout,
    choose_precision,
    choose_threads,
    free_memory,
    ghosts_by_trying,
    ghosts_that_fit,
    try_micro_batch,
)
from lars_train.training.distributed import Group
from lars_train.training.evaluation import evaluation_batch


@dataclass(frozen=True)
class Resolved:
    """`micro_batch` in samples; `world` and `device` (its type) say what `threads` was decided for.

    `decoder`: NATIVE or PILLOW (data/decode/pillow.py).
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
    """Decide, or keep what `stored` (a checkpoint's) says where the config leaves it open. Collective.

    Raises `ConfigError` for a precision that the device cannot do, for a decoder that is not there, or where not even
    one ghost batch fits into it.
    """
    ranks = group.ranks
    kept = None if stored is None else Resolved(**stored)
    most = accumulation(plan, ranks.world, 1)
    name = config.precision.name
    precision = choose_precision(kept.precision if kept is not None and name == AUTO else name, device)
    size = config.data.image_size
    known = kept.micro_batch // plan.ghost_batch if kept and kept.micro_batch % plan.ghost_batch == 0 else None
    if config.micro_batch != AUTO:
        ghosts = check_micro_batch(plan, int(config.micro_batch))
    elif device.type == "cuda":
        # What was decided on another device is tried too: this one may have less memory.
        ghosts = ghosts_by_trying(
            lambda count: try_micro_batch(
                network, count * plan.ghost_batch, size, precision, device, choose_layout(config)
            ),
            ghost_batch=plan.ghost_batch,
            ghosts=min(known or most, most),
        )
    elif known is not None:
        ghosts = known
    else:
        ghosts = ghosts_that_fit(
            network,
            ghost_batch=plan.ghost_batch,
            image_size=size,
            ghosts=most,
            free=free_memory(),
            local_world=ranks.local_world,
        )
    # Every rank the same: the slowest one sets the pace, and a record with one number can be kept.
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
    """Raise `ConfigError` if the decoder that the config names is not available. No device is touched."""
    if config.data.decoder == NATIVE and not native.is_available():
        raise _missing("the decoder in C is not available.")


def choose_decoder(config: Config, stored: str | None, group: Group, device: torch.device) -> str:
    """Return the config's decoder, else `stored`, else the fastest, the same on every rank. Collective.

    A name that is unknown here, from another version's checkpoint, counts as none. Raises `ConfigError` if the config
    names a decoder that this rank or another lacks.
    """
    check_decoder(config)
    wanted = config.data.decoder
    if wanted == PILLOW or (wanted == AUTO and stored == PILLOW):
        return PILLOW
    if group.all_reduce_min(int(native.is_available()), device):
        return NATIVE
    if wanted == NATIVE:
        raise _missing("another rank lacks the decoder in C.")
    return PILLOW


def decoder_lines(wanted: str, decided: str, stored: str | None, split: Source) -> Iterator[str]:
    """Yield what to report of the decoder at the start of a run, a line each; nothing if `split` has no JPEGs."""
    if not native.has_jpegs(split):
        return
    if stored is not None and decided != stored:
        yield (
            f"WARNING: this run's JPEGs were decoded by {stored} so far and are by {decided} from here on: pixels "
            "differ by at most 1 level, and the weights will not be bit for bit those of a run without this change."
        )
    if wanted != AUTO or decided == NATIVE:
        return
    if not native.is_available():
        yield (
            "NOTE: JPEGs are decoded by Pillow, at under half the speed: the decoder in C is not available. "
            f"{native.REMEDY}"
        )
    elif stored == PILLOW:
        yield (
            "NOTE: JPEGs are decoded by Pillow, as this run began; data.decoder=native is faster, and some pixels may "
            "be 1 level apart."
        )
    else:
        yield "NOTE: JPEGs are decoded by Pillow, because another rank lacks the decoder in C."


def _missing(reason: str) -> ConfigError:
    return ConfigError(f"data.decoder=native: {reason} {native.REMEDY} Or: data.decoder=auto.")


def check_cache(
    config: Config, dataset: Dataset, plan: Plan | None, *, micro_batch: int = 1, ranks: Ranks | None = None
) -> None:
    """Raise `ConfigError` unless all that the ranks of this machine may hold at once fits; nothing for local data.

    `plan`: None for an evaluation alone. Before a device is chosen, `micro_batch` and `ranks` are unknown; their
    defaults give the least that any run needs.
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


_INSTEAD = "compile=false trains without it, to the same result but for rounding."


def check_compiler(device: torch.device) -> None:
    """Raise `ConfigError` if torch.compile does not work on the device. Compiling a line of code takes some seconds."""
    missing = missing_tool(device)
    if missing is not None:
        raise ConfigError(f"compile=true: torch.compile needs {missing}, which was not found; {_INSTEAD}")
    try:
        _keep_compiled()
        torch.compile(_little, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # whatever the compiler, or the compiler's compiler, raises
        line = first_line(str(error).strip())
        raise ConfigError(
            f"compile=true: torch.compile does not work here ({type(error).__name__}: {line}); {_INSTEAD}"
        ) from None


def _little(values: Tensor) -> Tensor:
    return values.relu() + 1


def missing_tool(device: torch.device) -> str | None:
    """The tool that torch.compile needs for the device and does not find on this machine, or None."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton"
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    return None if any(map(shutil.which, compilers)) else "a C++ compiler"


def compiled_of(network: nn.Module) -> Any:
    """The network through torch.compile: its parameters, other code. Each number of images is compiled apart.

    Few numbers occur in a run, and code for any number of images is slower.
    """
    _keep_compiled()
    return torch.compile(network, dynamic=False)


def _keep_compiled() -> None:
    """Keep compiled code from run to run, beside the indexes, unless ``TORCHINDUCTOR_CACHE_DIR`` says where."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory().parent / "compiled"))
