"""Sweeps whose jobs are started by submitit: the batch script for Slurm, and jobs on this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny import ALONE, start

from lars_train.cli import _Jobs
from lars_train.config import config_dir, register

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

SLURM = [
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.nodes=4",
    "hydra.launcher.tasks_per_node=8",
    "hydra.launcher.gpus_per_node=8",
    "hydra.launcher.cpus_per_task=8",
    "hydra.launcher.timeout_min=720",
    "hydra.launcher.max_num_timeout=20",
]


def test_a_sweep_over_slurm_composes_its_batch_script(tmp_path: Path) -> None:
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    register()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        whole = compose("config", [*SLURM, f"hydra.sweep.dir={tmp_path}"], return_hydra_config=True)
    launcher = OmegaConf.to_container(whole.hydra.launcher, resolve=False)
    assert isinstance(launcher, dict)
    assert launcher["_target_"].endswith(".SlurmLauncher")
    assert launcher["max_num_timeout"] == 20
    names = SlurmExecutor._equivalence_dict()
    given = {names.get(key, key): launcher[key] for key in ("nodes", "tasks_per_node", "cpus_per_task", "timeout_min")}
    script = _make_sbatch_string(
        "srun program", tmp_path, gpus_per_node=launcher["gpus_per_node"], signal_delay_s=120, **given
    )
    directives = dict(re.findall(r"^#SBATCH (--[\w-]+)=(\S+)$", script, re.MULTILINE))
    wanted = {"--nodes": "4", "--ntasks-per-node": "8", "--gpus-per-node": "8", "--cpus-per-task": "8"}
    assert directives.items() >= {**wanted, "--time": "720"}.items()


def test_saved_outcomes_of_jobs_are_added_up(tmp_path: Path) -> None:
    first, second, all_of_them = _Jobs(), _Jobs(), _Jobs()
    first.done, first.directories = 1, {Path("runs/a"): "seed=1"}
    second.failures = [("seed=2", 2, "no")]
    first.save(tmp_path)
    second.save(tmp_path)
    all_of_them.add_saved(tmp_path)
    assert (all_of_them.done, all_of_them.failures) == (1, [("seed=2", 2, "no")])
    assert all_of_them.directories == {Path("runs/a"): "seed=1"}
    assert all_of_them.exit_code() == 2


@pytest.mark.slow
def test_a_submitted_sweep_reports_each_job(tmp_path: Path) -> None:
    settings = ["-m", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=3", "mode=plan", "batch.size=64,33"]
    done = start([*ALONE, *settings, "optimizer.lr=1"], tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "=== sweep: 1 of 2 jobs done" in done.stdout
    assert re.search(r"job failed: .*batch\.size=33.*33 is not a multiple of the ghost batch", done.stderr)
    (folder,) = (tmp_path / "runs" / ".sweeps").iterdir()
    assert sorted(json.loads(path.read_text())["done"] for path in folder.glob("*.json")) == [0, 1]
    # The output of a job is in its log.
    logs = [path.read_text() for path in folder.glob(".submitit/*/*_log.out")]
    assert sum("global batch" in log for log in logs) == 1
