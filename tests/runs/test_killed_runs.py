"""Runs that are killed, told to stop or interrupted, and go on to the same end."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import ALONE, TINY, TORCHRUN, alive_in_group, children, environment, final, losses, metrics, ran

pytestmark = pytest.mark.slow

CURVE = [*TINY, "data.augment=pad_crop", "data.workers=1", "epochs=12", "log_every=4"]
LONG = "epochs=100000 checkpoint.every_updates=15 launch.nproc=1 run.name=killed".split()


def wait_for_checkpoint(folder: Path, update: int, process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 120
    while not (folder / "checkpoints" / f"update-{update:09d}.pt").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "no checkpoint appeared"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run directory of CURVE by so many processes, which nobody disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")

    @functools.cache
    def run(processes: int) -> Path:
        ran([*ALONE, *CURVE, f"launch.nproc={processes}", f"run.name={processes}"], folder)
        return folder / "runs" / str(processes)

    return run


def assert_same_run(one: Path, other: Path) -> None:
    assert final(one)["weights_sha256"] == final(other)["weights_sha256"]
    curves = [[(m["update"], m.get("train/loss"), m.get("val/top1")) for m in metrics(run)] for run in (one, other)]
    assert curves[0] == curves[1]


def test_killed_run_ends_with_the_same_weights(unbroken: Callable[[int], Path], tmp_path: Path) -> None:
    # Augmentation, a checkpoint in mid-epoch and one between two log lines; killed twice.
    settings = [*CURVE, "checkpoint.every_updates=15", "checkpoint.keep=100", "launch.nproc=1"]
    folder = tmp_path / "runs/killed"
    for update in (15, 75):
        process = subprocess.Popen(
            [*ALONE, *settings, "run.name=killed"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for_checkpoint(folder, update, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        end = time.monotonic() + 30
        while any(alive_in_group(process.pid)) and time.monotonic() < end:
            time.sleep(0.05)
    assert "resumed" in ran([*ALONE, *settings, "run.name=killed"], tmp_path)
    assert_same_run(folder, unbroken(1))


def test_a_run_whose_loader_worker_is_killed_ends_and_says_so(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*ALONE, *CURVE, *LONG],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_checkpoint(tmp_path / "runs/killed", 15, process)
        # With one that an evaluation may have at the moment.
        for worker in children(process.pid):
            os.kill(worker, signal.SIGKILL)
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "a loader worker (process" in told
    assert "was killed by SIGKILL" in told
    assert "Traceback" not in told


def test_torchrun_restarts_after_a_killed_rank_and_ends_with_the_same_weights(
    unbroken: Callable[[int], Path], tmp_path: Path
) -> None:
    # The static rendezvous, whose store outlives the processes.
    command = [*TORCHRUN[:3], "--max-restarts", "1", *TORCHRUN[3:], *CURVE, "checkpoint.every_updates=5"]
    process = subprocess.Popen(
        [*command, "run.name=killed"], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    wait_for_checkpoint(tmp_path / "runs/killed", 10, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    told, _ = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert "resumed" in told
    assert_same_run(tmp_path / "runs/killed", unbroken(2))


def test_ranks_whose_launcher_is_killed_end_with_a_checkpoint(unbroken: Callable[[int], Path], tmp_path: Path) -> None:
    command = [*ALONE, *CURVE, "launch.nproc=2", "checkpoint.every_updates=10", "run.name=killed"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for_checkpoint(tmp_path / "runs/killed", 10, process)
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while alive_in_group(process.pid):
        assert time.monotonic() < end, "ranks go on without their launcher"
        time.sleep(0.1)
    assert "resumed" in ran(command, tmp_path)
    assert_same_run(tmp_path / "runs/killed", unbroken(2))


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ([*ALONE, "launch.nproc=1"], signal.SIGUSR2),
        ([*ALONE, "launch.nproc=2"], signal.SIGUSR1),
        # One rank alone is told, as when one node is to be given back; the others end with it.
        (TORCHRUN, signal.SIGTERM),
    ],
    ids=["alone", "nproc", "torchrun"],
)
def test_a_notice_ends_the_run_with_a_checkpoint_and_it_goes_on_to_the_same_weights(
    launcher: list[str], number: signal.Signals, unbroken: Callable[[int], Path], tmp_path: Path
) -> None:
    # No checkpoint is due before the end, of updates or of minutes, and none for a best result: the one that is
    # found is that of the notice.
    command = [*launcher, *CURVE, "checkpoint.every_updates=1000", "evaluate.every_epochs=12", "run.name=stopped"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    logged, end = tmp_path / "runs/stopped/metrics.jsonl", time.monotonic() + 120
    while not (logged.exists() and logged.read_text().count("\n") >= 4):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(children(process.pid)[1] if launcher is TORCHRUN else process.pid, number)
    _, told = process.communicate(timeout=60)
    assert f"{number.name}: stopped" in told
    assert process.returncode == (1 if launcher is TORCHRUN else 75), told
    stopped = tmp_path / "runs/stopped"
    assert len(list((stopped / "checkpoints").glob("update-*.pt"))) == 1
    assert "resumed" in ran(command, tmp_path)
    reference = unbroken(1 if "launch.nproc=1" in launcher else 2)
    assert final(stopped)["weights_sha256"] == final(reference)["weights_sha256"]
    assert losses(stopped) == losses(reference)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupt_ends_a_sweep_at_once_and_the_run_can_go_on(processes: int, tmp_path: Path) -> None:
    settings = [*TINY, f"launch.nproc={processes}", "epochs=400", "checkpoint.every_updates=5"]
    process = subprocess.Popen(
        [*ALONE, "-m", *settings, "run.name=first,second"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A shell's background job, which CI may be, ignores the signal; a terminal's does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for_checkpoint(tmp_path / "runs/first", 5, process)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert b"SIGINT: stopped" in told
    assert b"the same command resumes" in told
    assert b"Traceback" not in told
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]
