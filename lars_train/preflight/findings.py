"""What was measured, in lines for a person. Nothing is judged here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

from lars_train.messages import counted, operations, rate, size
from lars_train.preflight.facts import Findings, Rank
from lars_train.preflight.judge import by_host, list_hosts
from lars_train.preflight.pace import achieved, exchange_share


def describe_findings(findings: Findings) -> Iterator[str]:
    """One line, or several, of each subject."""
    yield from _of_hosts(findings, "machine", _machine)
    yield from _of_hosts(findings, "limits", _limits)
    yield from _devices(findings)
    yield from _of_hosts(findings, "data", _data)
    yield from _of_hosts(findings, "", _inventory)
    yield from _paces(findings)
    yield from _places(findings)
    yield from _between(findings)


def _line(label: str, text: str) -> str:
    return f"{label:<15}{text}"


def _of_hosts(findings: Findings, label: str, told: Callable[[list[Rank]], str | None]) -> Iterator[str]:
    """Machines of which the same can be told share a line."""
    same: dict[str, list[str]] = defaultdict(list)
    for name, ranks in by_host(findings).items():
        text = told(ranks)
        if text is not None:
            same[text].append(name)
    for text, names in same.items():
        yield _line(label, f"{list_hosts(names)}: {text}")


def _machine(ranks: list[Rank]) -> str:
    host = ranks[0].host
    return (
        f"{counted(len(ranks), 'rank')}, {counted(host.cores, 'core')}, {host.memory_free / 1e9:.0f} GB of free memory"
    )


def _limits(ranks: list[Rank]) -> str:
    host = ranks[0].host
    shared = "unknown" if host.shared_memory_free is None else f"{size(host.shared_memory_free)} free"
    return f"{host.open_files:,} open files a process, /dev/shm {shared}"


def _devices(findings: Findings) -> Iterator[str]:
    same: dict[str, list[Rank]] = defaultdict(list)
    for rank in findings.ranks:
        same[f"{rank.device.name}, {rank.device.memory / 1e9:.0f} GB"].append(rank)
    for name, ranks in same.items():
        yield _line("device", f"{len(ranks)} x {name}")
        speeds = {
            precision: sorted(rank.device.precisions.get(precision, 0.0) for rank in ranks)[len(ranks) // 2]
            for precision in ranks[0].device.precisions
        }
        yield _line("precision", ", ".join(f"{p} {operations(speed)}/s" for p, speed in speeds.items()))


def _data(ranks: list[Rank]) -> str | None:
    counts = ranks[0].counts
    if counts is None:
        return None
    samples = [rank.sample for rank in ranks if rank.sample is not None]
    tried, bad = sum(one.images for one in samples), sum(len(one.bad) for one in samples)
    read, took = sum(one.bytes for one in samples), sum(one.read_s for one in samples)
    return (
        f"{counts.data}, {counts.train:,} training and {counts.val:,} validation images, "
        f"{counted(counts.classes, 'class', 'classes')}; "
        f"of {tried:,} tried, {bad} cannot be decoded; read at {size(read / max(took, 1e-9))}/s by one process"
    )


def _inventory(ranks: list[Rank]) -> str | None:
    counts = ranks[0].counts
    return None if counts is None else "; ".join(counts.inventory.lines()) or None


def _paces(findings: Findings) -> Iterator[str]:
    steps = [rank.step for rank in findings.ranks if rank.step is not None]
    if steps:
        rates = sorted(step.images_per_s for step in steps)
        spread = "" if len(rates) == 1 else f" ({rate(rates[0])} to {rate(rates[-1])})"
        yield _line(
            "training step",
            f"{rate(sum(rates))} images/s on {counted(len(rates), 'rank')}{spread}, {steps[0].precision}, micro-batch "
            f"{steps[0].samples}",
        )
    inputs = [rank.input for rank in findings.ranks if rank.input is not None]
    if inputs:
        per_core = sum(one.per_core for one in inputs) / len(inputs)
        kind = f"{counted(inputs[0].workers, 'worker')} a rank" if inputs[0].workers else "no workers"
        yield _line(
            "input",
            f"{rate(sum(one.images_per_s for one in inputs))} images/s, {rate(per_core)} per core, {kind}, decoder "
            f"{inputs[0].decoder}",
        )
    together = [found for rank in findings.ranks if (found := achieved(rank)) is not None]
    if together:
        yield _line("both", f"{rate(len(together) * min(together))} images/s, with the slowest rank's pace for all")


def _places(findings: Findings) -> Iterator[str]:
    for rank in findings.ranks:
        for folder in rank.folders:
            speed = f", written at {size(folder.written / folder.write_s)}/s" if folder.written else ""
            yield _line(
                folder.use,
                f"{rank.host.name}:{folder.path}: {size(folder.needed)} wanted, {size(folder.free)} free{speed}",
            )


def _between(findings: Findings) -> Iterator[str]:
    world, took = len(findings.ranks), findings.exchange
    if took is None:
        return
    share = exchange_share(findings)
    part = "" if share is None else f", {100 * share:.2g} % of an update's computation"
    yield _line(
        "all-reduce",
        f"{size(took.bytes)} in {1e3 * took.seconds:.3g} ms, {size(took.bus_bandwidth(world))}/s on each link, one "
        f"number in {1e3 * took.latency:.2g} ms{part}",
    )
    furthest = max(findings.clocks, key=lambda clock: abs(clock.ahead))
    yield _line("clocks", f"within {abs(furthest.ahead):.2g} s, give or take {furthest.error:.2g} s")
