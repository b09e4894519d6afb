"""Compute the time of an update, and the part that limits it, from the rates of its parts.

The parts:

- *compute*: the forward and backward pass and the overhead of an update. The pass takes as long as the slower of the
  device, which computes, and the host, which launches kernels.
- *input*: decoding on the device's share of cores, during compute; between computations if there are no workers.
- *network*: the sum of the gradients over all devices, partly hidden by the backward pass.

Pure arithmetic: nothing is measured, and checkpoints, start-up and stragglers are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

COMPUTE, LAUNCH, INPUT, NETWORK = "compute", "launch", "input", "network"
RING, TREE = "ring", "tree"
# The backward pass is two thirds of a training step (training/metrics.py).
BACKWARD = 2 / 3


@dataclass(frozen=True)
class Speed:
    """The speed of one device, and of the host that launches its kernels."""

    rate: float
    """Images per second, forward and backward, apart from `floor`."""
    floor: float = 0.0
    """Seconds of a micro-batch in addition to the time of its images."""
    launch: tuple[float, float] = (0.0, 0.0)
    """Seconds that the host needs to launch a micro-batch of one ghost batch, and one of several."""
    launch_update: float = 0.0
    """Seconds that the host needs to launch the rest of an update."""


@dataclass(frozen=True)
class Machine:
    """The speed of a device, its input and its network."""

    speed: Speed
    input_rate: float | None
    """Images decoded per second for each device; None: input is not modeled."""
    latency: float
    """Seconds of one message between neighbors."""
    bandwidth: float
    """Bytes per second from a device to a neighbor in another node."""
    overlap: float = 1.0
    """The share of the last micro-batch's backward pass that can overlap with the all-reduce."""
    algorithm: str = "auto"
    """The all-reduce between nodes: ``ring``, ``tree``, or ``auto`` (the faster of the two)."""
    overhead: float = 0.0
    """Seconds of an update besides computing its images."""
    reads: bool = False
    """The training process decodes the images itself, between its computations."""
    node: int = 1
    """Devices in a node."""
    link: float = math.inf
    """Bytes per second from a device to a neighbor in its node."""


@dataclass(frozen=True)
class Work:
    """An update on the busiest device."""

    samples: int
    micro_batch: int
    ghost_batch: int
    gradient_bytes: int
    buckets: int = 1
    """The number of gradient buckets. They are summed one after the other, the last after the backward pass."""


@dataclass(frozen=True)
class Update:
    """Seconds of an update and of its parts. `reduction` is the whole all-reduce, `network` the part not hidden."""

    seconds: float
    compute: float
    input: float
    network: float
    reduction: float
    limit: str


def all_reduce_seconds(machine: Machine, world: int, size: float) -> float:
    """Return the seconds to sum `size` bytes over `world` devices.

    First, a reduce-scatter within each node gives each device the node's sum of one share of the bytes. Then the
    devices that hold the same share all-reduce it over the n nodes. Last, an all-gather within each node passes the
    shares on.

    A ring over p devices takes 2 (p - 1) consecutive messages of size / p bytes (Patarasuk and Yuan 2009,
    https://doi.org/10.1016/j.jpdc.2008.09.002). Between nodes, a tree may replace the ring: the bytes go up and down
    two binary trees, half through each, pipelined in small pieces. This takes 2 log2 n consecutive messages, and twice
    the bytes over each link (Sanders, Speck and Träff 2009, https://doi.org/10.1016/j.parco.2009.09.001).
    """
    local = min(machine.node, world)
    nodes, share = math.ceil(world / local), size / local
    within = _ring(local, size, machine.latency, machine.link)
    if nodes == 1:
        return within
    ring = _ring(nodes, share, machine.latency, machine.bandwidth)
    tree = 2 * math.ceil(math.log2(nodes)) * machine.latency + 2 * share / machine.bandwidth
    return within + {RING: ring, TREE: tree}.get(machine.algorithm, min(ring, tree))


def _ring(devices: int, size: float, latency: float, bandwidth: float) -> float:
    return 2 * (devices - 1) * (latency + size / devices / bandwidth)


def update_seconds(machine: Machine, world: int, work: Work) -> Update:
    """Return the time of one update on `world` devices."""
    speed, count = machine.speed, math.ceil(work.samples / work.micro_batch)
    last = work.samples - (count - 1) * work.micro_batch
    launch, launch_last = (speed.launch[samples > work.ghost_batch] for samples in (work.micro_batch, last))
    host = (count - 1) * launch + launch_last + speed.launch_update
    device = count * speed.floor + work.samples / speed.rate
    # The host does not wait for the device, so the slower of the two sets the pace.
    compute = max(host, device) + machine.overhead
    decoding = work.samples / machine.input_rate if machine.input_rate else 0.0
    bucket = all_reduce_seconds(machine, world, work.gradient_bytes / work.buckets)
    reduction = work.buckets * bucket
    backward = BACKWARD * max(launch_last, speed.floor + last / speed.rate)
    exposed = max(bucket, reduction - machine.overlap * backward)
    seconds = compute + exposed + decoding if machine.reads else max(compute + exposed, decoding)
    compute_limit = LAUNCH if host > device else COMPUTE
    limit = INPUT if decoding > compute + exposed else NETWORK if reduction > compute else compute_limit
    return Update(seconds, compute, decoding, exposed, reduction, limit)
