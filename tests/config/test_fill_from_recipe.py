"""A config takes the values that the command line does not set from its recipe's row."""

from __future__ import annotations

from typing import Any

import pytest
from resolving import refusal, resolved

from lars_train.config import Config, filled, flatten, published_top1
from lars_train.errors import ConfigError

# The published table (github.com/kakaobrain/torchlars, README) with the additions of configs/recipe/torchlars.yaml:
# optimizer, lr, warm-up epochs, weight decay, epochs, published top-1.
TORCHLARS = {
    "256": ("sgd", 0.2, 0.0, 1e-4, 90, 73.79),
    "8k": ("lars", 12.8, 5.0, 5e-4, 90, 73.78),
    "16k": ("lars", 25.0, 5.0, 5e-4, 90, 73.36),
    "32k": ("lars", 29.0, 5.0, 5e-4, 90, 72.26),
}


@pytest.mark.parametrize("row", TORCHLARS)
def test_the_rows_of_torchlars_are_as_published(row: str) -> None:
    config = resolved("data=imagenet", f"batch='{row}'")
    opt = config.optimizer
    warmup, epochs = config.schedule.warmup_epochs, config.epochs
    assert (opt.name, opt.lr, warmup, opt.weight_decay, epochs, published_top1(config)) == TORCHLARS[row]
    assert (opt.base, opt.momentum, opt.decay_norm_bias) == ("SGD", 0.9, True)
    # Plain SGD has no options of LARS.
    assert (opt.eps, opt.trust_coef) == ((None, None) if row == "256" else (1e-8, 1e-3))
    assert (config.schedule.power, config.schedule.form) == (2.0, "whole")
    assert (config.model.ghost_batch, config.model.zero_gamma, config.label_smoothing) == (32, False, 0.0)


OVERRIDES = {
    "optimizer.lr": 7.5,
    "optimizer.momentum": 0.5,
    "optimizer.weight_decay": 0.0,
    "optimizer.decay_norm_bias": False,
    "optimizer.eps": 0.0,
    "optimizer.trust_coef": 0.02,
    "optimizer.nesterov": True,
    "optimizer.adapt_norm_bias": False,
    "optimizer.denominator": "combined",
    "optimizer.clip": [0.0, 50.0],
    "optimizer.zero_norm": "skip",
    "optimizer.zero_decay": "skip",
    "optimizer.lr_placement": "inside",
    "optimizer.clamp": 10.0,
    "schedule.warmup_start": 0.1,
    "schedule.end_lr": 0.1,
    "data.min_crop": 0.2,
    "schedule.warmup_epochs": 0.0,
    "schedule.power": 1.0,
    "schedule.form": "restart",
    "model.ghost_batch": 64,
    "model.zero_gamma": True,
    "model.blurpool": True,
    "evaluate.flip": True,
    "epochs": 3,
    "label_smoothing": 0.1,
    "augment.mixup": 0.2,
    "augment.cutmix": 1.0,
    "augment.auto": "trivial",
}


@pytest.mark.parametrize("key", OVERRIDES)
def test_a_given_value_overrides_the_row_and_nothing_else(key: str) -> None:
    # Zero and false are values too; only null means the value of the row.
    row = flatten(resolved("data=imagenet"))
    extra = {"schedule.warmup_epochs": 1.0} if key == "epochs" else {}
    overridden = flatten(resolved("data=imagenet", **{key: OVERRIDES[key], **extra}))
    # Without a warm-up there is no warmup_start.
    without = {"schedule.warmup_start": None} if key == "schedule.warmup_epochs" else {}
    assert overridden == row | {key: OVERRIDES[key]} | extra | without


def test_a_row_sets_the_loss_and_a_threshold_only_for_bce() -> None:
    row = {"recipe.rows.32k.loss": "bce", "recipe.rows.32k.bce_threshold": 0.2}
    found = [resolved("data=imagenet", **row, **own) for own in ({}, {"bce_threshold": 0}, {"loss": "cross_entropy"})]
    assert [(c.loss, c.bce_threshold) for c in found] == [("bce", 0.2), ("bce", 0), ("cross_entropy", None)]
    default = resolved("data=imagenet")
    assert (default.loss, default.bce_threshold) == ("cross_entropy", None)


def test_a_row_sets_randaugments_strength_only_for_randaugment() -> None:
    row = {"recipe.rows.32k.auto": "randaugment", "recipe.rows.32k.randaugment_magnitude": 6}
    found = [resolved("data=imagenet", **row, **own).augment for own in ({}, {"augment.auto": "trivial"})]
    found.append(resolved("data=imagenet", augment__auto="randaugment").augment)
    names = ("auto", "randaugment_ops", "randaugment_magnitude")
    assert [tuple(getattr(one, name) for name in names) for one in found] == [
        ("randaugment", 2, 6),
        ("trivial", None, None),
        ("randaugment", 2, 9),
    ]


# Options that conflict with others.
ALONE = {
    "optimizer.ratio_of": "step",
    "optimizer.ratio_placement": "outside",
    "optimizer.decay_placement": "base",
}


STEPS = {"schedule.form": "steps", "schedule.steps": [10.0, 20.0], "schedule.step_factor": 0.5}


@pytest.mark.parametrize("key", ALONE)
def test_conflicting_lars_options_reach_the_config_one_at_a_time(key: str) -> None:
    row = flatten(resolved("data=imagenet"))
    assert flatten(resolved("data=imagenet", **{key: ALONE[key]})) == row | {key: ALONE[key]}
    given = {f"recipe.rows.32k.{key.rpartition('.')[2]}": ALONE[key]}
    assert flatten(resolved("data=imagenet", **given))[key] == ALONE[key]


def test_step_decay_can_be_set_directly_or_by_a_row() -> None:
    row = flatten(resolved("data=imagenet"))
    without = {"schedule.power": None, "schedule.end_lr": None}
    assert flatten(resolved("data=imagenet", **STEPS)) == row | STEPS | without
    given = {f"recipe.rows.32k.{key.rpartition('.')[2]}": value for key, value in STEPS.items()}
    leaves = flatten(resolved("data=imagenet", **given))
    assert {key: leaves[key] for key in (*STEPS, *without)} == STEPS | without


def test_a_cosine_keeps_the_rows_end_and_has_no_power() -> None:
    row = flatten(resolved("data=imagenet"))
    assert flatten(resolved("data=imagenet", schedule__form="cosine")) == row | {
        "schedule.form": "cosine",
        "schedule.power": None,
    }
    assert resolved("recipe=mlperf", "data=imagenet", schedule__form="cosine").schedule.end_lr == 1e-4
    assert resolved("data=imagenet", schedule__form="cosine", schedule__end_lr=0.5).schedule.end_lr == 0.5


def test_the_steps_of_a_row_shrink_with_the_warm_up() -> None:
    schedule = resolved("recipe=goyal", "batch=8k", "data=mini").schedule
    assert schedule.steps == pytest.approx([30 / 9, 60 / 9, 80 / 9])
    assert schedule.warmup_epochs == pytest.approx(5 / 9)
    given = resolved("recipe=goyal", "batch=8k", "data=mini", schedule__steps=[5.0]).schedule
    assert given.steps == [5.0]


def test_single_options_override_a_preset() -> None:
    opt = resolved("recipe=mlperf", "data=imagenet", "batch=4k", optimizer__preset="nus-hpc").optimizer
    assert (opt.eps, opt.clip, opt.ratio_placement, opt.clamp) == (1e-5, [0.0, 50.0], "outside", 10.0)
    assert (opt.lr_placement, opt.lr, opt.adapt_norm_bias) == ("outside", 10.0, False)
    own = resolved(optimizer__preset="larc", optimizer__clip="none", optimizer__eps=1e-3).optimizer
    assert (own.clip, own.eps, own.trust_coef, own.zero_norm) == ("none", 1e-3, 0.02, "skip")
    message = refusal(optimizer__preset="nus")
    assert message.startswith("optimizer.preset=nus")
    assert "nus-hpc" in message


def test_published_results_are_only_in_configs_for_imagenet() -> None:
    def published(config: Config) -> list[str]:
        return [key for key in flatten(config) if key.endswith("published_top1")]

    assert published(resolved()) == published(resolved("data=cifar10", "recipe=nus")) == []
    assert len(published(resolved("data=imagenet"))) == len(TORCHLARS)


def test_every_field_of_a_row_reaches_the_config() -> None:
    expected = OVERRIDES | {"schedule.warmup_epochs": 2.5}
    row = {key.rpartition(".")[2]: value for key, value in expected.items()} | {"published_top1": 1.5}
    row["flip_evaluation"] = row.pop("flip")
    config = resolved("data=imagenet", **{f"recipe.rows.32k.{key}": value for key, value in row.items()})
    leaves = flatten(config)
    assert {key: leaves[key] for key in expected} == expected
    assert published_top1(config) == 1.5
    assert resolved("data=imagenet", **{"recipe.rows.32k.optimizer": "sgd"}).optimizer.name == "sgd"


def test_a_row_overrides_the_common_values() -> None:
    shared = {"recipe.common.power": 3.0}
    assert resolved("data=imagenet", **shared).schedule.power == 3.0
    assert resolved("data=imagenet", **shared, **{"recipe.rows.32k.power": 1.0}).schedule.power == 1.0


def test_the_row_chooses_the_optimizer_unless_it_is_given() -> None:
    assert resolved("batch='256'", "optimizer=sgd").optimizer.lr == 0.2
    assert resolved("optimizer=lars").optimizer.lr == 29.0
    forced = resolved("batch='256'", "optimizer=lars", optimizer__lr=3.0)
    assert (forced.optimizer.name, forced.optimizer.lr, forced.optimizer.weight_decay) == ("lars", 3.0, 1e-4)


@pytest.mark.parametrize(
    ("choices", "values"),
    [
        (("optimizer=sgd",), {}),
        (("optimizer=lars", "batch='256'"), {}),
        (("optimizer=lars",), {"optimizer__base": "AdamW"}),
        ((), {"optimizer__base": "AdamW"}),
        (("optimizer=adamw",), {}),
        (("optimizer=torch", "batch='256'"), {"optimizer__base": "RMSprop"}),
    ],
)
def test_an_optimizer_other_than_the_rows_needs_an_lr(choices: tuple[str, ...], values: Any) -> None:
    assert "optimizer.lr" in refusal(*choices, **values)
    assert resolved(*choices, **values, optimizer__lr=0.1).optimizer.lr == 0.1


def test_a_base_other_than_sgd_gets_momentum_only_if_given() -> None:
    values = {"optimizer__base": "AdamW", "optimizer__lr": 0.1}
    assert resolved(**values).optimizer.momentum is None
    assert resolved(**values, optimizer__momentum=0.3).optimizer.momentum == 0.3


def test_a_literal_batch_needs_an_lr_and_is_not_scaled() -> None:
    message = refusal(batch__size=640)
    assert "batch.size=640" in message
    assert "optimizer.lr" in message
    config = resolved(batch__size=640, optimizer__lr=2.0)
    assert (config.batch.size, config.batch.scaled, config.optimizer.lr) == (640, False, 2.0)
    assert published_top1(config) is None
    assert resolved(batch__size=640, optimizer__lr=2.0, batch__scaled=True).batch.scaled is True


@pytest.mark.parametrize("data", ["imagenet", "folder", "mini", "cifar10", "fashion_mnist", "synthetic"])
def test_rows_scale_on_built_in_data_by_default(data: str) -> None:
    assert resolved(f"data={data}").batch.scaled is (data not in ("imagenet", "folder"))
    assert resolved(f"data={data}", batch__scaled=True).batch.scaled is True
    assert resolved(f"data={data}", batch__scaled=False).batch.scaled is False


def test_the_warm_up_shrinks_with_the_epochs_of_embedded_data() -> None:
    def warmup(*choices: str, **values: Any) -> float:
        return filled(resolved(*choices, **values).schedule.warmup_epochs)

    assert warmup("data=mini") == pytest.approx(5 * 10 / 90)
    assert warmup("data=mini", epochs=18) == pytest.approx(1.0)
    assert warmup("data=mini", schedule__warmup_epochs=2.0) == 2.0
    assert warmup("data=mini", schedule__scale_warmup=False) == 5.0
    assert warmup("data=mini", "batch='256'") == 0.0
    assert warmup("data=cifar10", epochs=18) == 5.0
    assert warmup("data=cifar10", epochs=18, schedule__scale_warmup=True) == pytest.approx(1.0)
    assert warmup("data=cifar10", schedule__scale_warmup=True) == 5.0


@pytest.mark.parametrize("batch", ["512", "1k", "2k", "4k", "64k"])
def test_a_batch_without_a_row_is_refused_with_all_rows(batch: str) -> None:
    message = refusal(f"batch='{batch}'")
    assert message.startswith(f"batch={batch}")
    assert "256, 8k, 16k, 32k" in message


def test_a_run_shorter_than_its_warm_up_suggests_scale_warmup() -> None:
    message = refusal("data=cifar10", epochs=2)
    assert message.startswith("epochs=2: the run must be longer than its warm-up, which has 5 epochs")
    assert "Set schedule.warmup_epochs to less than 2, or raise epochs, or set schedule.scale_warmup=true" in message
    assert "shortens the warm-up in proportion to the run (0.111 epochs)" in message
    assert "32k" not in message
    config = resolved("data=cifar10", epochs=2, schedule__scale_warmup=True)
    assert config.schedule.warmup_epochs == pytest.approx(0.111, abs=1e-3)
    assert "scale_warmup" not in refusal("data=cifar10", epochs=2, schedule__warmup_epochs=3.0)


def test_a_literal_batch_needs_a_row_for_the_other_values() -> None:
    with pytest.raises(ConfigError, match="no row"):
        resolved("batch=64k", batch__size=64, optimizer__lr=1.0)


@pytest.mark.parametrize("optimizer", ["sgd", "torch", "adamw"])
def test_lars_options_are_refused_without_lars(optimizer: str) -> None:
    for key, value in {"trust_coef": 0.1, "preset": "mlperf", "clip": "none", "adapt_norm_bias": True}.items():
        with pytest.raises(ConfigError, match=rf"optimizer\.{key}"):
            resolved(f"optimizer={optimizer}", optimizer__lr=1.0, **{f"optimizer__{key}": value})
