"""The shell scripts that reproduce the table parse and start the right commands, with stubs for the programs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from resolving import resolved

SCRIPTS = Path(__file__).parents[1] / "scripts"
SHELL = SCRIPTS / "results" / "reproduce_imagenet_table.sh"
SLURM = SCRIPTS / "cluster" / "slurm_run.sbatch"
# Logs its name and arguments, separated by tabs, and exits with $CODE at the batch $STOPS_AT.
STUB = """#!/bin/sh
{ printf '%s' "${0##*/}"; printf '\\t%s' "$@"; echo; } >> "$LOG"
case "$*" in *batch=$STOPS_AT*) exit "$CODE";; esac
"""


def started(
    script: Path, folder: Path, *arguments: str, code: int = 0, stops_at: str = "none", **environment: str
) -> tuple[int, list[list[str]]]:
    """Return the exit code of `script`, and the commands that it started."""
    for name in ("lars-train", "torchrun", "srun", "sbatch", "scontrol"):
        stub = folder / name
        stub.write_text(STUB)
        stub.chmod(0o755)
    squeue = folder / "squeue"
    squeue.write_text('#!/bin/sh\necho "${STATE:-RUNNING}"\n')
    squeue.chmod(0o755)
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
    """Return the settings that a command passes to lars-train."""
    position = next(i for i, word in enumerate(command) if word in ("lars-train", "lars_train"))
    return command[position + 1 :]


def kinds_of(commands: list[list[str]]) -> list[tuple[str, str, int]]:
    """Return batch, mode and seed of commands that start lars-train."""
    configs = [resolved(*[setting.replace(" ", "_") for setting in settings_of(command)]) for command in commands]
    return [(config.batch.name, config.mode, config.seed) for config in configs]


@pytest.mark.parametrize(
    "path", sorted([*SCRIPTS.rglob("*.sh"), *SCRIPTS.rglob("*.sbatch")]), ids=lambda path: path.name
)
def test_every_shell_script_parses_and_quotes_its_variables(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert re.search(r"^set -e?uo pipefail$", text, re.MULTILINE)
    code = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    # The shell does not split assignments and quoted text into words.
    unassigned = re.sub(r"^\s*(export )?\w+=.*$", "", code, flags=re.MULTILINE)
    assert re.findall(r"\$[\w{@*]+", re.sub(r'"[^"]*"', "", unassigned)) == []


def test_on_one_machine_the_whole_table_is_one_command(tmp_path: Path) -> None:
    code, commands = started(SHELL, tmp_path, "/data/image net", "seed=1")
    assert code == 0
    *planned, table = commands
    assert kinds_of(planned) == [("256", "plan", 1), ("32k", "plan", 1)]
    flag, batches, *rest = settings_of(table)
    assert (flag, batches) == ("-m", "batch=256,8k,16k,32k")
    assert rest[1] == "data.root=/data/image net"
    for batch in batches.removeprefix("batch=").split(","):
        config = resolved(f"batch={batch}", rest[0], "data.root='/data/image net'", *rest[2:])
        assert (config.data.name, config.data.root, config.seed) == ("imagenet", "/data/image net", 1)
        assert (config.batch.scaled, config.epochs, config.recipe.name) == (False, 90, "torchlars")


def test_on_several_machines_only_the_first_runs_the_small_row(tmp_path: Path) -> None:
    common = {"NODES": "4", "HEAD": "gpu01", "GPUS": "8"}
    code, first = started(SHELL, tmp_path, "/data", NODE="0", **common)
    assert code == 0
    _, second = started(SHELL, tmp_path, "/data", NODE="1", **common)
    assert second == first[:5]
    assert kinds_of(first[:2]) == [("256", "plan", 0), ("32k", "plan", 0)]
    del first[:2]
    assert [resolved(*settings_of(command)).batch.name for command in first] == ["32k", "16k", "8k", "256"]
    assert [command[0] for command in first] == ["torchrun"] * 3 + ["lars-train"]
    line = " ".join(first[0])
    assert "--nnodes 4 --nproc-per-node 8 --rdzv-backend c10d" in line
    assert "--rdzv-endpoint gpu01:29400" in line


def test_a_failed_row_ends_the_script_with_its_code(tmp_path: Path) -> None:
    common = {"NODES": "2", "NODE": "0", "HEAD": "gpu01", "GPUS": "8"}
    code, commands = started(SHELL, tmp_path, "/data", code=3, stops_at="16k", **common)
    assert (code, [command[0] for command in commands]) == (3, ["lars-train"] * 2 + ["torchrun"] * 2)
    code, commands = started(SHELL, tmp_path, "/data", code=3, stops_at="16k", SBATCH="--nodes=4")
    assert (code, [command[0] for command in commands]) == (3, ["lars-train"] * 2 + ["sbatch"] * 2)


def test_under_slurm_each_row_is_a_job(tmp_path: Path) -> None:
    code, commands = started(SHELL, tmp_path, "/data/image net", "seed=2", SBATCH="--nodes=4 --time=1:00:00")
    assert code == 0
    del commands[:2]
    assert [command[:3] for command in commands] == [["sbatch", "--nodes=4", "--time=1:00:00"]] * 4
    jobs = [next(i for i, word in enumerate(command) if word.endswith(".sbatch")) for command in commands]
    assert {Path(command[job]).resolve() for command, job in zip(commands, jobs, strict=True)} == {SLURM}
    found = [command[job + 1 :] for command, job in zip(commands, jobs, strict=True)]
    assert [settings[0] for settings in found] == [f"batch={row}" for row in ("32k", "16k", "8k", "256")]
    assert {tuple(settings[1:]) for settings in found} == {("data=imagenet", "data.root=/data/image net", "seed=2")}
    # If an option is given twice, sbatch uses the last value.
    assert ["--nodes=1" in command for command in commands] == [False] * 3 + [True]


@pytest.mark.parametrize("nodes", [{}, {"NODES": "4", "NODE": "1", "HEAD": "gpu01", "GPUS": "8"}])
def test_bad_input_exits_with_2_before_the_table_starts(nodes: dict[str, str], tmp_path: Path) -> None:
    code, commands = started(SHELL, tmp_path, "/data", "sede=1", code=2, stops_at="256", **nodes)
    assert (code, [words[:2] + words[-1:] for words in commands]) == (2, [["lars-train", "batch=256", "mode=plan"]])


def test_a_users_own_sweep_starts_without_a_plan(tmp_path: Path) -> None:
    code, commands = started(SHELL, tmp_path, "/data", "seed=1,2")
    assert (code, [command[1] for command in commands]) == (0, ["-m"])


def run_refused(folder: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Return exit code, output and errors of the script in a shell with only PATH and `environment`.

    Assert that the script starts no program.
    """
    log = folder / "log"
    for name in ("lars-train", "torchrun", "sbatch"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(SHELL), *arguments],
        env={"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(log), "STOPS_AT": "none", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not log.exists()
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {}, "DATA_ROOT, the first argument, is missing"),
        (("mode=plan",), {}, "mode=plan: pass DATA_ROOT"),
        (("data.root=/data/imagenet",), {}, "data.root=/data/imagenet: pass DATA_ROOT"),
        (("-m", "/data"), {}, "-m: DATA_ROOT"),
        (("/data",), {"NODES": "abc"}, "NODES=abc:"),
        (("/data",), {"NODES": "0"}, "NODES=0:"),
        (("/data",), {"NODES": "-2"}, "NODES=-2:"),
        (("/data",), {"NODES": "99999999999999999999"}, "NODES=99999999999999999999:"),
        (("/data",), {"NODES": "4", "HEAD": "h", "GPUS": "8"}, "NODE=: "),
        (("/data",), {"NODES": "4", "HEAD": "h", "GPUS": "8", "NODE": "4"}, "NODE=4: the number of this machine"),
        (("/data",), {"NODES": "4", "HEAD": "h", "GPUS": "8", "NODE": "9"}, "from 0 to 3"),
        (("/data",), {"NODES": "4", "HEAD": "h", "GPUS": "8", "NODE": "1.5"}, "NODE=1.5:"),
        (("/data",), {"NODES": "4", "GPUS": "8", "NODE": "1"}, "HEAD is missing"),
        (("/data",), {"NODES": "4", "HEAD": "h", "GPUS": "0", "NODE": "1"}, "GPUS=0:"),
    ],
)
def test_bad_input_is_reported(
    arguments: tuple[str, ...], environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    code, out, err = run_refused(tmp_path, *arguments, **environment)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[0]
    assert err.splitlines()[1].startswith("usage: ")
    assert "line " not in err


@pytest.mark.parametrize("root", ["/data/a=b", "./a=b", "s3://bucket/key=1", "imagenet"])
def test_a_folder_or_a_url_may_have_any_name(root: str, tmp_path: Path) -> None:
    code, commands = started(SHELL, tmp_path, root)
    assert code == 0
    assert {f"data.root={root}" in command for command in commands} == {True}
