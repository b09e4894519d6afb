"""The launch files and sweeps on a real Slurm with one node. All jobs run side by side."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm import Slurm, skip_without_slurm, until
from test_scripts import SCRIPTS
from tiny import final, losses, metrics

from lars_train.launch import step_port

pytestmark = pytest.mark.slow
skip_without_slurm()

SCRIPT = str(SCRIPTS / "cluster" / "slurm_run.sbatch")
SMALL = (
    "data=synthetic data.train_count=640 data.val_count=64 data.num_classes=4 data.image_size=16 model=tiny "
    "model.ghost_batch=8 precision=fp32 optimizer.lr=2 schedule.warmup_epochs=0.5 launch.threads=1 device=cpu "
    "log_every=10"
).split()
# These override the script's directives, which ask for GPUs and several nodes.
TWO_RANKS = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1")
# Each job of the array is a run with its own name.
ARRAY = """#!/bin/bash
srun lars-train "$@" run.name="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" seed="$SLURM_ARRAY_TASK_ID"
"""


@dataclass
class Jobs:
    """The ids of the submitted jobs, and the process that submits a sweep."""

    slurm: Slurm
    folder: Path
    preempted: str
    timed: str
    array: str
    sweep: subprocess.Popen[str]

    def log(self, job: str) -> str:
        return (self.folder / f"lars-train-{job}.log").read_text()

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def trains(self, name: str) -> bool:
        path = self.run(name) / "metrics.jsonl"
        return path.exists() and "train/loss" in path.read_text()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("jobs")
    slurm = Slurm(tmp_path_factory.mktemp("slurm"), cores=8)
    sweep = None
    try:
        slurm.start()
        common = (*TWO_RANKS, "--time=60", SCRIPT, *SMALL, "batch.size=64")
        preempted = slurm.submit(folder, *common, "epochs=30", "run.name=preempted", CHECK="no")
        timed = slurm.submit(folder, "--partition=high", *common, "epochs=2000", "run.name=timed", CHECK="no")
        (folder / "array.sbatch").write_text(ARRAY)
        settings = [*SMALL, "batch.size=64", "epochs=1"]
        array = slurm.submit(folder, "--partition=high", "--array=3-4", "array.sbatch", *settings)
        launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=high", "hydra.launcher.timeout_min=10"]
        sweep = subprocess.Popen(
            ["lars-train", "-m", *launcher, *SMALL, "batch.size=64,33", "epochs=1"],
            cwd=folder,
            env=slurm.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        yield Jobs(slurm, folder, preempted, timed, array, sweep)
    finally:
        if sweep is not None:
            sweep.kill()
            sweep.communicate()
        slurm.stop()


@pytest.fixture(scope="module")
def states(jobs: Jobs) -> list[str]:
    """Return the states of the two training jobs while both train.

    Then submit a job that preempts the first, and shorten the time limit of the second.
    """
    until(lambda: jobs.trains("preempted") and jobs.trains("timed"), "both runs train")
    states = [jobs.slurm.field(job, "JobState") for job in (jobs.preempted, jobs.timed)]
    # Needs all cores except those of the job that is not preempted.
    jobs.slurm.submit(jobs.folder, "--partition=high", "--ntasks=5", "--wrap=true", "--output=/dev/null")
    # The script requests the signal three minutes before the time limit, and Slurm checks every 30 s.
    hours, minutes, _ = map(int, jobs.slurm.field(jobs.timed, "RunTime").split(":"))
    jobs.slurm.command("scontrol", "update", f"JobId={jobs.timed}", f"TimeLimit={60 * hours + minutes + 3}")
    return states


def test_two_jobs_on_one_node_train_at_once(jobs: Jobs, states: list[str]) -> None:
    assert states == ["RUNNING", "RUNNING"]
    assert step_port(f"{jobs.preempted}.0") != step_port(f"{jobs.timed}.0")
    for job in (jobs.preempted, jobs.timed):
        assert "world size     2" in jobs.log(job)


@pytest.mark.usefixtures("states")
def test_a_run_at_its_time_limit_resumes_until_it_is_canceled(jobs: Jobs) -> None:
    until(lambda: "SIGUSR1" in jobs.log(jobs.timed), "the signal")
    jobs.slurm.command("scontrol", "update", f"JobId={jobs.timed}", "TimeLimit=60")
    until(lambda: "resumed" in jobs.log(jobs.timed), "the job has resumed")
    stopped = metrics(jobs.run("timed"))[-1]["update"]
    until(lambda: metrics(jobs.run("timed"))[-1]["update"] > stopped, "the run trains again")
    assert_resumed(jobs, jobs.timed, "timed", "SIGUSR1")
    jobs.slurm.command("scancel", jobs.timed)
    until(lambda: jobs.slurm.field(jobs.timed, "JobState") in ("CANCELLED", "PENDING"), "the job has ended")
    # The job has written a checkpoint and is not requeued.
    assert jobs.slurm.field(jobs.timed, "JobState") == "CANCELLED"
    assert re.search("SIGTERM: .*checkpoint", jobs.log(jobs.timed))


@pytest.mark.usefixtures("states")
def test_a_preempted_run_is_requeued_and_finishes(jobs: Jobs) -> None:
    until(
        lambda: jobs.slurm.field(jobs.preempted, "JobState") == "COMPLETED",
        "the job has resumed and finished",
        report=lambda: f"{jobs.slurm.describe(jobs.preempted)}\n{jobs.log(jobs.preempted)}",
    )
    assert_resumed(jobs, jobs.preempted, "preempted", "SIGTERM")
    assert final(jobs.run("preempted"))["updates"] == 300


def assert_resumed(jobs: Jobs, job: str, name: str, signal: str) -> None:
    log = jobs.log(job)
    assert "Traceback" not in log
    stop = re.search(rf"{signal}: .*checkpoint", log)
    assert stop, log
    resumed = re.search(r"resumed +at update ([\d,]+)", log[stop.end() :])
    assert resumed, log
    assert int(resumed.group(1).replace(",", "")) > 0
    updates = [update for update, _ in losses(jobs.run(name))]
    assert updates == sorted(set(updates))
    assert jobs.slurm.field(job, "Restarts") == "1"


def test_jobs_of_an_array_have_runs_named_by_its_ids(jobs: Jobs) -> None:
    names = [f"{jobs.array}_{member}" for member in (3, 4)]
    until(lambda: all((jobs.run(name) / "final.json").exists() for name in names), "the array has finished")
    seeds = [json.loads((jobs.run(name) / "run.json").read_text())["settings"]["seed"] for name in names]
    assert seeds == [3, 4]
    assert len({final(jobs.run(name))["weights_sha256"] for name in names}) == 2


def test_a_sweeps_jobs_run_on_slurm_and_are_reported(jobs: Jobs) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    output, errors = jobs.sweep.communicate(timeout=240)
    assert jobs.sweep.returncode == 2, output + errors
    assert "=== sweep: 1 of 2 jobs done" in output
    assert re.search(r"^\| 64 +\|", output, re.MULTILINE)
    assert re.search(r"job failed: .*batch\.size=33.*33 is not a multiple of the ghost batch", errors)
