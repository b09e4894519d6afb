"""How long an update takes, from the rates of its parts, and which of them limits it. Arithmetic alone.

Three parts: *compute* (images forward and backward on the device, and what an update takes beside them), *input*
(decoding on the device's share of cores, at the same time; without workers before it), *network* (the sum of the
gradients over all devices, of which a share hides behind the backward pass). Nothing is measured here, and checkpoints,
start-up and stragglers are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

COMPUTE, INPUT, NETWORK = "compute", "input", "network"
RING, TREE = "ring", "tree"
CPU = "cpu"
"""Of the cited devices the one that is a core: one process of one thread."""
# A backward pass is two thirds of forward and backward (training/metrics.py).
BACKWARD = 2 / 3
_MIXED = ("bf16", "fp16")


@dataclass(frozen=True)
class Cited:
    """Images per second that one device trains ResNet-50 on at 224 pixels, by precision, and who says so."""

    rates: dict[str, float]
    source: str


_NVIDIA = (
    "https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/Classification/ConvNets/resnet50v1.5"
    "#training-performance-results, one GPU"
)


# Measured by scripts/verify/check_plan.py --cpu, see docs/plan.md.
CPU_RATE = 2.16

CITED = {
    # Its fp32 is TF32.
    "a100": Cited({"fp32": 938, **dict.fromkeys(_MIXED, 2470)}, f"{_NVIDIA}, A100 80GB; TF32 and mixed precision"),
    # It has no arithmetic for bfloat16.
    "v100": Cited({"fp32": 367, "fp16": 1200}, f"{_NVIDIA}, V100 16GB; FP32 and mixed precision"),
    # 56,056 on eight, the median of epochs 16 to 31. No figure for fp32 there.
    "h100": Cited(
        dict.fromkeys(_MIXED, 7007),
        "https://github.com/mlcommons/training_results_v3.0/blob/main/NVIDIA/results/dgxh100_ngc23.04_mxnet/resnet/"
        "result_0.txt, an eighth of DGX H100's throughput in MLPerf; mixed precision",
    ),
    CPU: Cited(
        {"fp32": CPU_RATE},
        "docs/plan.md, this program on one thread of an AMD EPYC (scripts/verify/check_plan.py --cpu); fp32",
    ),
}


@dataclass(frozen=True)
class Machine:
    """What a device and its surroundings do.

    `rate`: images per second and device, forward and backward. `input_rate`: images decoded per second for each
    device; None: input is not looked at. `latency`: seconds of one message between neighbours. `bandwidth`: bytes per
    second of a device to a neighbour. `overlap`: the share of the last micro-batch's backward pass behind which the
    network hides. `algorithm`: ``ring``, ``tree``, or ``auto``, the faster of the two. `overhead`: seconds of an update
    beside its images. `reads`: the device's process decodes itself, between its computations.
    """

    rate: float
    input_rate: float | None
    latency: float
    bandwidth: float
    overlap: float = 1.0
    algorithm: str = "auto"
    overhead: float = 0.0
    reads: bool = False


@dataclass(frozen=True)
class Update:
    """Seconds of an update and of its parts; `network` is what is not hidden, `reduction` all of it."""

    seconds: float
    compute: float
    input: float
    network: float
    reduction: float
    limit: str


def all_reduce_seconds(machine: Machine, world: int, size: int) -> float:
    """Seconds to sum `size` bytes over `world` devices.

    Ring: 2 (p - 1) messages, one after another, of size / p bytes (Patarasuk and Yuan 2009,
    https://doi.org/10.1016/j.jpdc.2008.09.002). Tree: up and down a pair of binary trees that share the bytes, in
    pieces small enough to fill them: 2 log2 p messages in a row, and twice the bytes over each link (Sanders, Speck
    and Träff 2009, https://doi.org/10.1016/j.parco.2009.09.001).
    """
    if world == 1:
        return 0.0
    ring = 2 * (world - 1) * (machine.latency + size / world / machine.bandwidth)
    tree = 2 * math.ceil(math.log2(world)) * machine.latency + 2 * size / machine.bandwidth
    return {RING: ring, TREE: tree}.get(machine.algorithm, min(ring, tree))


def update_seconds(machine: Machine, world: int, *, samples: int, last: int, size: int) -> Update:
    """The time of one update.

    Args:
        samples: of the update on the busiest device; `last`: of its last micro-batch.
        size: bytes of gradients.
    """
    compute = samples / machine.rate + machine.overhead
    fed = samples / machine.input_rate if machine.input_rate else 0.0
    reduction = all_reduce_seconds(machine, world, size)
    exposed = max(0.0, reduction - machine.overlap * BACKWARD * last / machine.rate)
    seconds = compute + exposed + fed if machine.reads else max(compute + exposed, fed)
    limit = INPUT if fed > compute + exposed else NETWORK if reduction > compute else COMPUTE
    return Update(seconds, compute, fed, exposed, reduction, limit)
