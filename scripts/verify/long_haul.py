"""A long run in little time: whether memory, open files and the time of an update stay what they are at its start.

    python scripts/verify/long_haul.py                       # 100,000 updates, 100 evaluations, 300 checkpoints
    python scripts/verify/long_haul.py --write docs/performance.md

A tiny network on synthetic pictures, with everything around the step that a run of days has: log lines, TensorBoard,
layers' values, checkpoints and evaluations. The script reads what the system says of the process, and compares the
second tenth of the run with the last.

Time is the process's CPU time, in looks that are an epoch long, so that each has its log lines, checkpoints and
evaluation; of each tenth the lower quartile is compared. What neighbours on the machine do to its caches and its clock
for a part of a tenth does not count so. What they do throughout one of the tenths does, and then the verdict is on the
machine: the range of all looks is told beside it. Nor is anything seen that slows down fewer than three quarters of the
looks, or by less than the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from arguments import count
from child import end_on_signals, started
from page import between_markers, command_line, cpu_name, writable_page

BATCH = 8
SETTINGS = (
    "data=synthetic data.val_count=256 data.num_classes=10 "
    f"data.image_size=16 model=tiny model.ghost_batch={BATCH} batch.size={BATCH} optimizer=lars optimizer.lr=0.5 "
    "schedule.warmup_epochs=1 precision=fp32 checkpoint.every_updates=400 launch.nproc=1 launch.threads=1 verbosity=0"
).split()
# Growth that is still flat: of memory in MiB, of open files, of the time of an update as a ratio.
MOST_MEMORY, MOST_FILES, MOST_TIME = 8.0, 2, 1.05
# What a tenth of the run has to have for that: two epochs, as many lines of the log, and looks that take an epoch.
LEAST_EPOCHS, LEAST_UPDATES, LEAST_LINES, LEAST_LOOKS = 20, 1000, 100, 3
_MIB = 1 << 20


@dataclass(frozen=True)
class Moment:
    """What was seen at an update: seconds since the start, the process's CPU seconds, MiB of memory, open files, bytes
    of the run's own logs, and how many files of events TensorBoard has.
    """

    update: int
    seconds: float
    cpu: float
    memory: float
    files: int
    log_bytes: int
    event_files: int


def main() -> int:
    """Run it, print the figures; 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=count, default=100, help="each with an evaluation at its end (default 100)")
    parser.add_argument("--updates", type=count, default=1000, help="in an epoch (default 1,000)")
    parser.add_argument("--log-every", type=count, default=10, help="updates between lines of the log (default 10)")
    parser.add_argument(
        "--write", type=writable_page("long_haul"), metavar="PAGE", help="put the figures between the page's markers"
    )
    args = parser.parse_args()
    updates = args.epochs * args.updates
    if args.epochs < LEAST_EPOCHS:
        parser.error(f"--epochs {args.epochs}: at least {LEAST_EPOCHS} are wanted, for two in each tenth of the run")
    if updates < LEAST_UPDATES:
        parser.error(f"--epochs times --updates is {updates}: at least {LEAST_UPDATES:,} updates are wanted")
    if updates < LEAST_LINES * args.log_every:
        parser.error(
            f"--log-every {args.log_every}: {updates:,} updates have {updates // args.log_every} lines of the log, and "
            f"at least {LEAST_LINES} are wanted"
        )
    settings = settings_of(args.epochs, args.updates, args.log_every)
    with tempfile.TemporaryDirectory() as folder:
        moments = watched(settings, updates, Path(folder))
    lines, grown = told(moments, settings, updates, args.updates)
    print("\n".join(lines))
    if args.write is not None:
        page = args.write.read_text(encoding="utf-8")
        args.write.write_text(between_markers(page, "long_haul", lines), encoding="utf-8")
    for what in grown:
        print(f"over a long run: {what}", file=sys.stderr)
    return 1 if grown else 0


def settings_of(epochs: int, updates: int, log_every: int) -> list[str]:
    """Of a run of so many epochs, with so many updates in each."""
    return [*SETTINGS, f"data.train_count={updates * BATCH}", f"epochs={epochs}", f"log_every={log_every}"]


def watched(settings: list[str], updates: int, folder: Path) -> list[Moment]:
    """The run, looked at a few hundred times. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "lars_train", *settings, f"run.dir={folder / 'run'}"]
    moments: list[Moment] = []
    began = time.perf_counter()
    with (folder / "told").open("wb") as log, started(command, stdout=log, stderr=log) as process:
        while process.poll() is None:
            moment = look(process.pid, folder / "run", time.perf_counter() - began)
            if moment is not None and moment.update >= (moments[-1].update if moments else 0) + updates / 400:
                moments.append(moment)
            time.sleep(0.02)
    if process.returncode:
        print((folder / "told").read_text(), file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command)
    return moments


def look(pid: int, run: Path, seconds: float) -> Moment | None:
    """The process now; None before its first line in the log, or when it is gone."""
    try:
        update = last_update(run / "metrics.jsonl")
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        # After the name in brackets: the 12th and 13th field are the ticks in user and in system mode.
        ticks = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        files = len(os.listdir(f"/proc/{pid}/fd"))
        events = list((run / "tensorboard").rglob("events*"))
        log_bytes = sum(path.stat().st_size for path in (run / "metrics.jsonl", *events))
    except (OSError, ValueError, IndexError):
        return None
    if update is None:
        return None
    cpu, memory = ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / _MIB
    return Moment(update, seconds, cpu, memory, files, log_bytes, len(events))


def last_update(path: Path) -> int | None:
    """Of the last whole line of a run's metrics."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        if line.startswith(b'{"update"'):
            return int(json.loads(line)["update"])
    return None


@dataclass(frozen=True)
class Part:
    """Of a tenth of the run: MiB of memory and open files (medians), and CPU milliseconds an update in each look."""

    memory: float
    files: float
    times: tuple[float, ...]

    @property
    def time(self) -> float:
        """The lower quartile of the looks."""
        return statistics.quantiles(self.times, n=4, method="inclusive")[0]


def early_and_late(moments: list[Moment], epoch: int) -> tuple[Part, Part]:
    """The second and the last tenth of a run whose epochs have so many updates.

    Raises:
        ValueError: there were too few looks at one of them.
    """
    last = moments[-1].update if moments else 0
    return (
        part([one for one in moments if 0.1 * last <= one.update < 0.2 * last], epoch, "second"),
        part([one for one in moments if one.update >= 0.9 * last], epoch, "last"),
    )


def part(moments: list[Moment], epoch: int, name: str) -> Part:
    """Of the moments of a tenth; from each, a look at the time goes on for an epoch at least."""
    times = []
    for number, first in enumerate(moments):
        end = next((one for one in moments[number:] if one.update >= first.update + epoch), None)
        if end is not None:
            times.append(1000 * (end.cpu - first.cpu) / (end.update - first.update))
    if len(times) < LEAST_LOOKS:
        raise ValueError(
            f"the {name} tenth of the run was over after {len(times)} looks of an epoch, and {LEAST_LOOKS} are wanted: "
            "more --epochs or more --updates give it more"
        )
    memory, files = (statistics.median(getattr(one, key) for one in moments) for key in ("memory", "files"))
    return Part(memory, files, tuple(times))


def told(moments: list[Moment], settings: list[str], updates: int, epoch: int) -> tuple[list[str], list[str]]:
    """The figures of a run of so many updates, `epoch` of them in each, as Markdown, and what grew beyond its limit."""
    (early, late), last = early_and_late(moments, epoch), moments[-1]
    memory, files, slower = late.memory - early.memory, late.files - early.files, late.time / early.time
    growth = (
        (f"memory grew by {memory:.1f} MiB", MOST_MEMORY, memory),
        (f"open files grew by {files:.0f}", MOST_FILES, files),
        (f"an update took {slower:.2f} times as long", MOST_TIME, round(slower, 2)),
    )
    lines = [
        f"`{command_line(__file__)}` on {cpu_name()}, one thread: {updates:,} updates, looked at until "
        f"{last.update:,}, in {last.seconds / 60:.0f} minutes, `lars-train {' '.join(settings)}`.",
        "",
        "| | second tenth of the run | last tenth |",
        "|---|---:|---:|",
        f"| memory, MiB | {early.memory:,.1f} | {late.memory:,.1f} |",
        f"| open files | {early.files:.0f} | {late.files:.0f} |",
        "| CPU time an update, with log, checkpoints and evaluations, ms: lower quartile (least to most) | "
        + " | ".join(f"{one.time:.2f} ({min(one.times):.2f} to {max(one.times):.2f})" for one in (early, late))
        + " |",
        "",
        f"Bytes of metrics.jsonl and TensorBoard's files an update: {last.log_bytes / last.update:,.0f}; files that "
        f"TensorBoard's events went on in, each of them closed before the next: {last.event_files}.",
        "",
        *(f"- over a long run: {what}" for what, _, _ in growth),
    ]
    return lines, [f"{what}; at most {most:g} is flat" for what, most, value in growth if value > most]


if __name__ == "__main__":
    end_on_signals()
    try:
        sys.exit(main())
    except (subprocess.CalledProcessError, ValueError) as error:
        sys.exit(str(error))
