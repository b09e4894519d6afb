"""A long run in little time: whether memory, open files and the time of an update stay what they are at its start.

    python scripts/long_haul.py                                   # 100,000 updates, 100 evaluations, 300 checkpoints
    python scripts/long_haul.py --write docs/performance.md

A tiny network on synthetic pictures, with everything around the step that a run of days has: log lines, TensorBoard,
layers' values, checkpoints and evaluations. The script reads what the system says of the process, and compares the
second tenth of the run with the last. Time is the process's CPU time: other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from page import between_markers, cpu_name

BATCH = 8
SETTINGS = (
    "data=synthetic data.val_count=256 data.num_classes=10 "
    f"data.image_size=16 model=tiny model.ghost_batch={BATCH} batch.size={BATCH} optimizer=lars optimizer.lr=0.5 "
    "schedule.warmup_epochs=1 precision=fp32 checkpoint.every_updates=400 launch.nproc=1 launch.threads=1 verbosity=0"
).split()
# Growth that is still flat: of memory in MiB, of open files, of the time of an update as a ratio.
MOST_MEMORY, MOST_FILES, MOST_TIME = 16.0, 2, 1.05
_MIB = 1 << 20


@dataclass(frozen=True)
class Moment:
    """What was seen at an update: seconds since the start, the process's CPU seconds, MiB of memory, open files, bytes
    of the run's own logs.
    """

    update: int
    seconds: float
    cpu: float
    memory: float
    files: int
    log_bytes: int


def main() -> int:
    """Run it, print the figures; 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100, help="each with an evaluation at its end (default 100)")
    parser.add_argument("--updates", type=int, default=1000, help="in an epoch (default 1,000)")
    parser.add_argument("--log-every", type=int, default=10, help="updates between lines of the log (default 10)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the figures into a page, between its markers")
    args = parser.parse_args()
    if min(args.epochs, args.updates, args.log_every) < 1:
        parser.error("--epochs, --updates and --log-every are at least 1")
    settings = settings_of(args.epochs, args.updates, args.log_every)
    with tempfile.TemporaryDirectory() as folder:
        moments = watched(settings, args.epochs * args.updates, Path(folder))
    lines, flat = told(moments, settings, args.epochs * args.updates)
    print("\n".join(lines))
    if args.write is not None:
        page = args.write.read_text(encoding="utf-8")
        args.write.write_text(between_markers(page, "long_haul", lines), encoding="utf-8")
    return 0 if flat else 1


def settings_of(epochs: int, updates: int, log_every: int) -> list[str]:
    """Of a run of so many epochs, with so many updates in each."""
    return [*SETTINGS, f"data.train_count={updates * BATCH}", f"epochs={epochs}", f"log_every={log_every}"]


def watched(settings: list[str], updates: int, folder: Path) -> list[Moment]:
    """The run, looked at a few hundred times. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "lars_train", *settings, f"run.dir={folder / 'run'}"]
    moments: list[Moment] = []
    started = time.perf_counter()
    with (folder / "told").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            while process.poll() is None:
                moment = look(process.pid, folder / "run", time.perf_counter() - started)
                if moment is not None and moment.update >= (moments[-1].update if moments else 0) + updates / 400:
                    moments.append(moment)
                time.sleep(0.05)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            raise
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
        logs = [run / "metrics.jsonl", *(run / "tensorboard").rglob("events*")]
        log_bytes = sum(path.stat().st_size for path in logs)
    except (OSError, ValueError, IndexError):
        return None
    if update is None:
        return None
    cpu, memory = ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / _MIB
    return Moment(update, seconds, cpu, memory, files, log_bytes)


def last_update(path: Path) -> int | None:
    """Of the last whole line of a run's metrics."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        if line.startswith(b'{"update"'):
            return int(json.loads(line)["update"])
    return None


def early_and_late(moments: list[Moment]) -> dict[str, tuple[float, float]]:
    """Of the second and the last tenth of the run: memory in MiB and open files (medians), CPU milliseconds an update
    with all that happens between updates.
    """
    last = moments[-1].update
    parts = (
        [one for one in moments if 0.1 * last <= one.update < 0.2 * last],
        [one for one in moments if one.update >= 0.9 * last],
    )
    early, late = (
        (
            statistics.median(one.memory for one in part),
            statistics.median(one.files for one in part),
            1000 * (part[-1].cpu - part[0].cpu) / max(1, part[-1].update - part[0].update),
        )
        for part in parts
    )
    return dict(zip(("memory", "open files", "time"), zip(early, late, strict=True), strict=True))


def told(moments: list[Moment], settings: list[str], updates: int) -> tuple[list[str], bool]:
    """The figures of a run of so many updates as Markdown, and whether nothing grew."""
    found, last = early_and_late(moments), moments[-1]
    memory, files, times = found["memory"], found["open files"], found["time"]
    judged = (
        (f"memory grew by {memory[1] - memory[0]:.1f} MiB", MOST_MEMORY, memory[1] - memory[0]),
        (f"open files grew by {files[1] - files[0]:.0f}", MOST_FILES, files[1] - files[0]),
        (f"an update took {times[1] / times[0]:.2f} times as long", MOST_TIME, times[1] / times[0]),
    )
    flat = all(value <= most for _, most, value in judged)
    lines = [
        f"`python scripts/long_haul.py` on {cpu_name()}, one thread: {updates:,} updates, looked at until "
        f"{last.update:,}, in {last.seconds / 60:.0f} minutes, `lars-train {' '.join(settings)}`.",
        "",
        "| | second tenth of the run | last tenth |",
        "|---|---:|---:|",
        f"| memory, MiB | {memory[0]:,.1f} | {memory[1]:,.1f} |",
        f"| open files | {files[0]:.0f} | {files[1]:.0f} |",
        f"| CPU time an update, with log, checkpoints and evaluations, ms | {times[0]:.2f} | {times[1]:.2f} |",
        "",
        f"Bytes of metrics.jsonl and TensorBoard's files an update: {last.log_bytes / last.update:,.0f}.",
        "",
        *(
            f"- over a long run: {what}; at most {most:g} wanted: {'met' if value <= most else '**not met**'}"
            for what, most, value in judged
        ),
    ]
    return lines, flat


if __name__ == "__main__":
    sys.exit(main())
