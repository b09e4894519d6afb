"""A run for the tests of elastic nodes: its command and settings, its log lines, and the expected curve."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import ALONE, ran

SETTINGS = (
    "data=synthetic data.train_count=640 data.val_count=101 data.num_classes=4 data.image_size=8 model=small "
    "model.ghost_batch=16 precision=fp64 schedule.warmup_epochs=0.5 log_every=2 batch.size=64 optimizer.lr=2 "
    "epochs=6 checkpoint.every_updates=5 evaluate.every_epochs=6 launch.threads=1 run.dir=run"
).split()
# See docs/recovery.md.
NODE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
KEEP_ALIVE = "keep_alive_interval=2,keep_alive_max_attempt=4"


def launcher(endpoint: str, last_call: int) -> list[str]:
    """Return the command of a torchrun agent, one per node; one or two nodes with one rank each meet at `endpoint`."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", endpoint, "--rdzv-id", "test", "--nnodes", "1:2"),
        *("--nproc-per-node", "1", "--max-restarts", "9"),
        *("--rdzv-conf", f"last_call_timeout={last_call},{KEEP_ALIVE}"),
        *("-m", "lars_train"),
    ]


def until(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def lines(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(folder: Path) -> dict[float, float]:
    return {line["update"]: line["train/loss"] for line in lines(folder) if "train/loss" in line}


def undisturbed_losses(folder: Path) -> dict[float, float]:
    """Return the losses of an uninterrupted run of one process."""
    ran([*ALONE, *SETTINGS], folder)
    return losses(folder / "run")


def assert_same_curve(folder: Path, reference: dict[float, float]) -> None:
    assert json.loads((folder / "final.json").read_text())["updates"] == 60
    found = [line["update"] for line in lines(folder) if "train/loss" in line]
    assert found == list(reference)
    assert list(losses(folder).values()) == pytest.approx(list(reference.values()), rel=1e-10)
