"""What is decided for this machine when a run starts: micro-batch, precision, threads. A continuation keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lars_train.config import AUTO, Config
from lars_train.plan import Plan, accumulation, check_micro_batch
from lars_train.training.device import choose_precision, choose_threads
from lars_train.training.distributed import Group
from lars_train.training.micro_batch import free_memory, ghosts_that_fit


@dataclass(frozen=True)
class Resolved:
    """`micro_batch` in samples; `world` and `device` (its type) say what `threads` was decided for."""

    micro_batch: int
    precision: str
    threads: int
    world: int
    device: str


def resolve(
    config: Config, plan: Plan, network: nn.Module, device: torch.device, group: Group, stored: dict[str, Any] | None
) -> Resolved:
    """Decide, or keep what `stored` (a checkpoint's) says where the config leaves it open. Collective.

    Raises `ConfigError` for a precision that the device cannot do.
    """
    ranks = group.ranks
    kept = None if stored is None else Resolved(**stored)
    most = accumulation(plan, ranks.world, 1)
    if config.micro_batch != AUTO:
        ghosts = check_micro_batch(plan, int(config.micro_batch))
    elif kept is not None and kept.micro_batch % plan.ghost_batch == 0:
        ghosts = kept.micro_batch // plan.ghost_batch
    else:
        ghosts = ghosts_that_fit(
            network,
            ghost_batch=plan.ghost_batch,
            image_size=config.data.image_size,
            ghosts=most,
            free=free_memory(device),
            local_world=ranks.local_world if device.type == "cpu" else 1,
        )
    # Every rank the same: the slowest one sets the pace, and a record with one number can be kept.
    ghosts = group.minimum(min(ghosts, most), device)
    name = config.precision.name
    precision = choose_precision(kept.precision if kept is not None and name == AUTO else name, device)
    threads = choose_threads(config, ranks)
    if kept and config.launch.threads == AUTO and (kept.world, kept.device) == (ranks.world, device.type):
        threads = kept.threads
    return Resolved(ghosts * plan.ghost_batch, precision.name, threads, ranks.world, device.type)
