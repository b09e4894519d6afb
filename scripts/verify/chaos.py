"""Kill and resume runs at random instants, and compare their results with those of undisturbed runs.

    python scripts/verify/chaos.py [--write docs/benchmarks.md]     # 50 kills
    python scripts/verify/chaos.py --kills 5                   # two minutes

A run has two processes on the CPU, synthetic images, random augmentation, and frequent checkpoints. The kind of each
kill is random: SIGKILL of one rank, of all ranks, of the launcher or of everything at once, or SIGTERM. Its time is
random too, so that kills also hit starts, checkpoints, evaluations and ends of epochs. The weights (SHA-256) of a
finished run and every line of its metrics.jsonl, except times and rates, must equal those of the undisturbed run. Runs
with new seeds follow until the number of kills is reached. The exit code is the number of runs that differ, at most
100.

Takes about ten minutes on two cores. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

SETTINGS = (
    "data=synthetic data.train_count=640 data.val_count=101 data.num_classes=4 data.image_size=16 "
    "data.augment=pad_crop data.workers=1 model=small model.ghost_batch=8 precision=fp32 schedule.warmup_epochs=0.5 "
    "batch.size=64 optimizer.lr=2 epochs=20 log_every=3 checkpoint.every_updates=7 launch.nproc=2 launch.threads=1"
).split()
KINDS = ("one rank", "all ranks", "launcher", "everything", "SIGTERM")
# The longest delay of a kill in seconds. It counts from the entry in run.json (four of five kills) or from the start.
LATEST_KILL_S = 8.0


def main() -> None:
    """Run, kill and compare; print a line per run and a summary."""
    parser = shared.make_parser(__doc__, "chaos")
    parser.add_argument("--kills", type=shared.positive_int, default=50, help="kills over all runs (50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of kinds and instants (0)")
    args = parser.parse_args()
    began = time.monotonic()
    lines = [f"`python scripts/verify/chaos.py --kills {args.kills} --seed {args.seed}`:", ""]
    generator, kills, differing, runs = random.Random(args.seed), Counter[str](), 0, 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        while kills.total() < args.kills:
            runs += 1
            seed, before = f"seed={args.seed * 1000 + runs}", kills.total()
            alone, killed = (Path(folder) / "runs" / f"{name}{runs}" for name in ("alone", "killed"))
            with start(folder, seed, alone.name) as process:
                wait(process)
            disturb(folder, seed, killed, generator, kills, args.kills)
            difference = compare(alone, killed)
            differing += bool(difference)
            starts = len(json.loads((killed / "run.json").read_text())["started"])
            lines.append(
                f"- run {runs}: {kills.total() - before} kills, {starts} starts: {difference or 'no difference'}"
            )
            print(lines[-1], flush=True)
    counts = ", ".join(f"{count} x {kind}" for kind, count in sorted(kills.items()))
    lines += ["", f"{kills.total()} kills ({counts}) in {runs} runs: {differing} differ from the undisturbed run."]
    print(lines[-1])
    lines[-1] += f" {(time.monotonic() - began) / 60:.0f} minutes on {os.cpu_count()} cores, {shared.software()}."
    shared.write_page(lines, args.write, "chaos")
    sys.exit(min(differing, 100))


@contextmanager
def start(folder: str, seed: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a run in its own process group, within the context."""
    command = [*shared.LARS_TRAIN, *SETTINGS, seed, f"run.name={name}"]
    with (
        (Path(folder) / f"{name}.log").open("ab") as log,
        shared.running(command, cwd=folder, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        yield process


def disturb(folder: str, seed: str, directory: Path, generator: random.Random, kills: Counter[str], most: int) -> None:
    """Start and kill the run until it finishes."""
    while not (directory / "final.json").exists():
        with start(folder, seed, directory.name) as process:
            if kills.total() < most:
                kind, instant = generator.choice(KINDS), generator.uniform(0, LATEST_KILL_S)
                try:
                    if generator.random() < 0.8:
                        wait_for_record(process, directory)
                    process.wait(instant)
                except subprocess.TimeoutExpired:
                    kill(process.pid, kind, generator)
                    kills[kind] += 1
            wait(process, may_fail=True)
        if process.returncode == 2:
            sys.exit(f"a start was rejected:\n{(Path(folder) / f'{directory.name}.log').read_text()}")


def wait_for_record(process: subprocess.Popen[bytes], directory: Path) -> None:
    """Wait until `process` has recorded its start in run.json, after its imports, or has ended."""
    record = directory / "run.json"
    before = record.stat().st_mtime_ns if record.exists() else 0
    while process.poll() is None and not (record.exists() and record.stat().st_mtime_ns != before):
        time.sleep(0.02)


def kill(launcher: int, kind: str, generator: random.Random) -> None:
    """Send the signals of one kill; ignore processes that have ended."""
    with suppress(ProcessLookupError):
        if kind == "everything":
            os.killpg(launcher, signal.SIGKILL)
        elif kind == "SIGTERM":
            os.kill(launcher, signal.SIGTERM)
        else:
            ranks = [] if kind == "launcher" else ranks_of(launcher)
            for pid in (generator.sample(ranks, 1) if ranks and kind == "one rank" else ranks) or [launcher]:
                os.kill(pid, signal.SIGKILL)


def ranks_of(launcher: int) -> list[int]:
    """Return the process ids of the ranks, or none if the launcher has ended."""

    def is_rank(pid: str) -> bool:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()

    with suppress(OSError):
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        return [int(pid) for pid in children if is_rank(pid)]
    return []


def wait(process: subprocess.Popen[bytes], *, may_fail: bool = False) -> None:
    """Wait until the whole process group has ended. Exit if it does not, or if an undisturbed run fails."""
    process.wait(600)
    end = time.monotonic() + 120
    while alive(process.pid):
        if time.monotonic() > end:
            sys.exit(f"processes of a killed run are still running after 120 s: {alive(process.pid)}")
        time.sleep(0.05)
    if process.returncode and not may_fail:
        sys.exit(f"the undisturbed run failed (exit code {process.returncode})")


def alive(group: int) -> list[int]:
    """Return the processes of a group that are still running."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def compare(alone: Path, killed: Path) -> str:
    """Return the first difference between two finished runs, or an empty string."""
    ends = [json.loads((run / "final.json").read_text()) for run in (alone, killed)]
    for key in ("weights_sha256", "best_top1", "final_top1", "updates"):
        if ends[0][key] != ends[1][key]:
            return f"{key}: {ends[0][key]} undisturbed, {ends[1][key]} killed"
    one, other = log_lines(alone), log_lines(killed)
    for expected, found in zip(one, other, strict=False):
        if expected != found:
            return f"metrics.jsonl: {expected} undisturbed, {found} killed"
    return "" if len(one) == len(other) else f"metrics.jsonl: {len(one)} lines undisturbed, {len(other)} killed"


def log_lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times and rates."""
    from lars_train.monitoring.fields import TIMING_FIELDS

    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


if __name__ == "__main__":
    shared.exit_on_signals()
    main()
