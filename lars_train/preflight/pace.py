"""What holds the devices up, by how fast they, the input, the network and the disk were seen to be. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator

from lars_train.preflight.facts import Findings, Rank
from lars_train.preflight.judge import Problem, by_host, list_hosts

INPUT_SHARE = 0.9
"""Of what the devices eat, the least that the input should bring."""

INPUT_SHARE_ALONE = 0.25
"""The same where the process that trains reads, too: beyond that, reading takes most of the time."""

WORTH_S = 5.0
"""Seconds of a checkpoint that are worth a word, however often a small run makes one."""


def achieved(rank: Rank) -> float | None:
    """Images per second of a rank with its input; None where one of the two is not known.

    With workers the slower of both; without, the process does one after the other.
    """
    # Of a few images alone no pace is measured.
    if rank.step is None or rank.input is None or not rank.input.images_per_s:
        return None
    eats, brings = rank.step.images_per_s, rank.input.images_per_s
    return min(eats, brings) if rank.input.workers else 1 / (1 / eats + 1 / brings)


def input_pace(findings: Findings) -> Iterator[Problem]:
    """Machines whose devices would wait for pictures."""
    for host, ranks in by_host(findings).items():
        known = [(rank.step, rank.input) for rank in ranks if rank.step is not None and rank.input is not None]
        # Of a few images alone no pace is measured.
        if not known or known[0][1].per_core == 0:
            continue
        eats, brings = sum(step.images_per_s for step, _ in known), sum(found.images_per_s for _, found in known)
        share = INPUT_SHARE if known[0][1].workers else INPUT_SHARE_ALONE
        if brings >= share * eats:
            continue
        per_core, workers = known[0][1].per_core, sum(found.workers for _, found in known)
        cores = ranks[0].host.cores
        wanted = round(eats / per_core + 0.5)
        told = (
            f"the input brings {brings:,.0f} images/s ({per_core:,.0f} per core, decoder {known[0][1].decoder}), and "
            f"{'the device consumes' if len(known) == 1 else f'the {len(known)} devices consume'} {eats:,.0f}"
        )
        if workers and wanted <= cores and workers < wanted:
            remedy = f"raise data.workers to {-(-wanted // len(known))} a rank ({cores} cores are here)"
        else:
            remedy = (
                f"{wanted} cores would keep up and {cores} are here: pack the pictures smaller (lars-data pack), "
                "use a faster decoder (data.decoder=native) or a faster disk, or take more cores"
            )
        yield Problem(told, host, remedy)


def network_pace(findings: Findings) -> Iterator[Problem]:
    """An exchange of gradients that takes longer than what it is to be hidden behind."""
    share = exchange_share(findings)
    if share is None or findings.exchange is None or share <= 1:
        return
    update = findings.exchange.seconds / share
    yield Problem(
        f"the ranks exchange an update's gradients in {findings.exchange.seconds:.3g} s, and compute for "
        f"{update:.3g} s",
        list_hosts(rank.host.name for rank in findings.ranks),
        "see that NCCL uses the fast network (NCCL_DEBUG=INFO; NCCL_SOCKET_IFNAME, NCCL_IB_HCA), set "
        "gradient_compression=bf16, or use fewer ranks or a larger batch",
    )


def exchange_share(findings: Findings) -> float | None:
    """Seconds of exchange for each second of an update's computation; None where one is not known."""
    eaten = findings.eaten_per_s
    if findings.exchange is None or findings.demands is None or not eaten:
        return None
    return findings.exchange.seconds * eaten / findings.demands.global_batch


def disk_pace(findings: Findings) -> Iterator[Problem]:
    """A disk to which a checkpoint takes longer to write than a run takes to the next one."""
    step, demands, eaten = findings.ranks[0].step, findings.demands, findings.eaten_per_s
    if step is None or demands is None or not eaten:
        return
    every = demands.updates_between_checkpoints * demands.global_batch / eaten
    if demands.minutes_between_checkpoints is not None:
        every = min(every, 60 * demands.minutes_between_checkpoints)
    for folder in findings.ranks[0].folders:
        seconds = step.checkpoint_bytes * folder.write_s / folder.written if folder.written else 0.0
        if seconds > max(every, WORTH_S):
            yield Problem(
                f"a checkpoint takes {seconds:.3g} s to write to {folder.path}, and one is due every {every:.3g} s",
                findings.ranks[0].host.name,
                "put run.dir on a faster disk, or raise checkpoint.every_updates and checkpoint.every_minutes",
            )
