"""The shell scripts that reproduce the table: that they parse, and what they start, with stubs for programs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from lars_train.cli import prepare_arguments
from lars_train.config import Config, config_dir, register, resolve

SCRIPTS = Path(__file__).parents[1] / "scripts"
SHELL = SCRIPTS / "reproduce_imagenet_table.sh"
SLURM = SCRIPTS / "slurm_imagenet_table.sbatch"
# Writes its own name and arguments as one line, tab between them; lars-train ends with a code that a file holds.
STUB = """#!/bin/sh
{ printf '%s' "${0##*/}"; printf '\\t%s' "$@"; echo; } >> "$LOG"
case "$*" in *batch=$STOPS_AT*) exit "$CODE";; esac
"""


def started(
    script: Path, folder: Path, *arguments: str, code: int = 0, stops_at: str = "none", **environment: str
) -> tuple[int, list[list[str]]]:
    """The exit code of `script`, and the commands that it started."""
    for name in ("lars-train", "torchrun", "srun", "scontrol"):
        stub = folder / name
        stub.write_text(STUB)
        stub.chmod(0o755)
    log = folder / "log"
    log.write_text("")
    settings = {"LOG": str(log), "CODE": str(code), "STOPS_AT": stops_at, **environment}
    done = subprocess.run(
        ["bash", str(script), *arguments],
        env={**os.environ, **settings, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stderr == "") == (done.returncode in (0, code))
    return done.returncode, [line.split("\t") for line in log.read_text().splitlines()]


def settings_of(command: list[str]) -> list[str]:
    """What the command gives to lars-train."""
    position = next(i for i, word in enumerate(command) if word in ("lars-train", "lars_train"))
    return command[position + 1 :]


def composed(settings: list[str]) -> Config:
    register()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return resolve(compose("config", prepare_arguments(settings, None)))


@pytest.mark.parametrize("path", sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")]), ids=lambda path: path.name)
def test_every_shell_script_parses_and_quotes_its_variables(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert re.search(r"^set -e?uo pipefail$", text, re.MULTILINE)
    code = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    # What is assigned or stands in quotes is not split into words.
    unassigned = re.sub(r"^\s*(export )?\w+=.*$", "", code, flags=re.MULTILINE)
    assert re.findall(r"\$[\w{@*]+", re.sub(r'"[^"]*"', "", unassigned)) == []


def test_on_one_machine_the_whole_table_is_one_command(tmp_path: Path) -> None:
    code, commands = started(SHELL, tmp_path, "/data/image net", "seed=1")
    assert code == 0
    assert len(commands) == 1
    flag, batches, *rest = settings_of(commands[0])
    assert (flag, batches) == ("-m", "batch=256,8k,16k,32k")
    assert rest[1] == "data.root=/data/image net"
    for batch in batches.removeprefix("batch=").split(","):
        config = composed([f"batch={batch}", rest[0], "data.root='/data/image net'", *rest[2:]])
        assert (config.data.name, config.data.root, config.seed) == ("imagenet", "/data/image net", 1)
        assert (config.batch.scaled, config.epochs, config.recipe.name) == (False, 90, "torchlars")


def test_on_several_machines_each_runs_the_large_rows_and_the_first_the_small_one(tmp_path: Path) -> None:
    common = {"NODES": "4", "HEAD": "gpu01", "GPUS": "8"}
    code, first = started(SHELL, tmp_path, "/data", NODE="0", **common)
    assert code == 0
    _, second = started(SHELL, tmp_path, "/data", NODE="1", **common)
    assert second == first[:3]
    assert [composed(settings_of(command)).batch.name for command in first] == ["32k", "16k", "8k", "256"]
    assert [command[0] for command in first] == ["torchrun"] * 3 + ["lars-train"]
    line = " ".join(first[0])
    assert "--nnodes 4 --nproc-per-node 8 --rdzv-backend c10d" in line
    assert "--rdzv-endpoint gpu01:29400" in line


def test_a_row_that_fails_ends_the_script_with_its_code(tmp_path: Path) -> None:
    common = {"NODES": "2", "NODE": "0", "HEAD": "gpu01", "GPUS": "8"}
    code, commands = started(SHELL, tmp_path, "/data", code=3, stops_at="16k", **common)
    assert (code, len(commands)) == (3, 2)
    code, commands = started(SLURM, tmp_path, code=3, stops_at="16k", IMAGENET_DIR="/data", SLURM_JOB_ID="7")
    assert (code, [command[0] for command in commands]) == (3, ["srun", "srun"])


def test_under_slurm_every_row_is_a_step_and_the_small_one_takes_one_node(tmp_path: Path) -> None:
    code, commands = started(
        SLURM, tmp_path, "seed=2", IMAGENET_DIR="/data", SLURM_JOB_ID="7", SLURM_NTASKS_PER_NODE="4"
    )
    assert code == 0
    configs = [composed(settings_of(command)) for command in commands]
    assert [config.batch.name for config in configs] == ["32k", "16k", "8k", "256"]
    assert {(config.data.name, config.data.root, config.seed) for config in configs} == {("imagenet", "/data", 2)}
    assert [command[1] for command in commands[:3]] == ["lars-train"] * 3
    assert commands[3][1:4] == ["--nodes=1", "--ntasks=4", "lars-train"]


def test_a_preempted_job_is_queued_again(tmp_path: Path) -> None:
    code, commands = started(SLURM, tmp_path, code=75, stops_at="16k", IMAGENET_DIR="/data", SLURM_JOB_ID="4711")
    assert code == 75
    assert [command[0] for command in commands] == ["srun", "srun", "scontrol"]
    assert commands[-1] == ["scontrol", "requeue", "4711"]
    directives = re.findall(r"^#SBATCH (--[\w-]+)(?:=(\S+))?$", SLURM.read_text(), re.MULTILINE)
    # Without "B:", so that the signal goes to the steps; SIGUSR1 is one of those that end a run with a checkpoint.
    assert dict(directives).items() >= {"--signal": "USR1@180", "--requeue": "", "--open-mode": "append"}.items()
    text = SLURM.read_text()
    assert text.index("#SBATCH --signal") < text.index("set -uo pipefail")


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    assert started(SHELL, tmp_path) == (1, [])
    assert started(SHELL, tmp_path, "/data", NODES="2") == (1, [])
    environment = dict(os.environ)
    environment.pop("IMAGENET_DIR", None)
    done = subprocess.run(["bash", str(SLURM)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "IMAGENET_DIR" in done.stderr


def test_the_check_of_a_gpu_says_so_where_there_is_none(tmp_path: Path) -> None:
    script, report = SCRIPTS / "gpu_check.sh", tmp_path / "report.txt"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "REPORT": str(report)}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert report.read_text() == done.stdout == "torch finds no CUDA device here\n"


def test_the_check_of_a_gpu_runs_every_part_and_names_those_that_failed(tmp_path: Path) -> None:
    for name in ("python", "lars-train"):
        stub = tmp_path / name
        # The first thing that is asked of Python is whether there is a device.
        stub.write_text(STUB + '[ "$1" = - ] && exit 0\ncase "$*" in *bench_batchnorm*) exit 3;; esac\n')
        stub.chmod(0o755)
    log = tmp_path / "log"
    settings = {"LOG": str(log), "CODE": "75", "STOPS_AT": "32k", "REPORT": str(tmp_path / "report.txt")}
    environment = {**os.environ, **settings, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPTS / "gpu_check.sh"), "pictures"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "== failed: batch norm"
    started = [line.split("\t")[:3] for line in log.read_text().splitlines()]
    assert [words[1 if words[0] == "lars-train" else 2] for words in started[1:]] == [
        "pytest",
        "--device",
        "--device",
        "pictures",
        "data=synthetic",
    ]
