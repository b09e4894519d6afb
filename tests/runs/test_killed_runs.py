"""A run that is killed or stopped resumes, and ends bit for bit like an uninterrupted run.

One run of each world size is killed or stopped several times in turn, and compared once with an uninterrupted run.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import (
    ALONE,
    TINY,
    TORCHRUN,
    Program,
    alive_in_group,
    begin,
    children,
    final,
    losses,
    metrics,
    ran,
    start_ranks,
)

pytestmark = pytest.mark.slow

# 60 updates. Some checkpoints are in the middle of an epoch or between two log lines.
CURVE = [*TINY, "data.augment=pad_crop", "data.workers=1", "epochs=6", "log_every=4", "checkpoint.keep=100"]
OFTEN = "checkpoint.every_updates=5"


def wait_until(condition: Callable[[], object], process: Program, what: str) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, (f"the run ended without {what}", *process.communicate())
        assert time.monotonic() < end, f"not within 120 s: {what}"
        time.sleep(0.005)


def saved(run: Path) -> list[int]:
    """Return the updates of the run's checkpoints."""
    return sorted(int(path.stem.partition("-")[2]) for path in (run / "checkpoints").glob("update-*.pt"))


def wait_for_checkpoint(run: Path, process: Program, after: int = 0) -> int:
    """Wait for a checkpoint later than `after`, and return its update."""
    wait_until(lambda: max(saved(run), default=0) > after, process, f"a checkpoint after update {after}")
    return max(saved(run))


def wait_for_group(process: Program) -> None:
    """Wait until all processes of the group have ended."""
    end = time.monotonic() + 60
    while alive_in_group(process.pid):
        assert time.monotonic() < end, "processes of the group outlived their leader"
        time.sleep(0.05)


def stop(process: Program, target: int, number: signal.Signals, run: Path) -> str:
    """Stop a run by a signal, assert that it wrote a checkpoint then, and return its error output."""
    os.kill(target, number)
    _, output = process.communicate(timeout=60)
    assert f"{number.name}: stopped after update {max(saved(run))}" in output, output
    return output


def train_two_ranks(arguments: list[str], folder: Path) -> str:
    """Train two ranks to the end, and return the output of rank 0."""
    done = start_ranks(arguments, folder)
    assert [rank.returncode for rank in done] == [0, 0], [rank.stderr for rank in done]
    return done[0].stdout


def assert_same_run(one: Path, other: Path) -> None:
    assert final(one)["weights_sha256"] == final(other)["weights_sha256"]
    curves = [[(m["update"], m.get("train/loss"), m.get("val/top1")) for m in metrics(run)] for run in (one, other)]
    assert curves[0] == curves[1]
    assert losses(one)[-1][0] == 60


def test_one_process_ends_bit_for_bit_as_if_uninterrupted(tmp_path: Path) -> None:
    command = [*ALONE, *CURVE, "launch.nproc=1", "run.name=disturbed"]
    run = tmp_path / "runs/disturbed"

    # Kill the loader's worker, and a worker of an evaluation if there is one.
    process = begin([*command, OFTEN], tmp_path)
    done = wait_for_checkpoint(run, process)
    for worker in children(process.pid):
        os.kill(worker, signal.SIGKILL)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "a loader worker (process" in output
    assert "was killed by SIGKILL" in output
    assert "Traceback" not in output

    # Kill the run with all its processes.
    process = begin([*command, OFTEN], tmp_path)
    done = wait_for_checkpoint(run, process, max(saved(run)))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for_group(process)

    # Stop the run by a signal at an update without a regular checkpoint.
    process = begin([*command, "checkpoint.every_updates=1000"], tmp_path)
    logged = run / "metrics.jsonl"
    before = logged.stat().st_size
    wait_until(lambda: logged.stat().st_size > before, process, "a log line")
    stop(process, process.pid, signal.SIGUSR2, run)
    assert process.returncode == 75
    assert done < max(saved(run)) < 60

    assert "resumed" in ran([*command, OFTEN], tmp_path)
    ran([*ALONE, *CURVE, "launch.nproc=1", "run.name=alone"], tmp_path)
    assert_same_run(run, tmp_path / "runs/alone")


def test_two_ranks_end_bit_for_bit_as_if_uninterrupted(tmp_path: Path) -> None:
    run = tmp_path / "runs/disturbed"
    own = [*ALONE, *CURVE, OFTEN, "launch.nproc=2", "run.name=disturbed"]

    # With torchrun's static rendezvous, whose store outlives the ranks. Kill a rank, and torchrun restarts both. Then
    # send a signal to one rank, as if its node was preempted, and both stop.
    torchrun = [*TORCHRUN[:3], "--max-restarts", "1", *TORCHRUN[3:], *CURVE, OFTEN, "run.name=disturbed"]
    process = begin(torchrun, tmp_path)
    done = wait_for_checkpoint(run, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    wait_for_checkpoint(run, process, done + 5)
    assert not set(ranks) & set(children(process.pid))
    stop(process, children(process.pid)[1], signal.SIGTERM, run)
    assert process.returncode == 1

    # Kill the launcher: the ranks stop with a checkpoint.
    done = max(saved(run))
    process = begin(own, tmp_path)
    wait_for_checkpoint(run, process, done)
    process.kill()
    process.communicate(timeout=60)
    wait_for_group(process)

    assert "resumed" in train_two_ranks([*CURVE, OFTEN, "run.name=disturbed"], tmp_path)
    train_two_ranks([*CURVE, "run.name=alone"], tmp_path)
    assert_same_run(run, tmp_path / "runs/alone")


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupt_ends_a_sweep_at_once_and_its_run_resumes(processes: int, tmp_path: Path) -> None:
    settings = [*TINY, f"launch.nproc={processes}", "epochs=400", OFTEN]
    process = begin([*ALONE, "-m", *settings, "run.name=first,second"], tmp_path)
    wait_for_checkpoint(tmp_path / "runs/first", process)
    os.killpg(process.pid, signal.SIGINT)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "SIGINT: stopped" in output
    assert "the same command resumes" in output
    assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]
