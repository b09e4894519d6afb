"""Classes for the ranks' findings before a run, as plain picklable values, and the lines of the report on them.

The modules measure_*.py make the findings; judge.py judges them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median_high

from lars_train.data.inventory import Inventory
from lars_train.messages import counted, operations, rate, size

_HOSTS_LISTED = 4


@dataclass(frozen=True)
class Host:
    """The machine that a rank runs on. Sizes in bytes."""

    name: str
    cores: int
    memory_free: int
    open_files: int
    """The soft limit on open files of a process."""
    max_open_files: int
    """The hard limit, up to which `open_files` can be raised without root."""
    shared_memory_free: int | None
    """Free bytes of ``/dev/shm``; None: unknown."""


@dataclass(frozen=True)
class Device:
    """The device that a rank computes on."""

    kind: str
    """``cpu`` or ``cuda``."""
    name: str
    identity: str = ""
    """Equal for two ranks on the same device; empty for CPUs, which ranks may share."""
    memory: int = 0
    memory_taken: int = 0
    """Bytes in use before this program allocated any."""
    precisions: dict[str, float] = field(default_factory=dict)
    """Floating-point operations per second of matrix products, for each precision that the device supports."""


@dataclass(frozen=True)
class Step:
    """A short training run of the configured model on random images that are already on the device."""

    samples: int
    images_per_s: float
    precision: str
    finite: bool
    """True if the loss was finite."""
    checkpoint_bytes: int
    gradient_bytes: int


@dataclass(frozen=True)
class Input:
    """The speed of the configured loader, measured on all ranks at once."""

    images_per_s: float
    """0: the data set is too small to measure."""
    per_core: float
    """Images per second of one worker's wall time; 0: the data set is too small to measure."""
    workers: int
    decoder: str
    buffers: int
    """Bytes of the loader's buffers when they are full."""


@dataclass(frozen=True)
class TrialRead:
    """A sample of images, read and decoded in full."""

    images: int
    bytes: int
    read_s: float
    bad: tuple[str, ...] = ()
    """The path and the reason of each image that cannot be decoded."""
    drawn: int = 0
    """Images to read; `images` is less if time was up."""


@dataclass(frozen=True)
class Counts:
    """The size of the data set. `held_out`: the validation images are taken from ``train/``."""

    data: str
    train: int
    val: int
    classes: int
    held_out: bool
    fingerprint: str
    inventory: Inventory = field(default_factory=Inventory)


@dataclass(frozen=True)
class OutputFolder:
    """A folder that a run writes to."""

    use: str
    """Its contents: ``checkpoints`` or ``cache``."""
    key: str
    """The config key that sets it."""
    path: str
    filesystem: str
    """Equal for two folders that share free space."""
    free: int
    needed: int
    """Bytes that a run may still add."""
    written: int = 0
    write_s: float = 0.0
    """Seconds until `written` bytes were on disk."""


@dataclass(frozen=True)
class Exchange:
    """All-reduces between the ranks: `seconds` for `bytes` of gradients, `latency` seconds for one number."""

    bytes: int
    seconds: float
    latency: float
    sent: int = 0
    """Bytes of the all-reduce that was measured; if fewer than `bytes`, `seconds` is scaled up in proportion."""

    def bus_bandwidth(self, world: int) -> float:
        """Return the bus bandwidth in bytes per second, as defined by nccl-tests.

        It is 2 (n - 1) / n times the bytes of the tensor per second, see
        https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md.
        """
        return 2 * (world - 1) / world * self.bytes / self.seconds


@dataclass(frozen=True)
class Clock:
    """Seconds that a rank's clock is ahead of rank 0's, and the maximum `error` of this value."""

    ahead: float
    error: float


@dataclass(frozen=True)
class Rank:
    """The findings of one rank. A field is None if it does not apply, or if an earlier measurement failed."""

    rank: int
    local_rank: int
    host: Host
    versions: dict[str, str]
    """Versions of programs and libraries, the commit, and the config's hash."""
    device: Device
    errors: tuple[str, ...] = ()
    """Errors that would end a run before its first update."""
    counts: Counts | None = None
    step: Step | None = None
    input: Input | None = None
    sample: TrialRead | None = None
    folders: tuple[OutputFolder, ...] = ()
    unshared_folder: str | None = None
    """A folder in which this rank does not see the file that rank 0 wrote."""

    @property
    def label(self) -> str:
        """The rank, its device and its machine, for a message."""
        return f"rank {self.rank} ({self.device.name}, local rank {self.local_rank} on {self.host.name})"

    @property
    def images_per_s(self) -> float | None:
        """Images per second of this rank with its loader; None if either speed is unknown.

        With workers, the slower of the two speeds; without, the process loads and computes in turn.
        """
        if self.step is None or self.input is None or not self.input.images_per_s:
            return None
        device, loader = self.step.images_per_s, self.input.images_per_s
        return min(device, loader) if self.input.workers else 1 / (1 / device + 1 / loader)


@dataclass(frozen=True)
class Demands:
    """The needs of a run, over all ranks."""

    global_batch: int
    updates_between_checkpoints: int
    minutes_between_checkpoints: float | None
    max_bad: int


@dataclass(frozen=True)
class Findings:
    """The findings of all ranks, in rank order."""

    ranks: tuple[Rank, ...]
    clocks: tuple[Clock, ...] = ()
    exchange: Exchange | None = None
    demands: Demands | None = None

    @property
    def device_images_per_s(self) -> float | None:
        """Images per second of all devices together, if they wait only for each other, not for images."""
        steps = [rank.step for rank in self.ranks]
        known = [step.images_per_s for step in steps if step is not None]
        # All ranks wait for the slowest in each update.
        return len(steps) * min(known) if known and len(known) == len(steps) else None

    @property
    def exchange_share(self) -> float | None:
        """Seconds of all-reduce per second of computation in an update; None if one of them is unknown."""
        device = self.device_images_per_s
        if self.exchange is None or self.demands is None or not device:
            return None
        return self.exchange.seconds * device / self.demands.global_batch

    def by_host(self) -> dict[str, list[Rank]]:
        """Return the ranks of each machine, by its name."""
        hosts: dict[str, list[Rank]] = defaultdict(list)
        for rank in self.ranks:
            hosts[rank.host.name].append(rank)
        return dict(hosts)


def list_hosts(hosts: Iterable[str]) -> str:
    """Return the first few distinct names, and the number of the rest."""
    names = sorted(set(hosts))
    more = f" and {len(names) - _HOSTS_LISTED} more" if len(names) > _HOSTS_LISTED else ""
    return ", ".join(names[:_HOSTS_LISTED]) + more


def describe_findings(findings: Findings) -> Iterator[str]:
    """Yield the lines of the report: one or more per subject."""
    yield from _per_host(findings, "machine", _describe_machine)
    yield from _per_host(findings, "limits", _describe_limits)
    yield from _describe_devices(findings)
    yield from _per_host(findings, "data", _describe_data)
    yield from _per_host(findings, "", _describe_inventory)
    yield from _describe_speeds(findings)
    yield from _describe_folders(findings)
    yield from _describe_network(findings)


def _line(label: str, text: str) -> str:
    return f"{label:<15}{text}"


def _per_host(findings: Findings, label: str, describe: Callable[[list[Rank]], str | None]) -> Iterator[str]:
    """Yield a line for each machine; machines with the same text share a line."""
    hosts: dict[str, list[str]] = defaultdict(list)
    for name, ranks in findings.by_host().items():
        text = describe(ranks)
        if text is not None:
            hosts[text].append(name)
    for text, names in hosts.items():
        yield _line(label, f"{list_hosts(names)}: {text}")


def _describe_machine(ranks: list[Rank]) -> str:
    host = ranks[0].host
    return (
        f"{counted(len(ranks), 'rank')}, {counted(host.cores, 'core')}, {host.memory_free / 1e9:.0f} GB of free memory"
    )


def _describe_limits(ranks: list[Rank]) -> str:
    host = ranks[0].host
    shared = "unknown" if host.shared_memory_free is None else f"{size(host.shared_memory_free)} free"
    return f"{host.open_files:,} open files per process, /dev/shm {shared}"


def _describe_devices(findings: Findings) -> Iterator[str]:
    devices: dict[str, list[Rank]] = defaultdict(list)
    for rank in findings.ranks:
        devices[f"{rank.device.name}, {rank.device.memory / 1e9:.0f} GB"].append(rank)
    for name, ranks in devices.items():
        yield _line("device", f"{len(ranks)} x {name}")
        speeds = {
            precision: median_high(rank.device.precisions.get(precision, 0.0) for rank in ranks)
            for precision in ranks[0].device.precisions
        }
        yield _line("precision", ", ".join(f"{p} {operations(speed)}/s" for p, speed in speeds.items()))


def _describe_data(ranks: list[Rank]) -> str | None:
    counts = ranks[0].counts
    if counts is None:
        return None
    samples = [rank.sample for rank in ranks if rank.sample is not None]
    tried, bad = sum(sample.images for sample in samples), sum(len(sample.bad) for sample in samples)
    read, seconds = sum(sample.bytes for sample in samples), sum(sample.read_s for sample in samples)
    return (
        f"{counts.data}, {counts.train:,} training and {counts.val:,} validation images, "
        f"{counted(counts.classes, 'class', 'classes')}; "
        f"{bad} of {tried:,} sampled images cannot be decoded; one process reads {size(read / max(seconds, 1e-9))}/s"
    )


def _describe_inventory(ranks: list[Rank]) -> str | None:
    counts = ranks[0].counts
    return None if counts is None else "; ".join(counts.inventory.lines()) or None


def _describe_speeds(findings: Findings) -> Iterator[str]:
    steps = [rank.step for rank in findings.ranks if rank.step is not None]
    if steps:
        rates = sorted(step.images_per_s for step in steps)
        spread = "" if len(rates) == 1 else f" ({rate(rates[0])} to {rate(rates[-1])} each)"
        yield _line(
            "training step",
            f"{rate(sum(rates))} images/s on {counted(len(rates), 'rank')}{spread}, {steps[0].precision}, micro-batch "
            f"{steps[0].samples}",
        )
    inputs = [rank.input for rank in findings.ranks if rank.input is not None]
    if inputs:
        per_core = sum(loader.per_core for loader in inputs) / len(inputs)
        workers = f"{counted(inputs[0].workers, 'worker')} per rank" if inputs[0].workers else "no workers"
        yield _line(
            "input",
            f"{rate(sum(loader.images_per_s for loader in inputs))} images/s, {rate(per_core)} per core, {workers}, "
            f"decoder {inputs[0].decoder}",
        )
    speeds = [images for rank in findings.ranks if (images := rank.images_per_s) is not None]
    if speeds:
        yield _line("combined", f"{rate(len(speeds) * min(speeds))} images/s, all ranks at the speed of the slowest")


def _describe_folders(findings: Findings) -> Iterator[str]:
    for rank in findings.ranks:
        for folder in rank.folders:
            speed = f", written at {size(folder.written / folder.write_s)}/s" if folder.written else ""
            yield _line(
                folder.use,
                f"{rank.host.name}:{folder.path}: {size(folder.needed)} needed, {size(folder.free)} free{speed}",
            )


def _describe_network(findings: Findings) -> Iterator[str]:
    world, exchange = len(findings.ranks), findings.exchange
    if exchange is None:
        return
    share = findings.exchange_share
    part = "" if share is None else f", {100 * share:.2g} % of an update's compute time"
    speed = f"{size(exchange.bus_bandwidth(world))}/s per link"
    yield _line(
        "all-reduce",
        f"{size(exchange.bytes)} in {1e3 * exchange.seconds:.3g} ms ({speed}{part}), "
        f"latency {1e3 * exchange.latency:.2g} ms",
    )
    furthest = max(findings.clocks, key=lambda clock: abs(clock.ahead))
    yield _line("clocks", f"within {abs(furthest.ahead):.2g} s (± {furthest.error:.2g} s)")
