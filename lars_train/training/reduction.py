"""How gradients become the same on all ranks: summed once per update, while the backward pass is still at work.

Torch's DistributedDataParallel does it, bucket by bucket, in the order in which gradients become ready. Batch norm's
statistics are not its business (models/batchnorm.py), and neither is when an update is complete (trainer.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

NONE, BF16 = "none", "bf16"


def over_ranks(
    network: Any, device: torch.device, *, bucket_mb: float = 25.0, compression: str = NONE
) -> DistributedDataParallel:
    """`network` with gradients that are means over the ranks; within `no_sync` they are this rank's alone.

    Each gradient is a view of its bucket, so that reducing needs no second copy of them in memory.

    Args:
        network: a module, compiled or not, on `device`.
        bucket_mb: MiB of gradients that travel together.
        compression: ``bf16``: each rank's gradient is rounded to bfloat16 and summed in it, at half the bytes.
    """
    made = DistributedDataParallel(
        network,
        device_ids=[device.index] if device.type == "cuda" else None,
        # RunningStatistics makes the buffers the same on every rank, from all ranks' data.
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        bucket_cap_mb=bucket_mb,
    )
    if compression == BF16:
        made.register_comm_hook(dist.group.WORLD, bf16_compress_hook)
    return made
