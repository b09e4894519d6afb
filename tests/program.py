"""Starting the program for real in a test: command lines, small settings, and what a run has written."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from lars_train.config import config_dir, register
from lars_train.config.arguments import prepare_arguments

DATA = (
    "data=synthetic data.train_count=640 data.val_count=101 data.num_classes=4 data.image_size=16 "
    "model=small model.ghost_batch=8 precision=fp32 schedule.warmup_epochs=0.5 log_every=2 launch.threads=1"
).split()
TINY = [*DATA, "batch.size=64", "optimizer.lr=2", "epochs=2"]
ALONE = [sys.executable, "-m", "lars_train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lars_train"]

COMPILED = {
    "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_no_vectors"),
    "ATEN_CPU_CAPABILITY": "default",
}
"""The environment of a test that compiles: without vector instructions, which takes a third less time.

The folder stays from one run of the tests to the next, and holds nothing that was compiled with such instructions.
"""


def prepared(*arguments: str) -> list[str]:
    return prepare_arguments(list(arguments), None)


def composed(*arguments: str, hydra: bool = False) -> DictConfig:
    """The config of a command line, not resolved; `hydra`: with Hydra's own."""
    register()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=prepared(*arguments), return_hydra_config=hydra)


def environment(**extra: str) -> dict[str, str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "IMAGENET_DIR")
    kept = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith(("SLURM_", "TORCHELASTIC"))}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def start(command: Sequence[str], folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(**extra), capture_output=True, text=True, timeout=240, check=False
    )


def ran(command: Sequence[str], folder: Path, **extra: str) -> str:
    done = start(command, folder, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def final(folder: Path) -> dict[str, object]:
    content = json.loads((folder / "final.json").read_text())
    assert isinstance(content, dict)
    return content


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(line["update"], line["train/loss"]) for line in metrics(folder) if "train/loss" in line]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive_in_group(group: int) -> list[int]:
    alive = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            alive.append(int(status.parent.name))
    return alive
