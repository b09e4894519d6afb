"""What is measured on a machine before a run, as plain values that pickle. Nothing is measured or judged here."""

from __future__ import annotations

from dataclasses import dataclass, field

from lars_train.data.inventory import Inventory


@dataclass(frozen=True)
class Host:
    """The machine that a rank is on. Sizes in bytes; None: it could not be found out."""

    name: str
    cores: int
    memory_free: int
    open_files: int
    """The soft limit of this process; `most_open_files`: what it may be raised to without root."""
    most_open_files: int
    shared_memory_free: int | None
    """Of ``/dev/shm``."""


@dataclass(frozen=True)
class Device:
    """What a rank computes on."""

    kind: str
    """``cpu`` or ``cuda``."""
    name: str
    identity: str = ""
    """The same for two ranks that share one device; empty where they may."""
    memory: int = 0
    memory_taken: int = 0
    """Bytes that were in use before this program took any."""
    precisions: dict[str, float] = field(default_factory=dict)
    """Floating-point operations per second of matrix products, for each precision that the device has."""


@dataclass(frozen=True)
class Step:
    """A short training of the configured model on made-up images that are on the device already."""

    samples: int
    images_per_s: float
    precision: str
    finite: bool
    """Whether the loss was a finite number."""
    checkpoint_bytes: int
    gradient_bytes: int


@dataclass(frozen=True)
class Input:
    """The configured loader at work, on all ranks at once."""

    images_per_s: float
    per_core: float
    """Images per second of one worker's wall time."""
    workers: int
    decoder: str
    buffers: int
    """Bytes of the loader's buffers, when they are full."""


@dataclass(frozen=True)
class TrialRead:
    """Pictures that were read and decoded in full by way of trial."""

    images: int
    bytes: int
    read_s: float
    bad: tuple[str, ...] = ()
    """Each with its place and the reason."""
    drawn: int = 0
    """How many there would have been with time enough."""


@dataclass(frozen=True)
class Counts:
    """The data set. `held_out`: the validation images are a part of ``train/``."""

    data: str
    train: int
    val: int
    classes: int
    held_out: bool
    fingerprint: str
    inventory: Inventory = field(default_factory=Inventory)


@dataclass(frozen=True)
class OutputFolder:
    """A place that a run writes to. `filesystem` is the same for two places that share their room."""

    use: str
    """What is kept there: ``checkpoints`` or ``cache``."""
    key: str
    """The setting that says where it is."""
    path: str
    filesystem: str
    free: int
    needed: int
    """Bytes that a run may still add there."""
    written: int = 0
    write_s: float = 0.0
    """Seconds in which `written` bytes were on disk."""


@dataclass(frozen=True)
class Exchange:
    """All-reduces between the ranks: `seconds` for all gradients of `bytes`, `latency` seconds for one number."""

    bytes: int
    seconds: float
    latency: float
    sent: int = 0
    """Bytes of one that was measured; where they are fewer than `bytes`, `seconds` is in proportion."""

    def bus_bandwidth(self, world: int) -> float:
        """Bytes per second that each link carries, 2 (n - 1) / n times the tensor's (as nccl-tests counts,
        https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
        """
        return 2 * (world - 1) / world * self.bytes / self.seconds


@dataclass(frozen=True)
class Clock:
    """A rank's clock against the first rank's, in seconds. `error`: how far off the measurement may be."""

    ahead: float
    error: float


@dataclass(frozen=True)
class Rank:
    """All that one rank has found. None: not measured, since something before it failed or has no meaning here."""

    rank: int
    local_rank: int
    host: Host
    versions: dict[str, str]
    """Of programs and libraries, and the commit; the config by its hash."""
    device: Device
    refused: tuple[str, ...] = ()
    """Errors that would end a run before it begins."""
    counts: Counts | None = None
    step: Step | None = None
    input: Input | None = None
    sample: TrialRead | None = None
    folders: tuple[OutputFolder, ...] = ()
    unseen: str | None = None
    """A folder of the first rank's in which this one does not see what that one has written."""


@dataclass(frozen=True)
class Demands:
    """What a run asks of its machines. Numbers are of all ranks together."""

    global_batch: int
    updates_between_checkpoints: int
    minutes_between_checkpoints: float | None
    max_bad: int
    train: int


@dataclass(frozen=True)
class Findings:
    """Everything, of all ranks in their order."""

    ranks: tuple[Rank, ...]
    clocks: tuple[Clock, ...] = ()
    exchange: Exchange | None = None
    demands: Demands | None = None

    @property
    def eaten_per_s(self) -> float | None:
        """Images per second that all devices together train on when nothing holds them up."""
        steps = [rank.step for rank in self.ranks]
        known = [step.images_per_s for step in steps if step is not None]
        # All ranks wait for the slowest in each update.
        return len(steps) * min(known) if known and len(known) == len(steps) else None
