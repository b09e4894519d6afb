"""``mode=plan`` has the numbers of the published table at full size, and runs follow their plan."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from copy import deepcopy
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from tiny import environment

from lars_train import commands
from lars_train.config import Config, config_dir, nominal_batch, register, resolve
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.preflight.rehearsal import rehearse
from lars_train.training import session
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation


@lru_cache
def composed() -> DictConfig:
    register()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", ["mode=plan", "data=synthetic", "batch.scaled=false"])


def full(batch: str, **values: Any) -> Config:
    """A row of the table on 1,281,167 synthetic images of 224 pixels, with 50,000 validation images."""
    raw = deepcopy(composed())
    raw.batch.name, raw.batch.nominal = batch, nominal_batch(batch)
    for key, value in values.items():
        OmegaConf.update(raw, key.replace("__", "."), value)
    return resolve(raw)


# Row: updates per epoch (1,281,167 / batch, rounded down), in 90 epochs, in the warm-up, peak lr, and log lines: one
# per 10 updates and one at the end of each epoch, each update counted once.
TABLE = {
    "256": (5004, 450_360, 0, Fraction("0.2"), 45_036 + 90 - 18),
    "8k": (156, 14_040, 780, Fraction("12.8"), 1_404 + 90 - 18),
    "16k": (78, 7_020, 390, Fraction(25), 702 + 90 - 18),
    "32k": (39, 3_510, 195, Fraction(29), 351 + 90 - 9),
}


@pytest.mark.parametrize("batch", TABLE)
def test_the_published_table_has_the_numbers_computed_by_hand(batch: str, tmp_path: Path) -> None:
    per_epoch, updates, warmup, peak, log_lines = TABLE[batch]
    path = tmp_path / "plan.json"
    commands.run(full(batch, plan__path=str(path), plan__world=8), Invocation())
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    found = json.loads(path.read_text())
    assert (found["updates_per_epoch"], found["updates"], found["stop"]) == (per_epoch, updates, updates)
    assert (found["warmup_updates"], found["samples"]) == (warmup, 1_281_167)
    size = nominal_batch(batch)
    assert (found["global_batch"], found["ghost_batches"], found["world"]) == (size, size // 32, 8)
    assert found["ghost_batches_per_rank"] == [size // 32 // 8] * 2
    assert found["samples_per_epoch"] == per_epoch * size
    assert found["evaluations"] == found["checkpoints"] == [per_epoch * epoch for epoch in range(1, 91)]
    assert found["checkpoints_kept"] == 3 + 1
    assert (found["evaluated_images"], found["evaluated_images_per_rank"]) == (50_000, [6_250, 6_250])
    assert found["log_lines"] == log_lines
    assert [entry["epoch"] for entry in found["lr_per_epoch"]] == list(range(1, 91))
    for entry in found["lr_per_epoch"]:
        epoch = entry["epoch"]
        first, last = per_epoch * (epoch - 1), per_epoch * epoch - 1
        assert (entry["first_update"], entry["last_update"]) == (first + 1, last + 1)
        for key, update in (("lr_first", first), ("lr_last", last)):
            risen, left = Fraction(update + 1, warmup or 1), 1 - Fraction(update, updates)
            assert entry[key] == pytest.approx(float(peak * (risen if update < warmup else left**2)), rel=1e-13, abs=0)


def test_learning_rates_match_values_computed_by_hand() -> None:
    def rates(batch: str) -> dict[int, float]:
        found = commands.run(full(batch, plan__world=1), Invocation())
        return {entry["epoch"]: entry["lr_first"] for entry in found["lr_per_epoch"]}

    # After 9, 45, 81 of 90 epochs there are 9/10, 1/2, 1/10 of the run left.
    thirty_two = rates("32k")
    assert [thirty_two[k] for k in (10, 46, 82)] == pytest.approx([23.49, 7.25, 0.29], rel=1e-12)
    baseline = rates("256")
    assert [baseline[k] for k in (1, 10, 46, 82)] == pytest.approx([0.2, 0.162, 0.05, 0.002], rel=1e-12)


def test_any_number_of_ranks_takes_every_image_once() -> None:
    found = commands.run(full("32k", plan__world=7, micro_batch=64), Invocation())
    # 1,024 = 7 x 146 + 2 ghost batches, in micro-batches of two; 50,000 = 7 x 7,142 + 6.
    assert found["ghost_batches_per_rank"] == [146, 147]
    assert found["accumulation"] == 74
    assert (found["evaluated_images"], found["evaluated_images_per_rank"]) == (50_000, [7_142, 7_143])


def test_an_impossible_plan_is_refused() -> None:
    with pytest.raises(ConfigError, match="too few for 9 ranks"):
        commands.run(full("256", plan__world=9), Invocation())
    with pytest.raises(ConfigError, match="micro_batch=40"):
        commands.run(full("256", plan__world=1, micro_batch=40), Invocation())
    with pytest.raises(ConfigError, match=r"plan\.path=.*cannot be written"):
        commands.run(full("32k", plan__world=1, plan__path="/no/such/folder/plan.json"), Invocation())


def test_a_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    commands.run(full("32k", plan__world=256), Invocation())
    printed = capsys.readouterr().out
    for part in (
        "39 per epoch, 3,510 in 90 epochs",
        "warm-up 195 updates (5 epochs), then poly(2), whole form",
        "epoch  46: 7.25 to",
        "epoch  90: 0.00358 to 2.35e-06\n",
        "world size     256, 4 ghost batches each",
        "1,277,952 per epoch, 115,015,680 in total",
        "evaluations    90, each of 50,000 images",
    ):
        assert part in printed


def small(directory: Path, **changes: Any) -> Config:
    data = {"name": "synthetic", "image_size": 8, "augment": "none", "eval_crop": 1.0}
    counts = {"train_count": 44, "val_count": 7, "num_classes": 4}
    raw = OmegaConf.merge(
        OmegaConf.structured(Config),
        {
            "device": "cpu",
            "batch": {"size": 8},
            "recipe": {"rows": {"32k": {}}},
            "data": {**data, **counts},
            "model": {"name": "small", "ghost_batch": 4},
            "optimizer": {"lr": 1.0},
            "precision": {"name": "fp32"},
            "launch": {"threads": 1},
            "run": {"dir": str(directory)},
            "log_every": 1,
            "epochs": 3,
            "checkpoint": {"every_updates": 4, "keep": 99, "every_minutes": None},
            "evaluate": {"every_epochs": 2},
        },
        changes,
    )
    assert isinstance(raw, DictConfig)
    return resolve(raw)


@pytest.mark.parametrize(
    "schedule",
    [
        {"warmup_epochs": 1.0, "form": "mlperf", "warmup_start": 0.25, "end_lr": 0.125},
        {"warmup_epochs": 0.4, "form": "steps", "steps": [1.0, 2.4], "step_factor": 0.5},
    ],
    ids=lambda schedule: str(schedule["form"]),
)
def test_a_run_does_what_was_planned(schedule: dict[str, Any], tmp_path: Path) -> None:
    config = small(tmp_path / "run", schedule=schedule)
    prepared = prepare(config)
    planned = rehearse(config, prepared.plan, val_count=len(prepared.dataset.val), world=1)
    assert not (tmp_path / "run").exists()
    threads = torch.get_num_threads()
    final = session.train(prepared, Ranks(), Invocation())
    torch.set_num_threads(threads)
    # 5 updates per epoch. Checkpoints each 4 updates, at the end, and with the evaluation after two epochs.
    assert planned["checkpoints"] == [4, 8, 10, 12, 15]
    assert planned["evaluations"] == [10, 15]
    written = sorted(int(path.stem.split("-")[1]) for path in (tmp_path / "run/checkpoints").glob("update-*.pt"))
    assert written == planned["checkpoints"]
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = {entry["update"]: entry["train/lr"] for entry in logged if "train/lr" in entry}
    assert len(rates) == planned["log_lines"] == planned["updates"] == 15
    for entry in planned["lr_per_epoch"]:
        assert rates[entry["first_update"]] == entry["lr_first"]
        assert rates[entry["last_update"]] == entry["lr_last"]
    assert [entry["update"] for entry in logged if "val/top1" in entry] == planned["evaluations"]
    assert final["val_count"] == planned["evaluated_images"] == 7
    assert final["policy"] == planned["policy"]


@pytest.mark.slow
def test_a_plan_takes_little_longer_than_importing_torch() -> None:
    def cpu_seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], env=environment(), check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Not seconds, which depend on the machine: importing takes three to seven. The least of up to four measurements,
    # because a neighbor on the machine costs CPU time too.
    imports, plan = math.inf, math.inf
    for _ in range(4):
        imports = min(imports, cpu_seconds("-c", "import torch, torchvision"))
        plan = min(plan, cpu_seconds("-m", "lars_train", "mode=plan", "data=imagenet", "batch=256"))
        if plan < 1.7 * imports:
            return
    pytest.fail(f"the plan took {plan:.2f} s of CPU time, the imports {imports:.2f} s")
