from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from lars_train.config import (
    BatchConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    RecipeConfig,
    ScheduleConfig,
)
from lars_train.data.inventory import Inventory
from lars_train.monitoring.summary import epoch_fields, final_record, startup_lines, validation_gap_note
from lars_train.run_plan import Plan

PLAN = Plan(
    samples=50_000,
    nominal_batch=32768,
    global_batch=1280,
    ghost_batch=32,
    scaled=True,
    raised=False,
    epochs=20,
    updates_per_epoch=39,
    updates=780,
    stop=780,
    warmup_updates=78,
)
CONFIG = Config(
    seed=3,
    batch=BatchConfig(name="32k", nominal=32768),
    recipe=RecipeConfig(rows={"32k": {"published_top1": 72.26}}),
    data=DataConfig(image_size=224, eval_crop=0.875),
    model=ModelConfig(name="resnet20"),
    optimizer=OptimizerConfig(name="lars", base="SGD", lr=29.0, weight_decay=5e-4),
    schedule=ScheduleConfig(warmup_epochs=2.0, power=2.0, form="whole"),
)


@dataclass
class Settings:
    micro_batch: int = 256
    precision: str = "bf16"
    channels_last: bool = True
    threads: int = 4
    world: int = 3
    device: str = "cuda"


@dataclass
class Result:
    top1: float = 61.234
    top5: float = 95.5
    count: int = 10_000
    average: Result | None = None


def startup(plan: Plan = PLAN, config: Config = CONFIG, settings: Any = None, resumed_at: int = 0) -> str:
    return "\n".join(startup_lines(config, plan, settings or Settings(), Path("runs/x"), resumed_at, Inventory()))


def test_startup_lines_have_the_effective_settings() -> None:
    text = startup()
    for part in (
        "mini: 50,000 training images",
        "resnet20, 224 pixels",
        "precision      bf16, channels last, not compiled",
        "32,768 x 50,000 / 1,281,167 = 1278.8",
        "1,280 images per update",
        "world size     3 (cuda, 4 CPU threads each)",
        # 40 ghost batches over 3 ranks: at most 14 per rank, 8 per micro-batch.
        "256 images, accumulation 2, ghost batch 32",
        "39 per epoch, 780 in 20 epochs",
        "LARS over SGD, peak lr 29, weight decay 0.0005",
        "warm-up 78 updates (2 epochs), then poly(2), whole form",
        "runs/x",
    ):
        assert part in text
    for part in ("NOTE", "max_updates", "resumed", "compression"):
        assert part not in text


def test_startup_lines_have_notes_on_unusual_settings() -> None:
    assert "NOTE: raised to 8" in startup(
        replace(PLAN, global_batch=8, ghost_batch=8, raised=True), settings=Settings(8)
    )
    assert "stops after update 100 (max_updates)" in startup(replace(PLAN, stop=100))
    assert "at update 1,234 (resume=never starts over)" in startup(resumed_at=1234)
    plain = replace(CONFIG, optimizer=OptimizerConfig(name="sgd", base="SGD", lr=0.2, weight_decay=1e-4))
    assert "optimizer      SGD, peak lr 0.2" in startup(config=plain)


def test_startup_lines_use_singular_and_few_digits() -> None:
    one = replace(PLAN, epochs=1, updates=39, stop=39, warmup_updates=1)
    text = startup(
        one, replace(CONFIG, schedule=replace(CONFIG.schedule, warmup_epochs=1.0)), Settings(threads=1, world=1)
    )
    for part in ("39 in 1 epoch\n", "warm-up 1 update (1 epoch), then", "1 (cuda, 1 CPU thread)\n"):
        assert part in text
    part = replace(CONFIG, schedule=replace(CONFIG.schedule, warmup_epochs=5 / 9))
    assert "warm-up 22 updates (0.56 epochs), then" in startup(replace(PLAN, warmup_updates=22), part)
    none = replace(CONFIG, schedule=replace(CONFIG.schedule, warmup_epochs=0.0))
    assert "schedule       no warm-up, poly(2)" in startup(replace(PLAN, warmup_updates=0), none)
    cosine = replace(CONFIG, schedule=replace(CONFIG.schedule, power=None, form="cosine"))
    assert "then cosine\n" in startup(config=cosine)


def test_startup_lines_report_gradient_compression() -> None:
    compressed = replace(CONFIG, gradient_compression="bf16")
    assert "compression    gradients are exchanged in bf16\n" in startup(config=compressed)
    alone = startup(config=compressed, settings=Settings(world=1))
    assert (
        "compression    gradients are exchanged in bf16: no effect, since a single rank sends no gradients\n" in alone
    )


def test_startup_lines_name_the_methods_of_the_run() -> None:
    model = replace(CONFIG.model, blurpool=True, ema=0.99, ema_start=78)
    text = startup(config=replace(CONFIG, model=model, evaluate=EvaluateConfig(flip=True)))
    for part in (
        "strided convolutions blur their input (model.blurpool=true)",
        "average        of the weights over about 100 updates (model.ema=0.99)",
        "from update 78; its accuracy counts as the run's",
        "evaluation     with the mean of the logits of each image and its mirror image (evaluate.flip=true)",
    ):
        assert f"{part}\n" in text
    long = startup(config=replace(CONFIG, model=replace(model, ema=0.9999)))
    assert "about 10,000 updates, more than the run has (model.ema=0.9999)" in long
    assert not any(word in startup() for word in ("average", "evaluation", "blur"))


def test_an_epoch_line_has_the_values_that_exist() -> None:
    logged = {
        "train/loss": 1.23456,
        "train/lr": 12.3456,
        "train/images_per_s": 4321.9,
        "train/wait_share": 0.034,
        "train/mfu": 0.418,
    }

    def line(update: int, *given: Any, **more: Any) -> str:
        return "  ".join(epoch_fields(update, PLAN, *given, **more))

    assert line(78, {}) == "epoch 2/20  update 78"
    training = "loss 1.235  4,322 images/s  wait 3 %  MFU 42 %  lr 12.3"
    assert line(79, logged) == f"epoch 3/20  update 79  {training}"
    on_a_cpu = {name: value for name, value in logged.items() if name != "train/mfu"}
    assert line(79, on_a_cpu) == f"epoch 3/20  update 79  {training.replace('  MFU 42 %', '')}"
    assert line(79, {}, seconds_left=7500.0) == "epoch 3/20  update 79  2 h 05 min left"
    assert line(780, {}, seconds_left=3.0) == "epoch 20/20  update 780"  # the run is over
    both = line(78, {}, Result(average=Result(63.0)), 63.0)
    assert both == "epoch 2/20  update 78  top-1 61.23 % of 10,000  EMA 63.00 %  best 63.00 %"
    whole = line(78, logged, Result(), 62.5, 42.0)
    # Most important first, for narrow terminals.
    assert whole == (
        "epoch 2/20  update 78  top-1 61.23 % of 10,000  best 62.50 %  loss 1.235  42 s left  "
        "4,322 images/s  wait 3 %  MFU 42 %  lr 12.3"
    )


@pytest.mark.parametrize(
    ("top1", "update_ratio", "explained"),
    [(72.0, 0.035, True), (70.0, 0.035, False), (72.0, 0.009, False), (72.0, float("nan"), False)],
)
def test_low_validation_is_explained_if_weights_change_fast(top1: float, update_ratio: float, explained: bool) -> None:
    line = validation_gap_note({"train/top1": top1, "train/update_ratio": update_ratio}, Result(top1=61.0))
    assert (line is not None) is explained
    assert validation_gap_note({}, Result(top1=61.0)) is None
    if line is not None:
        assert "training (72 %)" in line
        assert "change by 3.5 % per update" in line


def recorded(config: Config, plan: Plan) -> dict[str, Any]:
    return final_record(
        config,
        plan,
        directory=Path("runs/x"),
        update=100,
        best_top1=62.5,
        result=Result(),
        seconds=12.5,
        bad_images=1,
        passed_over=2,
        rollbacks=[{"from_update": 9}],
        weights_sha256="ab" * 32,
        weights_sha256_float32="cd" * 32,
    )


def test_only_the_published_experiment_has_a_published_result() -> None:
    config = replace(CONFIG, model=ModelConfig(name="resnet50"))
    full = replace(PLAN, samples=1_281_167, global_batch=32768, scaled=False)
    assert recorded(config, full)["published_top1"] == 72.26
    for other, plan in (
        (CONFIG, full),
        (config, replace(full, samples=1_281_166)),
        (config, replace(full, scaled=True)),
    ):
        assert recorded(other, plan)["published_top1"] is None


def test_the_final_record_has_result_and_settings() -> None:
    record = recorded(CONFIG, PLAN)
    assert json.loads(json.dumps(record)) == record
    expected = {
        "best_top1": 62.5,
        "final_top1": 61.234,
        "final_top5": 95.5,
        "val_count": 10_000,
        "updates": 100,
        "planned_updates": 780,
        "seconds": 12.5,
        "weights_sha256": "ab" * 32,
        "seed": 3,
        "directory": "runs/x",
        "epochs_done": pytest.approx(100 / 39),
        "batch": "32k",
        "nominal_batch": 32768,
        "global_batch": 1280,
        "optimizer": "lars",
        "lr": 29.0,
        "warmup_epochs": 2.0,
        "published_top1": None,
    }
    assert expected.items() <= {k: v for k, v in record.items() if k in expected}.items()
