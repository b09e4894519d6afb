"""Kills a run at random instants, lets it go on each time, and compares its end with that of a run left alone.

    python scripts/verify/chaos.py                 # 50 kills, about 10 minutes on two cores
    python scripts/verify/chaos.py --kills 5       # the short form
    python scripts/verify/chaos.py --write docs/same_curve.md

A run is two processes on the CPU, with made-up images, random augmentation, and more checkpoints than it needs. A
kill is, by lot: SIGKILL of one rank, of all ranks, of the process that has started them, of everything at once, or
SIGTERM. Its instant is drawn too, from the start of the process on, so that starts, checkpoints, evaluations and ends
of epochs are hit as they come. When a run has come to its end, its weights (SHA-256) and every line of its
metrics.jsonl, but for times and rates, must be those of the run that nobody disturbed. Runs with new seeds follow until
there were as many kills as asked for. The exit code is the number of runs that differ.
"""

from __future__ import annotations

import argparse
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
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from child import end_on_signals, started
from page import between_markers, writable_page

from lars_train.monitoring.fields import TIMING_FIELDS

SETTINGS = (
    "data=synthetic data.train_count=640 data.val_count=101 data.num_classes=4 data.image_size=16 "
    "data.augment=pad_crop "
    "model=small model.ghost_batch=8 precision=fp32 schedule.warmup_epochs=0.5 batch.size=64 optimizer.lr=2 epochs=20 "
    "log_every=3 checkpoint.every_updates=7 launch.nproc=2 launch.threads=1 data.workers=1"
).split()
KINDS = ("one rank", "all ranks", "launcher", "everything", "SIGTERM")
# Seconds within which a process is killed, most often counted from its entry in the run's record, else from its start.
LATEST_KILL_S = 8.0


def main() -> None:
    """Run it, print a line per run and a sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills over all runs (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the kinds and instants (0)")
    parser.add_argument(
        "--write", type=writable_page("chaos"), metavar="PAGE", help="put the report between the page's markers"
    )
    arguments = parser.parse_args()
    started, lines = (
        time.monotonic(),
        [f"`python scripts/verify/chaos.py --kills {arguments.kills} --seed {arguments.seed}`:", ""],
    )
    draw, kills, differing, runs = random.Random(arguments.seed), Counter[str](), 0, 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        while kills.total() < arguments.kills:
            runs += 1
            seed = f"seed={arguments.seed * 1000 + runs}"
            alone = Path(folder) / "runs" / f"alone{runs}"
            with start(folder, seed, alone.name) as process:
                wait(process)
            killed = alone.with_name(f"killed{runs}")
            before = kills.total()
            disturb(folder, seed, killed, draw, kills, arguments.kills)
            difference = compare(alone, killed)
            differing += bool(difference)
            starts = len(json.loads((killed / "run.json").read_text())["started"])
            lines.append(
                f"- run {runs}: {kills.total() - before} kills, {starts} starts: {difference or 'no difference'}"
            )
            print(lines[-1], flush=True)
    told = ", ".join(f"{count} x {kind}" for kind, count in sorted(kills.items()))
    lines += ["", f"{kills.total()} kills ({told}) in {runs} runs: {differing} differ from the run left alone."]
    print(lines[-1])
    if arguments.write is not None:
        lines[-1] += (
            f" {(time.monotonic() - started) / 60:.0f} minutes on {os.cpu_count()} cores, torch {version('torch')}."
        )
        arguments.write.write_text(between_markers(arguments.write.read_text(), "chaos", lines))
    sys.exit(min(differing, 100))


@contextmanager
def start(folder: str, seed: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command, in a process group of its own; it ends with what is done within."""
    command = [sys.executable, "-m", "lars_train", *SETTINGS, seed, f"run.name={name}"]
    with (
        (Path(folder) / f"{name}.log").open("ab") as log,
        started(command, cwd=folder, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        yield process


def disturb(folder: str, seed: str, directory: Path, draw: random.Random, kills: Counter[str], most: int) -> None:
    """Start the run again and again, and kill it, until it has ended by itself."""
    while not (directory / "final.json").exists():
        with start(folder, seed, directory.name) as process:
            if kills.total() < most:
                kind, instant, from_record = draw.choice(KINDS), draw.uniform(0, LATEST_KILL_S), draw.random() < 0.8
                try:
                    if from_record:
                        wait_for_record(process, directory)
                    process.wait(instant)
                except subprocess.TimeoutExpired:
                    kill(process.pid, kind, draw)
                    kills[kind] += 1
            wait(process, may_fail=True)
        if process.returncode == 2:
            sys.exit(f"a start was refused:\n{(Path(folder) / f'{directory.name}.log').read_text()}")


def wait_for_record(process: subprocess.Popen[bytes], directory: Path) -> None:
    """Until `process` has ended, or has entered its start in the run's record: the imports are behind it."""
    record = directory / "run.json"
    before = record.stat().st_mtime_ns if record.exists() else 0
    while process.poll() is None and not (record.exists() and record.stat().st_mtime_ns != before):
        time.sleep(0.02)


def kill(launcher: int, kind: str, draw: random.Random) -> None:
    """Send the signals of one kill. What is gone already needs none."""
    ranks = [pid for pid in children(launcher) if "spawn_main" in command_of(pid)]
    targets = {
        "one rank": draw.sample(ranks, 1) if ranks else [launcher],
        "all ranks": ranks or [launcher],
        "launcher": [launcher],
        "SIGTERM": [launcher],
    }
    try:
        if kind == "everything":
            os.killpg(launcher, signal.SIGKILL)
            return
        for pid in targets[kind]:
            os.kill(pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
    except ProcessLookupError:
        pass


def children(pid: int) -> list[int]:
    """The child processes of `pid`; none if it is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def command_of(pid: int) -> str:
    """The command line of `pid`; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def wait(process: subprocess.Popen[bytes], *, may_fail: bool = False) -> None:
    """Until the process and all of its group have ended; exits if they do not, or if a run fails that may not."""
    process.wait(600)
    end = time.monotonic() + 120
    while alive(process.pid):
        if time.monotonic() > end:
            sys.exit(f"processes of a killed run go on: {[command_of(pid) for pid in alive(process.pid)]}")
        time.sleep(0.05)
    if process.returncode and not may_fail:
        sys.exit(f"the run left alone has failed (exit code {process.returncode})")


def alive(group: int) -> list[int]:
    """The processes of a group that have not ended."""
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
    """What differs between two finished runs; empty if nothing does."""
    ends = [json.loads((run / "final.json").read_text()) for run in (alone, killed)]
    for key in ("weights_sha256", "best_top1", "final_top1", "updates"):
        if ends[0][key] != ends[1][key]:
            return f"{key}: {ends[0][key]} left alone, {ends[1][key]} killed"
    one, other = lines(alone), lines(killed)
    for expected, found in zip(one, other, strict=False):
        if expected != found:
            return f"metrics.jsonl: {expected} left alone, {found} killed"
    return "" if len(one) == len(other) else f"metrics.jsonl: {len(one)} lines left alone, {len(other)} killed"


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times and rates."""
    read = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in read]


if __name__ == "__main__":
    end_on_signals()
    main()
