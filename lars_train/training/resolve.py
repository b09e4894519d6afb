"""What is decided for this machine when a run starts, and kept when it goes on: micro-batch, precision and the like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lars_train.config import AUTO, Config
from lars_train.data.decode import PILLOW
from lars_train.plan import Plan, accumulation, check_micro_batch
from lars_train.training.decoder import choose_decoder
from lars_train.training.device import choose_layout, choose_precision, choose_threads
from lars_train.training.distributed import Group
from lars_train.training.micro_batch import free_memory, ghosts_by_trying, ghosts_that_fit, try_micro_batch


@dataclass(frozen=True)
class Resolved:
    """`micro_batch` in samples; `world` and `device` (its type) say what `threads` was decided for.

    `decoder`: of JPEGs, see decoder.py; checkpoints without it are of runs by Pillow. `compiled` is decided later, by
    compiler.py, when the network is on its device.
    """

    micro_batch: int
    precision: str
    threads: int
    world: int
    device: str
    decoder: str = PILLOW
    channels_last: bool = True
    compiled: bool = False


def resolve(
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
    ghosts = group.minimum(min(ghosts, most), device)
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
