"""Find the problems in findings: errors that would end a run, and bottlenecks for its devices. Pure functions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from lars_train.messages import printable, size
from lars_train.preflight.findings import Findings, list_hosts
from lars_train.run_plan import IMAGENET_TRAIN_IMAGES

IMAGENET = (IMAGENET_TRAIN_IMAGES, 50_000, 1_000)
"""Training and validation images, and classes (ILSVRC 2012, https://image-net.org/challenges/LSVRC/2012/)."""

MIN_OPEN_FILES, FILES_PER_WORKER, FILES_PER_RANK = 1024, 8, 4
"""Open files that a process may need: the minimum, per worker (images, shards, pipes), and per rank of the job
(sockets)."""

MIN_SHARED_MEMORY = 1 << 30
"""Bytes of ``/dev/shm`` that NCCL needs
(https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html, Shared Memory)."""

MAX_CLOCK_SKEW_S = 1.0
"""Beyond this, logs and files of two machines cannot be ordered by time."""

MAX_MEMORY_TAKEN = 2 * 10**9
"""Bytes of device memory that drivers and desktops take; more than this belongs to another program."""

BUFFERS_SHARE = 0.5
"""The share of a machine's free memory that the loaders' buffers may take."""

SLOW_DEVICE = 0.8
"""A device slower than this share of the median is reported."""

LOADER_SHARE = 0.9
"""A loader is slow if it delivers less than this share of the images/s that the devices consume."""

LOADER_SHARE_WITHOUT_WORKERS = 0.25
"""The same without workers, when the training process also loads. Below this, loading takes most of its time."""

MIN_CHECKPOINT_S = 5.0
"""A checkpoint that takes less time than this is never reported as slow, even if a small run writes many."""

_FILES_LISTED = 4


@dataclass(frozen=True)
class Problem:
    """Something to fix before a run."""

    what: str
    where: str
    """The machine, or the rank on it."""
    remedy: str = ""
    """Empty if `what` includes it."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f". To fix: {self.remedy}." if self.remedy else "")


def judge(findings: Findings) -> list[Problem]:
    """Return all problems. Those that prevent a start come first."""
    judges = (
        _errors,
        _imagenet_counts,
        _bad_images,
        _hosts,
        _devices,
        _versions,
        _datasets,
        _clocks,
        _disk_space,
        _loader_speed,
        _network_speed,
        _checkpoint_speed,
    )
    return [problem for find in judges for problem in find(findings)]


def format_verdict(problems: list[str]) -> list[str]:
    """Return the last lines of the report."""
    if not problems:
        return ["ready"]
    return ["To fix:", *(f"{number}. {printable(text)}" for number, text in enumerate(problems, 1))]


def _errors(findings: Findings) -> Iterator[Problem]:
    """Find the errors that would end a run at once."""
    hosts: dict[str, list[str]] = defaultdict(list)
    for rank in findings.ranks:
        for error in rank.errors:
            hosts[error].append(rank.host.name)
    for error, names in hosts.items():
        yield Problem(error, list_hosts(names))


def _imagenet_counts(findings: Findings) -> Iterator[Problem]:
    """Find an ImageNet with the wrong number of images or classes."""
    hosts: dict[tuple[int, int, int], list[str]] = defaultdict(list)
    for rank in findings.ranks:
        counts = rank.counts
        if counts is None or counts.data != "imagenet":
            continue
        # Held-out validation images are images of train/.
        found = (counts.train + counts.val,) if counts.held_out else (counts.train, counts.val)
        expected = IMAGENET[: len(found)]
        if (*found, counts.classes) != (*expected, IMAGENET[2]):
            hosts[counts.train, counts.val, counts.classes].append(rank.host.name)
    for (train, val, classes), names in hosts.items():
        yield Problem(
            f"data=imagenet has {train:,} training images, {val:,} validation images and {classes:,} classes here; "
            f"ImageNet has {IMAGENET[0]:,}, {IMAGENET[1]:,} and {IMAGENET[2]:,}",
            list_hosts(names),
            "unpack the archives again, or use data=folder for your own data set",
        )


def _bad_images(findings: Findings) -> Iterator[Problem]:
    """Find images that cannot be decoded."""
    hosts: dict[str, list[str]] = defaultdict(list)
    for rank in findings.ranks:
        for image in rank.sample.bad if rank.sample is not None else ():
            hosts[image].append(rank.host.name)
    if not hosts:
        return
    tried = sum(rank.sample.images for rank in findings.ranks if rank.sample is not None)
    images = "; ".join(list(hosts)[:_FILES_LISTED])
    if len(hosts) > _FILES_LISTED:
        images += f"; and {len(hosts) - _FILES_LISTED} more"
    demands = findings.demands
    allowed = f" (a run fails with more than data.max_bad={demands.max_bad})" if demands is not None else ""
    yield Problem(
        f"{len(hosts)} of {tried:,} sampled images cannot be decoded{allowed}: {images}",
        list_hosts([name for names in hosts.values() for name in names]),
        "restore these files or remove them",
    )


def _hosts(findings: Findings) -> Iterator[Problem]:
    """Find machines with low limits, little memory, or no view of the run directory."""
    world = len(findings.ranks)
    for host, ranks in findings.by_host().items():
        facts = ranks[0].host
        workers = max((rank.input.workers for rank in ranks if rank.input is not None), default=0)
        files = max(MIN_OPEN_FILES, MIN_OPEN_FILES // 2 + FILES_PER_WORKER * workers + FILES_PER_RANK * world)
        if facts.open_files < files:
            root = "" if facts.max_open_files >= files else " (as root; for Docker --ulimit nofile=65536)"
            yield Problem(
                f"a process can open at most {facts.open_files:,} files, and a rank may need {files:,}",
                host,
                f"ulimit -n {files if root else max(files, 65536)} before the start{root}",
            )
        shared = facts.shared_memory_free
        if len(ranks) > 1 and ranks[0].device.kind == "cuda" and shared is not None and shared < MIN_SHARED_MEMORY:
            yield Problem(
                f"/dev/shm has {size(shared)} free, and NCCL needs {size(MIN_SHARED_MEMORY)}",
                host,
                "docker run --shm-size=1g, in Kubernetes an emptyDir with medium: Memory at /dev/shm, else "
                "mount -o remount,size=8g /dev/shm",
            )
        buffers = sum(rank.input.buffers for rank in ranks if rank.input is not None)
        if buffers > BUFFERS_SHARE * facts.memory_free:
            yield Problem(
                f"the loaders' buffers take up to {size(buffers)} of {size(facts.memory_free)} free memory",
                host,
                "set a smaller micro_batch or fewer data.workers, or free memory",
            )
        unshared = next((rank.unshared_folder for rank in ranks if rank.unshared_folder is not None), None)
        if unshared is not None:
            yield Problem(
                f"this machine does not see the files that rank 0 writes in {unshared}",
                host,
                "put run.dir on a file system that all machines share",
            )


def _devices(findings: Findings) -> Iterator[Problem]:
    """Find devices that ranks or other programs share, and devices that are slow or give wrong results."""
    ranks_on = Counter((rank.host.name, rank.device.identity) for rank in findings.ranks if rank.device.identity)
    for (host, _), count in ranks_on.items():
        if count > 1:
            yield Problem(f"{count} ranks use the same device", host, "start one process per device (--nproc-per-node)")
    for rank in findings.ranks:
        if rank.device.memory_taken > MAX_MEMORY_TAKEN:
            yield Problem(
                f"{size(rank.device.memory_taken)} of {size(rank.device.memory)} device memory are already in use",
                rank.label,
                "end the other programs (nvidia-smi lists them)",
            )
        if rank.step is not None and not rank.step.finite:
            yield Problem(
                "a training step on random images gave a loss that is not finite",
                rank.label,
                "choose another precision; if it persists, have the device tested",
            )
    # Ranks on one CPU share its cores, so each is slow at times.
    speeds = [(rank, rank.step.images_per_s) for rank in findings.ranks if rank.step and rank.device.kind == "cuda"]
    middle = median(speed for _, speed in speeds) if speeds else 0.0
    for rank, speed in speeds:
        if speed < SLOW_DEVICE * middle:
            yield Problem(
                f"this device trains at {speed:,.0f} images/s, the median of all is {middle:,.0f}, and all wait for "
                "the slowest",
                rank.label,
                "check its temperature, clocks and PCIe lanes (nvidia-smi -q), or leave this machine out",
            )


def _versions(findings: Findings) -> Iterator[Problem]:
    """Find versions, commits and configs that differ from rank 0's."""
    first = findings.ranks[0]
    for name in sorted({name for rank in findings.ranks for name in rank.versions}):
        expected = first.versions.get(name, "missing")
        hosts: dict[str, list[str]] = defaultdict(list)
        for rank in findings.ranks:
            if rank.versions.get(name, "missing") != expected:
                hosts[rank.versions.get(name, "missing")].append(rank.host.name)
        for value, names in hosts.items():
            yield Problem(
                f"{name} is {value} here, and {expected} on {first.host.name}",
                list_hosts(names),
                "start all ranks with the same settings"
                if name == "config"
                else "install the same everywhere (one image, or one environment on a shared file system)",
            )


def _datasets(findings: Findings) -> Iterator[Problem]:
    """Find data sets that differ from rank 0's."""
    first = findings.ranks[0]
    if first.counts is None:
        return
    prints = {rank.host.name: rank.counts.fingerprint for rank in findings.ranks if rank.counts is not None}
    different = [host for host, fingerprint in prints.items() if fingerprint != first.counts.fingerprint]
    if different:
        yield Problem(
            f"the data set differs from the one on {first.host.name} (file names or labels)",
            list_hosts(different),
            "copy the data set again",
        )


def _clocks(findings: Findings) -> Iterator[Problem]:
    """Find clocks that are too far from rank 0's, even if the measurement error is subtracted."""
    skews: dict[str, float] = {}
    for rank, clock in zip(findings.ranks, findings.clocks, strict=False):
        if abs(clock.ahead) - clock.error > MAX_CLOCK_SKEW_S:
            skews.setdefault(rank.host.name, clock.ahead)
    for host, ahead in skews.items():
        direction = "ahead of" if ahead > 0 else "behind"
        yield Problem(
            f"the clock is {abs(ahead):.1f} s {direction} that of {findings.ranks[0].host.name}",
            host,
            "synchronize both with a time server (chronyd, systemd-timesyncd)",
        )


def _disk_space(findings: Findings) -> Iterator[Problem]:
    """Find disks with less free space than a run needs."""
    disks: dict[tuple[str, str], dict[str, tuple[str, int, int]]] = defaultdict(dict)
    for rank in findings.ranks:
        for folder in rank.folders:
            use = f"{size(folder.needed)} for {folder.use} in {folder.path} ({folder.key})"
            disks[rank.host.name, folder.filesystem][folder.use] = (use, folder.needed, folder.free)
    for (host, _), uses in disks.items():
        needed, free = sum(need for _, need, _ in uses.values()), min(free for _, _, free in uses.values())
        if needed > free:
            yield Problem(
                f"a disk has {size(free)} free, and the run needs {size(needed)}: "
                f"{'; '.join(use for use, _, _ in uses.values())}",
                host,
                "free disk space, choose another folder, or keep less (checkpoint.keep, data.cache_gb)",
            )


def _loader_speed(findings: Findings) -> Iterator[Problem]:
    """Find machines on which devices would wait for images."""
    for host, ranks in findings.by_host().items():
        known = [(rank.step, rank.input) for rank in ranks if rank.step is not None and rank.input is not None]
        if not known or known[0][1].per_core == 0:
            continue
        consumed = sum(step.images_per_s for step, _ in known)
        delivered, workers = sum(loader.images_per_s for _, loader in known), sum(loader.workers for _, loader in known)
        if delivered >= (LOADER_SHARE if known[0][1].workers else LOADER_SHARE_WITHOUT_WORKERS) * consumed:
            continue
        per_core, cores = known[0][1].per_core, ranks[0].host.cores
        needed = round(consumed / per_core + 0.5)
        if workers and needed <= cores and workers < needed:
            remedy = f"raise data.workers to {-(-needed // len(known))} per rank (this machine has {cores} cores)"
        else:
            remedy = (
                f"{needed} cores would keep up and this machine has {cores}: pack smaller images (lars-data pack), "
                "use a faster decoder (data.decoder=native) or a faster disk, or use more cores"
            )
        yield Problem(
            f"the loader delivers {delivered:,.0f} images/s ({per_core:,.0f} per core, decoder {known[0][1].decoder}), "
            f"and {'the device consumes' if len(known) == 1 else f'the {len(known)} devices consume'} {consumed:,.0f}",
            host,
            remedy,
        )


def _network_speed(findings: Findings) -> Iterator[Problem]:
    """Find an all-reduce that takes longer than the computation that could hide it."""
    share = findings.exchange_share
    if share is None or findings.exchange is None or share <= 1:
        return
    seconds = findings.exchange.seconds
    yield Problem(
        f"the all-reduce of an update's gradients takes {seconds:.3g} s, and the computation {seconds / share:.3g} s",
        list_hosts(rank.host.name for rank in findings.ranks),
        "check that NCCL uses the fast network (NCCL_DEBUG=INFO; NCCL_SOCKET_IFNAME, NCCL_IB_HCA), set "
        "gradient_compression=bf16, or use fewer ranks or a larger batch",
    )


def _checkpoint_speed(findings: Findings) -> Iterator[Problem]:
    """Find a disk that takes longer to write a checkpoint than the interval between checkpoints."""
    step, demands, consumed = findings.ranks[0].step, findings.demands, findings.device_images_per_s
    if step is None or demands is None or not consumed:
        return
    interval = demands.updates_between_checkpoints * demands.global_batch / consumed
    if demands.minutes_between_checkpoints is not None:
        interval = min(interval, 60 * demands.minutes_between_checkpoints)
    for folder in findings.ranks[0].folders:
        seconds = step.checkpoint_bytes * folder.write_s / folder.written if folder.written else 0.0
        if seconds > max(interval, MIN_CHECKPOINT_S):
            yield Problem(
                f"a checkpoint takes {seconds:.3g} s to write to {folder.path}, and one is due every {interval:.3g} s",
                findings.ranks[0].host.name,
                "put run.dir on a faster disk, or raise checkpoint.every_updates and checkpoint.every_minutes",
            )
