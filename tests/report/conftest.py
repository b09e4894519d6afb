"""Synthetic run directories: `make_run` writes one and returns its path."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROWS: dict[str, dict[str, Any]] = {
    "256": {"optimizer": "sgd", "lr": 0.2, "warmup_epochs": 0, "weight_decay": 1e-4, "published_top1": 73.79},
    "8k": {"optimizer": "lars", "lr": 12.8, "warmup_epochs": 5, "weight_decay": 5e-4, "published_top1": 73.78},
    "32k": {"optimizer": "lars", "lr": 29.0, "warmup_epochs": 5, "weight_decay": 5e-4, "published_top1": 72.26},
}
COMMON = {"momentum": 0.9, "power": 2.0, "epochs": 90, "ghost_batch": 32}
NOMINAL = {"256": 256, "8k": 8192, "32k": 32768}
IMAGENET = 1_281_167


def settings_of(batch: str) -> dict[str, Any]:
    """Return the settings in the record of a run with this row of the recipe, on all of ImageNet."""
    row = ROWS[batch]
    return {
        "seed": 0,
        "epochs": 90,
        "run.name": None,
        "batch.name": batch,
        "batch.nominal": NOMINAL[batch],
        "batch.size": None,
        "batch.scaled": False,
        "recipe.name": "torchlars",
        **{f"recipe.common.{k}": v for k, v in COMMON.items()},
        **{f"recipe.rows.{name}.{k}": v for name, values in ROWS.items() for k, v in values.items()},
        "data.name": "imagenet",
        "data.root": "/data/imagenet",
        "model.name": "resnet50",
        "model.ghost_batch": 32,
        "optimizer.name": row["optimizer"],
        "optimizer.base": "SGD",
        "optimizer.lr": row["lr"],
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": row["weight_decay"],
        "schedule.warmup_epochs": float(row["warmup_epochs"]),
        "schedule.power": 2.0,
        "schedule.scale_warmup": False,
        "precision.name": "auto",
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run with the given top-1 after each epoch, and returns its path.

    An epoch has 4 updates of 10 s. `planned`: epochs; `ended`: how the last start ended, None if it did not; `done`:
    write ``final.json``; `samples`: images of the training set; `changes`: settings with ``__`` for the dot.
    """

    def make(
        name: str,
        batch: str = "32k",
        top1: Sequence[float] = (10.0, 30.0, 20.0),
        *,
        seed: int = 0,
        planned: int | None = None,
        ended: str | None = "finished",
        reason: str = "",
        done: bool | None = None,
        starts: int = 1,
        samples: int = IMAGENET,
        global_batch: int | None = None,
        raised: bool = False,
        precision: str = "bf16",
        **changes: Any,
    ) -> Path:
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        settings = {**settings_of(batch), "seed": seed, **{k.replace("__", "."): v for k, v in changes.items()}}
        size = global_batch or settings["batch.size"] or NOMINAL[batch]
        per_epoch, updates = 4, 4 * len(top1)
        plan = {
            "samples": samples,
            "nominal_batch": settings["batch.size"] or NOMINAL[batch],
            "global_batch": size,
            "raised": raised,
            "updates": per_epoch * (planned or len(top1)),
        }
        start = {
            "resumed_at": 0,
            "resolved": {"precision": precision},
            "versions": {"lars-train": "0.1.0", "torch": "2.13.0"},
            "git": None,
        }
        started = [{**start, "resumed_at": 4 * k} for k in range(starts)]
        if ended is not None:
            started[-1]["ended"] = {"how": ended, "reason": reason, "update": updates, "seconds": 10.0 * updates}
        record = {"hash": "0" * 8, "settings": settings, "seed": seed, "plan": plan, "started": started}
        (directory / "run.json").write_text(json.dumps(record))
        lines = []
        for update in range(1, updates + 1):
            at = {"update": update, "epoch": update / per_epoch, "run/seconds": 10.0 * update}
            lines.append({**at, "train/loss": 2.0 / update})
            if update % per_epoch == 0:
                lines.append({**at, "val/top1": top1[update // per_epoch - 1]})
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if ended == "finished" if done is None else done:
            final = {
                "best_top1": max(top1),
                "final_top1": top1[-1],
                "updates": updates,
                "planned_updates": plan["updates"],
                "seconds": 10.0 * updates,
                "rollbacks": [],
                "directory": str(directory),
            }
            (directory / "final.json").write_text(json.dumps(final))
        return directory

    return make
