"""Compute the time of an update, and the part that limits it, from the rates of its parts.

The parts: *compute* (images forward and backward on the device, and the overhead of an update), *input* (decoding on
the device's share of cores, during compute; before it if there are no workers), *network* (the sum of the gradients
over all devices, partly hidden by the backward pass). Pure arithmetic: nothing is measured, and checkpoints, start-up
and stragglers are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

COMPUTE, INPUT, NETWORK = "compute", "input", "network"
RING, TREE = "ring", "tree"
CPU = "cpu"
"""The cited CPU device: one core, running one process with one thread."""
# The backward pass is two thirds of a training step (training/metrics.py).
BACKWARD = 2 / 3
_MIXED = ("bf16", "fp16")


@dataclass(frozen=True)
class Cited:
    """Images per second at which one device trains ResNet-50 at 224 pixels, by precision, and the source."""

    rates: dict[str, float]
    source: str


_NVIDIA = (
    "https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/Classification/ConvNets/resnet50v1.5"
    "#training-performance-results, one GPU"
)


# Images per second of CPU time: this program, ResNet-50 at 224 pixels in float32, on one thread of an AMD EPYC.
CPU_RATE = 2.16

CITED = {
    # fp32 is TF32 here.
    "a100": Cited({"fp32": 938, **dict.fromkeys(_MIXED, 2470)}, f"{_NVIDIA}, A100 80GB; TF32 and mixed precision"),
    # A V100 has no bfloat16 arithmetic.
    "v100": Cited({"fp32": 367, "fp16": 1200}, f"{_NVIDIA}, V100 16GB; FP32 and mixed precision"),
    # 56,056 on eight devices, the median of epochs 16 to 31. The source has no figure for fp32.
    "h100": Cited(
        dict.fromkeys(_MIXED, 7007),
        "https://github.com/mlcommons/training_results_v3.0/blob/main/NVIDIA/results/dgxh100_ngc23.04_mxnet/resnet/"
        "result_0.txt, an eighth of DGX H100's throughput in MLPerf; mixed precision",
    ),
    CPU: Cited({"fp32": CPU_RATE}, "this program on one thread of an AMD EPYC; fp32"),
}


@dataclass(frozen=True)
class Machine:
    """The speed of a device, its input and its network."""

    rate: float
    """Images per second of one device, forward and backward."""
    input_rate: float | None
    """Images decoded per second for each device; None: input is not modeled."""
    latency: float
    """Seconds of one message between neighbors."""
    bandwidth: float
    """Bytes per second from a device to a neighbor."""
    overlap: float = 1.0
    """The share of the last micro-batch's backward pass that hides the network."""
    algorithm: str = "auto"
    """``ring``, ``tree``, or ``auto``, the faster of the two."""
    overhead: float = 0.0
    """Seconds of an update besides computing its images."""
    reads: bool = False
    """The training process decodes the images itself, between its computations."""


@dataclass(frozen=True)
class Update:
    """Seconds of an update and of its parts. `reduction` is the whole all-reduce, `network` the part not hidden."""

    seconds: float
    compute: float
    input: float
    network: float
    reduction: float
    limit: str


def all_reduce_seconds(machine: Machine, world: int, size: int) -> float:
    """Return the seconds to sum `size` bytes over p = `world` devices.

    Ring: 2 (p - 1) consecutive messages of size / p bytes (Patarasuk and Yuan 2009,
    https://doi.org/10.1016/j.jpdc.2008.09.002). Tree: up and down two binary trees that share the bytes, pipelined in
    small pieces: 2 log2 p consecutive messages, and twice the bytes over each link (Sanders, Speck and Träff 2009,
    https://doi.org/10.1016/j.parco.2009.09.001).
    """
    if world == 1:
        return 0.0
    ring = 2 * (world - 1) * (machine.latency + size / world / machine.bandwidth)
    tree = 2 * math.ceil(math.log2(world)) * machine.latency + 2 * size / machine.bandwidth
    return {RING: ring, TREE: tree}.get(machine.algorithm, min(ring, tree))


def update_seconds(machine: Machine, world: int, *, samples: int, last: int, size: int) -> Update:
    """Return the time of one update.

    Args:
        samples: images of the update on the busiest device.
        last: images of its last micro-batch.
        size: bytes of gradients.
    """
    compute = samples / machine.rate + machine.overhead
    decoding = samples / machine.input_rate if machine.input_rate else 0.0
    reduction = all_reduce_seconds(machine, world, size)
    exposed = max(0.0, reduction - machine.overlap * BACKWARD * last / machine.rate)
    seconds = compute + exposed + decoding if machine.reads else max(compute + exposed, decoding)
    limit = INPUT if decoding > compute + exposed else NETWORK if reduction > compute else COMPUTE
    return Update(seconds, compute, decoding, exposed, reduction, limit)
