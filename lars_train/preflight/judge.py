"""What is to be mended on machines, devices and data, by what was measured there. Pure functions.

How fast things are against each other is judged in pace.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from lars_train.messages import size
from lars_train.plan import IMAGENET_TRAIN_IMAGES
from lars_train.preflight.facts import Findings, Rank

IMAGENET = (IMAGENET_TRAIN_IMAGES, 50_000, 1_000)
"""Training and validation images, and classes (ILSVRC 2012, https://image-net.org/challenges/LSVRC/2012/)."""

LEAST_OPEN_FILES, FILES_PER_WORKER, FILES_PER_RANK = 1024, 8, 4
"""Open files that a process may need: at least, and for each of its workers (pictures, shards, pipes), and for each
rank of the job (sockets)."""

LEAST_SHARED_MEMORY = 1 << 30
"""Bytes of ``/dev/shm`` that NCCL wants (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html,
Shared Memory)."""

MOST_SKEW_S = 1.0
"""More than this, and logs and files of two machines are in no order any more."""

MOST_TAKEN = 2 * 10**9
"""Bytes of a device's memory that drivers and desktops take; more than that is another program."""

BUFFERS_SHARE = 0.5
"""The share of a machine's free memory that the loaders' buffers may take."""

_NAMED = 4


@dataclass(frozen=True)
class Problem:
    """One thing to mend."""

    what: str
    where: str
    """The machine, or the rank on it."""
    remedy: str = ""
    """Empty where `what` says it already."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f". To mend: {self.remedy}." if self.remedy else "")


def machines(findings: Findings) -> Iterator[Problem]:
    """Limits and memory of each machine, and that it sees the run directory."""
    world = len(findings.ranks)
    for host, ranks in by_host(findings).items():
        facts = ranks[0].host
        workers = max((rank.input.workers for rank in ranks if rank.input is not None), default=0)
        wanted = max(LEAST_OPEN_FILES, LEAST_OPEN_FILES // 2 + FILES_PER_WORKER * workers + FILES_PER_RANK * world)
        if facts.open_files < wanted:
            root = "" if facts.most_open_files >= wanted else " (as root; for Docker --ulimit nofile=65536)"
            yield Problem(
                f"a process may open {facts.open_files:,} files, and a rank may need {wanted:,}",
                host,
                f"ulimit -n {max(wanted, 65536 if not root else wanted)} before the start{root}",
            )
        shared = facts.shared_memory_free
        if len(ranks) > 1 and ranks[0].device.kind == "cuda" and shared is not None and shared < LEAST_SHARED_MEMORY:
            yield Problem(
                f"/dev/shm has {size(shared)} free, and NCCL wants {size(LEAST_SHARED_MEMORY)}",
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
        for rank in ranks:
            if rank.unseen is not None:
                yield Problem(
                    f"it does not see what rank 0 writes in {rank.unseen}",
                    host,
                    "put run.dir on a file system that all machines share",
                )
                break


def devices(findings: Findings) -> Iterator[Problem]:
    """Memory that others hold, devices that two ranks share, ones that are slow or compute nonsense."""
    shared = Counter((rank.host.name, rank.device.identity) for rank in findings.ranks if rank.device.identity)
    for (host, _), count in shared.items():
        if count > 1:
            yield Problem(
                f"{count} ranks compute on the same device", host, "start one process per device (--nproc-per-node)"
            )
    for rank in findings.ranks:
        where = place(rank)
        if rank.device.memory_taken > MOST_TAKEN:
            yield Problem(
                f"{size(rank.device.memory_taken)} of {size(rank.device.memory)} of its memory are in use already",
                where,
                "end the other program (nvidia-smi lists them)",
            )
        if rank.step is not None and not rank.step.finite:
            yield Problem(
                "a training step on made-up images gave a loss that is not finite",
                where,
                "choose another precision; if it persists, have the device tested",
            )
    speeds = [rank.step.images_per_s for rank in findings.ranks if rank.step and rank.device.kind == "cuda"]
    for rank in findings.ranks:
        # Ranks on one CPU share its cores, and take turns at being slow.
        if rank.step is not None and rank.device.kind == "cuda" and rank.step.images_per_s < 0.8 * median(speeds):
            yield Problem(
                f"it trains on {rank.step.images_per_s:,.0f} images/s, the median of all devices is "
                f"{median(speeds):,.0f}, and all wait for the slowest",
                place(rank),
                "look at its temperature, clocks and lanes (nvidia-smi -q), or leave this machine out",
            )


def agreement(findings: Findings) -> Iterator[Problem]:
    """What differs between ranks: versions, commits, configs, data; and clocks."""
    first = findings.ranks[0]
    for name in sorted({name for rank in findings.ranks for name in rank.versions}):
        theirs = first.versions.get(name, "not there")
        others: dict[str, list[str]] = defaultdict(list)
        for rank in findings.ranks:
            if rank.versions.get(name, "not there") != theirs:
                others[rank.versions.get(name, "not there")].append(rank.host.name)
        for value, hosts in others.items():
            yield Problem(
                f"{name} is {value} here, and {theirs} on {first.host.name}",
                list_hosts(hosts),
                "start all ranks with the same settings"
                if name == "config"
                else "install the same everywhere (one image, or one environment on a shared file system)",
            )
    prints = {rank.host.name: rank.counts.fingerprint for rank in findings.ranks if rank.counts is not None}
    if first.counts is not None:
        apart = [host for host, found in prints.items() if found != first.counts.fingerprint]
        if apart:
            yield Problem(
                f"its data set is another than on {first.host.name} (file names or labels differ)",
                list_hosts(apart),
                "copy the data set anew",
            )
    skews: dict[str, float] = {}
    for rank, clock in zip(findings.ranks, findings.clocks, strict=False):
        if abs(clock.ahead) - clock.error > MOST_SKEW_S:
            skews.setdefault(rank.host.name, clock.ahead)
    for host, ahead in skews.items():
        direction = "ahead of" if ahead > 0 else "behind"
        yield Problem(
            f"its clock is {abs(ahead):.1f} s {direction} that of {first.host.name}",
            host,
            "have both follow a time server (chronyd, systemd-timesyncd)",
        )


def data(findings: Findings) -> Iterator[Problem]:
    """Errors that would end a run at once, wrong counts, pictures that cannot be read."""
    refused: dict[str, list[str]] = defaultdict(list)
    for rank in findings.ranks:
        for error in rank.refused:
            refused[error].append(rank.host.name)
    for error, hosts in refused.items():
        yield Problem(error, list_hosts(hosts))
    counted: dict[tuple[int, int, int], list[str]] = defaultdict(list)
    for rank in findings.ranks:
        counts = rank.counts
        if counts is None or counts.data != "imagenet":
            continue
        found = (counts.train, counts.val, counts.classes)
        # What is held out are images of train/.
        images, wanted = ((counts.train + counts.val,), IMAGENET[:1]) if counts.held_out else (found[:2], IMAGENET[:2])
        if (*images, counts.classes) != (*wanted, IMAGENET[2]):
            counted[found].append(rank.host.name)
    for found, hosts in counted.items():
        yield Problem(
            f"data=imagenet has {found[0]:,} training images, {found[1]:,} validation images and {found[2]:,} classes "
            f"here, and ImageNet {IMAGENET[0]:,}, {IMAGENET[1]:,} and {IMAGENET[2]:,}",
            list_hosts(hosts),
            "unpack the archives again, or for a data set of your own set data=folder",
        )
    bad: dict[str, list[str]] = defaultdict(list)
    for rank in findings.ranks:
        for place_and_reason in rank.sample.bad if rank.sample is not None else ():
            bad[place_and_reason].append(rank.host.name)
    if bad:
        tried = sum(rank.sample.images for rank in findings.ranks if rank.sample is not None)
        named = "; ".join(list(bad)[:_NAMED]) + (f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
        demands = findings.demands
        allowed = f" (data.max_bad={demands.max_bad} end a run)" if demands is not None else ""
        yield Problem(
            f"{len(bad)} of {tried:,} pictures that were tried cannot be decoded{allowed}: {named}",
            list_hosts([host for hosts in bad.values() for host in hosts]),
            "restore those files, or remove them",
        )


def room(findings: Findings) -> Iterator[Problem]:
    """Disks that are too full for what a run keeps on them."""
    on: dict[tuple[str, str], dict[str, tuple[str, int, int]]] = defaultdict(dict)
    for rank in findings.ranks:
        for folder in rank.folders:
            told = f"{size(folder.needed)} for {folder.use} in {folder.path} ({folder.key})"
            on[rank.host.name, folder.filesystem][folder.use] = (told, folder.needed, folder.free)
    for (host, _), uses in on.items():
        needed, free = sum(need for _, need, _ in uses.values()), min(free for _, _, free in uses.values())
        if needed > free:
            keys = "; ".join(told for told, _, _ in uses.values())
            yield Problem(
                f"{size(free)} are free on a disk that wants {size(needed)}: {keys}",
                host,
                "make room, choose another place, or keep less (checkpoint.keep, data.cache_gb)",
            )


def by_host(findings: Findings) -> dict[str, list[Rank]]:
    """The ranks of each machine, by its name."""
    hosts: dict[str, list[Rank]] = defaultdict(list)
    for rank in findings.ranks:
        hosts[rank.host.name].append(rank)
    return dict(hosts)


def place(rank: Rank) -> str:
    """A rank as a person looks for it."""
    return f"rank {rank.rank} ({rank.device.name}, number {rank.local_rank} of {rank.host.name})"


def list_hosts(hosts: Iterable[str]) -> str:
    """Some names once each, and how many more there are."""
    names = sorted(set(hosts))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
