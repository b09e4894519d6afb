"""Check that memory, open files and the time of an update stay constant over a long run.

    python scripts/verify/long_haul.py [--write docs/benchmarks.md]      # 100,000 updates, 100 evaluations

A tiny network trains on synthetic images, with everything else that a long run does: log lines, TensorBoard,
per-layer values, checkpoints and evaluations. The script reads the system's figures about the process, and compares
the second tenth of the run with the last: medians of memory and open files, and the CPU time of an update, which
includes the tenth's log lines, checkpoints and evaluations. The exit code is 1 if a figure grew.

Takes about nine minutes. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

BATCH = 8
SETTINGS = (
    "data=synthetic data.val_count=256 data.num_classes=10 "
    f"data.image_size=16 model=tiny model.ghost_batch={BATCH} batch.size={BATCH} optimizer=lars optimizer.lr=0.5 "
    "schedule.warmup_epochs=1 precision=fp32 checkpoint.every_updates=400 launch.nproc=1 launch.threads=1 verbosity=0 "
    "log_every=10"
).split()
# Permitted growth: of memory in MiB, of open files, of the time of an update as a ratio.
MAX_MEMORY, MAX_FILES, MAX_TIME = 8.0, 2, 1.1
MIN_EPOCHS = 20  # two evaluations in each tenth of the run
UPDATES = 1000  # in an epoch
_MIB = 1 << 20


@dataclass(frozen=True)
class Moment:
    """The state of the process at an update: `cpu` seconds so far, `memory` in MiB, and open `files`."""

    update: int
    cpu: float
    memory: float
    files: int


def main() -> int:
    """Run and print the figures. Return 1 if a figure grew."""
    parser = shared.make_parser(__doc__, "long_haul")
    parser.add_argument("--epochs", type=shared.positive_int, default=100, help="of 1,000 updates each (100)")
    args = parser.parse_args()
    if args.epochs < MIN_EPOCHS:
        parser.error(f"--epochs {args.epochs}: needs at least {MIN_EPOCHS}, two in each tenth of the run")
    settings = [*SETTINGS, f"data.train_count={UPDATES * BATCH}", f"epochs={args.epochs}"]
    with tempfile.TemporaryDirectory() as folder:
        moments = watch(settings, args.epochs * UPDATES, Path(folder))
    lines, growth = report(moments, settings)
    shared.publish(lines, args.write, "long_haul")
    for what in growth:
        print(f"over a long run: {what}", file=sys.stderr)
    return 1 if growth else 0


def watch(settings: list[str], updates: int, folder: Path) -> list[Moment]:
    """Run, and sample the state of the process about 400 times. Exit if the run fails."""
    command = [*shared.LARS_TRAIN, *settings, f"run.dir={folder / 'run'}"]
    moments: list[Moment] = []
    with (folder / "output").open("wb") as log, shared.running(command, stdout=log, stderr=log) as process:
        while process.poll() is None:
            moment = sample(process.pid, folder / "run")
            if moment is not None and moment.update >= (moments[-1].update if moments else 0) + updates / 400:
                moments.append(moment)
            time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{(folder / 'output').read_text()}\n{command}: ended with code {process.returncode}")
    return moments


def sample(pid: int, run: Path) -> Moment | None:
    """Return the state of the process, or None before its first log line and after its end."""
    try:
        update = last_update(run / "metrics.jsonl")
        # After the name in brackets, fields 12 and 13 are the ticks in user and in system mode.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks, pages = int(fields[11]) + int(fields[12]), int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except (OSError, ValueError, IndexError):
        return None
    if update is None:
        return None
    return Moment(update, ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / _MIB, files)


def last_update(path: Path) -> int | None:
    """Return the update of the last complete line of a run's metrics."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().split(b"\n")[:-1]
    return next((int(json.loads(line)["update"]) for line in reversed(lines) if line.startswith(b'{"update"')), None)


def report(moments: list[Moment], settings: list[str]) -> tuple[list[str], list[str]]:
    """Return the figures as Markdown, and a line for each figure that grew beyond its limit."""
    end = moments[-1].update
    tenths = (
        [one for one in moments if 0.1 * end <= one.update < 0.2 * end],
        [one for one in moments if one.update >= 0.9 * end],
    )
    memory, files = ([median(getattr(one, key) for one in tenth) for tenth in tenths] for key in ("memory", "files"))
    times = [1000 * (own[-1].cpu - own[0].cpu) / (own[-1].update - own[0].update) for own in tenths]
    lines = [
        f"`{shared.command_line(__file__)}` on {shared.cpu_name()}, one thread: {end:,} updates of "
        f"`lars-train {' '.join(settings)}`.",
        "",
        "| | second tenth of the run | last tenth |",
        "|---|---:|---:|",
        f"| memory, MiB | {memory[0]:,.1f} | {memory[1]:,.1f} |",
        f"| open files | {files[0]:.0f} | {files[1]:.0f} |",
        f"| CPU time of an update, with log lines, checkpoints and evaluations, ms | {times[0]:.2f} | {times[1]:.2f} |",
    ]
    growth = (
        (f"memory grew by {memory[1] - memory[0]:.1f} MiB", MAX_MEMORY, memory[1] - memory[0]),
        (f"open files grew by {files[1] - files[0]:.0f}", MAX_FILES, files[1] - files[0]),
        (f"an update took {times[1] / times[0]:.2f} times as long", MAX_TIME, times[1] / times[0]),
    )
    return lines, [f"{what}; the limit is {most:g}" for what, most, value in growth if value > most]


if __name__ == "__main__":
    shared.exit_on_signals()
    sys.exit(main())
