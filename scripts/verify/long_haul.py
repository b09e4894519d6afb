"""Check that memory, open files and the time of an update stay constant over a long run.

    python scripts/verify/long_haul.py [--write docs/benchmarks.md]      # 100,000 updates, 100 evaluations

A tiny network trains on synthetic images, with everything around the step in a long run: log lines, TensorBoard,
per-layer values, checkpoints and evaluations. The script reads the system's figures about the process, and compares
the second tenth of the run with the last. The exit code is 1 if a figure grew.

Time is the CPU time of the process per epoch, so that each sample includes log lines, checkpoints and an evaluation.
The script compares the lower quartile of each tenth, so that other processes that disturb a part of a tenth do not
count; the report shows the range of all samples. A slowdown is not detected if it affects less than three quarters of
the samples, or is below the limit.

Takes about nine minutes. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

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
import shared

BATCH = 8
SETTINGS = (
    "data=synthetic data.val_count=256 data.num_classes=10 "
    f"data.image_size=16 model=tiny model.ghost_batch={BATCH} batch.size={BATCH} optimizer=lars optimizer.lr=0.5 "
    "schedule.warmup_epochs=1 precision=fp32 checkpoint.every_updates=400 launch.nproc=1 launch.threads=1 verbosity=0"
).split()
# Permitted growth: of memory in MiB, of open files, of the time of an update as a ratio.
MAX_MEMORY, MAX_FILES, MAX_TIME = 8.0, 2, 1.05
# A tenth of the run needs two epochs, ten log lines, and three samples of an epoch.
MIN_EPOCHS, MIN_LINES, MIN_SAMPLES = 20, 100, 3
_MIB = 1 << 20


@dataclass(frozen=True)
class Moment:
    """The state of the process at an update.

    `seconds` since the start, `cpu` seconds, `memory` in MiB, open `files`, and the size and number of log files.
    """

    update: int
    seconds: float
    cpu: float
    memory: float
    files: int
    log_bytes: int
    event_files: int


@dataclass(frozen=True)
class Tenth:
    """A tenth of the run: median MiB of memory, median open files, and CPU milliseconds per update of each sample."""

    memory: float
    files: float
    times: tuple[float, ...]

    @property
    def time(self) -> float:
        """The lower quartile of the samples."""
        return statistics.quantiles(self.times, n=4, method="inclusive")[0]


def main() -> int:
    """Run and print the figures. Return 1 if a figure grew."""
    parser = shared.make_parser(__doc__, "long_haul")
    parser.add_argument("--epochs", type=shared.positive_int, default=100, help="each with an evaluation (100)")
    parser.add_argument("--updates", type=shared.positive_int, default=1000, help="per epoch (1,000)")
    parser.add_argument("--log-every", type=shared.positive_int, default=10, help="updates between log lines (10)")
    args = parser.parse_args()
    updates = args.epochs * args.updates
    if args.epochs < MIN_EPOCHS:
        parser.error(f"--epochs {args.epochs}: needs at least {MIN_EPOCHS}, two in each tenth of the run")
    if updates < MIN_LINES * args.log_every:
        parser.error(f"--log-every {args.log_every}: {updates:,} updates have fewer than {MIN_LINES} log lines")
    settings = [*SETTINGS, f"data.train_count={args.updates * BATCH}", f"epochs={args.epochs}"]
    settings.append(f"log_every={args.log_every}")
    with tempfile.TemporaryDirectory() as folder:
        moments = watch(settings, updates, Path(folder))
    lines, growth = report(moments, settings, updates, args.updates)
    shared.publish(lines, args.write, "long_haul")
    for what in growth:
        print(f"over a long run: {what}", file=sys.stderr)
    return 1 if growth else 0


def watch(settings: list[str], updates: int, folder: Path) -> list[Moment]:
    """Run, and sample the state of the process about 400 times.

    Raises:
        CalledProcessError: the run failed.
    """
    command = [sys.executable, "-m", "lars_train", *settings, f"run.dir={folder / 'run'}"]
    moments: list[Moment] = []
    began = time.perf_counter()
    with (folder / "output").open("wb") as log, shared.running(command, stdout=log, stderr=log) as process:
        while process.poll() is None:
            moment = sample(process.pid, folder / "run", time.perf_counter() - began)
            if moment is not None and moment.update >= (moments[-1].update if moments else 0) + updates / 400:
                moments.append(moment)
            time.sleep(0.02)
    if process.returncode:
        print((folder / "output").read_text(), file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command)
    return moments


def sample(pid: int, run: Path, seconds: float) -> Moment | None:
    """Return the state of the process, or None before its first log line and after its end."""
    try:
        update = last_update(run / "metrics.jsonl")
        # After the name in brackets, fields 12 and 13 are the ticks in user and in system mode.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks, pages = int(fields[11]) + int(fields[12]), int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        events = list((run / "tensorboard").rglob("events*"))
        log_bytes = sum(path.stat().st_size for path in [run / "metrics.jsonl", *events])
    except (OSError, ValueError, IndexError):
        return None
    if update is None:
        return None
    cpu, memory = ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / _MIB
    return Moment(update, seconds, cpu, memory, files, log_bytes, len(events))


def last_update(path: Path) -> int | None:
    """Return the update of the last complete line of a run's metrics."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().split(b"\n")[:-1]
    return next((int(json.loads(line)["update"]) for line in reversed(lines) if line.startswith(b'{"update"')), None)


def summarize(moments: list[Moment], epoch: int, name: str) -> Tenth:
    """Return the figures of a tenth of the run. Each sample of the time covers at least an epoch.

    Raises:
        ValueError: the tenth has too few samples.
    """
    times = []
    for number, first in enumerate(moments):
        end = next((one for one in moments[number:] if one.update >= first.update + epoch), None)
        if end is not None:
            times.append(1000 * (end.cpu - first.cpu) / (end.update - first.update))
    if len(times) < MIN_SAMPLES:
        raise ValueError(
            f"the {name} tenth of the run has {len(times)} samples of an epoch, but needs {MIN_SAMPLES}; increase "
            "--epochs or --updates"
        )
    memory, files = (statistics.median(getattr(one, key) for one in moments) for key in ("memory", "files"))
    return Tenth(memory, files, tuple(times))


def report(moments: list[Moment], settings: list[str], updates: int, epoch: int) -> tuple[list[str], list[str]]:
    """Return the figures as Markdown, and a line for each figure that grew beyond its limit."""
    end = moments[-1].update if moments else 0
    early = summarize([one for one in moments if 0.1 * end <= one.update < 0.2 * end], epoch, "second")
    late = summarize([one for one in moments if one.update >= 0.9 * end], epoch, "last")
    last = moments[-1]
    memory, files, slower = late.memory - early.memory, late.files - early.files, late.time / early.time
    growth = (
        (f"memory grew by {memory:.1f} MiB", MAX_MEMORY, memory),
        (f"open files grew by {files:.0f}", MAX_FILES, files),
        (f"an update took {slower:.2f} times as long", MAX_TIME, round(slower, 2)),
    )
    times = [f"{one.time:.2f} ({min(one.times):.2f} to {max(one.times):.2f})" for one in (early, late)]
    lines = [
        f"`{shared.command_line(__file__)}` on {shared.cpu_name()}, one thread: {updates:,} updates, watched until "
        f"{last.update:,}, in {last.seconds / 60:.0f} minutes, `lars-train {' '.join(settings)}`.",
        "",
        "| | second tenth of the run | last tenth |",
        "|---|---:|---:|",
        f"| memory, MiB | {early.memory:,.1f} | {late.memory:,.1f} |",
        f"| open files | {early.files:.0f} | {late.files:.0f} |",
        "| CPU time an update, with log, checkpoints and evaluations, ms: lower quartile (least to most) | "
        f"{times[0]} | {times[1]} |",
        "",
        f"Bytes of metrics.jsonl and TensorBoard's files an update: {last.log_bytes / last.update:,.0f}; TensorBoard's "
        f"event files, of which one is open at a time: {last.event_files}.",
        "",
        *(f"- over a long run: {what}" for what, _, _ in growth),
    ]
    return lines, [f"{what}; the limit is {most:g}" for what, most, value in growth if value > most]


if __name__ == "__main__":
    shared.exit_on_signals()
    try:
        sys.exit(main())
    except (subprocess.CalledProcessError, ValueError) as error:
        sys.exit(str(error))
