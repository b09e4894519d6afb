"""A composed config has the values of the recipe's row and of overrides, is checked, and has a hash."""

from __future__ import annotations

import dataclasses
import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from lars_train.config import (
    Config,
    absolute_paths,
    config_dir,
    experiment_settings,
    filled,
    flatten,
    published_top1,
    register,
    resolve,
    run_hash,
)
from lars_train.errors import ConfigError

# The published table (github.com/kakaobrain/torchlars, README) and what configs/recipe/torchlars.yaml adds to it:
# optimizer, lr, warm-up epochs, weight decay, epochs, published top-1.
TORCHLARS = {
    "256": ("sgd", 0.2, 0.0, 1e-4, 90, 73.79),
    "8k": ("lars", 12.8, 5.0, 5e-4, 90, 73.78),
    "16k": ("lars", 25.0, 5.0, 5e-4, 90, 73.36),
    "32k": ("lars", 29.0, 5.0, 5e-4, 90, 72.26),
}


@lru_cache
def composed(*overrides: str) -> DictConfig:
    register()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def resolved(*choices: str, **values: Any) -> Config:
    """Resolve a config. Hydra composes `choices`; `values` are set by dotted key, with ``__`` for the dot."""
    raw = deepcopy(composed(*choices))
    for key, value in values.items():
        # The schema does not restrict a recipe's rows.
        OmegaConf.update(raw, key.replace("__", "."), value, force_add=key.startswith("recipe."))
    return resolve(raw)


def refusal(*choices: str, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(*choices, **values)
    return str(caught.value)


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
    "epochs": 3,
    "label_smoothing": 0.1,
}


@pytest.mark.parametrize("key", OVERRIDES)
def test_a_given_value_overrides_the_row_and_nothing_else(key: str) -> None:
    # Zero and false are values, too, and must not mean "as the row says".
    row = flatten(resolved("data=imagenet"))
    extra = {"schedule.warmup_epochs": 1.0} if key == "epochs" else {}
    overridden = flatten(resolved("data=imagenet", **{key: OVERRIDES[key], **extra}))
    # Without a warm-up there is no warmup_start.
    without = {"schedule.warmup_start": None} if key == "schedule.warmup_epochs" else {}
    assert overridden == row | {key: OVERRIDES[key]} | extra | without


# Options that conflict with others.
ALONE = {"optimizer.ratio_placement": "outside", "optimizer.decay_placement": "base"}
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


def test_the_hash_covers_a_presets_options_but_not_its_name() -> None:
    expected = run_hash(resolved("data=imagenet"))
    assert run_hash(resolved("data=imagenet", optimizer__preset="torchlars")) == expected
    assert run_hash(resolved("data=imagenet", optimizer__preset="timm")) != expected
    by_hand = {"optimizer__eps": 1e-7, "optimizer__lr_placement": "inside"}
    assert run_hash(resolved("data=imagenet", **by_hand)) == run_hash(
        resolved("data=imagenet", optimizer__preset="mlperf")
    )


def test_published_results_are_only_in_configs_for_imagenet() -> None:
    def published(config: Config) -> list[str]:
        return [key for key in flatten(config) if key.endswith("published_top1")]

    assert published(resolved()) == published(resolved("data=cifar10", "recipe=nus")) == []
    assert len(published(resolved("data=imagenet"))) == len(TORCHLARS)


def test_every_field_of_a_row_reaches_the_config() -> None:
    expected = OVERRIDES | {"schedule.warmup_epochs": 2.5}
    row = {key.rpartition(".")[2]: value for key, value in expected.items()} | {"published_top1": 1.5}
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
def test_rows_scale_on_all_data_except_imagenet_by_default(data: str) -> None:
    assert resolved(f"data={data}").batch.scaled is (data != "imagenet")
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


POSITIVE = (
    "epochs",
    "max_updates",
    "log_every",
    "batch.size",
    "model.ghost_batch",
    "optimizer.lr",
    "optimizer.trust_coef",
    "schedule.power",
    "data.image_size",
    "data.train_count",
    "data.val_count",
    "data.num_classes",
    "distributed.timeout",
    "distributed.bucket_mb",
    "evaluate.every_epochs",
    "checkpoint.every_updates",
    "checkpoint.keep",
)
NOT_NEGATIVE = (
    "seed",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "optimizer.eps",
    "schedule.warmup_epochs",
    "data.pad",
    "data.max_bad",
    "label_smoothing",
)


FLOATS = {
    "optimizer.lr",
    "optimizer.trust_coef",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "optimizer.eps",
    "schedule.power",
    "schedule.warmup_epochs",
    "distributed.timeout",
    "distributed.bucket_mb",
    "label_smoothing",
}


@pytest.mark.parametrize("key", [*POSITIVE, *NOT_NEGATIVE])
def test_a_number_out_of_range_is_refused_by_its_key(key: str) -> None:
    extra = {"optimizer.lr": 1.0} if key == "batch.size" else {}
    values: list[float] = [-1, 0] if key in POSITIVE else [-1]
    if key in FLOATS:
        values += [float("nan"), float("inf")]
    for value in values:
        assert refusal(**{**extra, key: value}).startswith(f"{key}=")
    if key in NOT_NEGATIVE:
        assert flatten(resolved(**{key: 0}))[key] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "trian"}, "mode=trian"),
        ({"resume": "always"}, "resume=always"),
        ({"resume": "runs/x"}, "checkpoint.path=runs/x"),
        ({"device": "gpu"}, "device=gpu"),
        ({"verbosity": 3}, "verbosity=3"),
        ({"verbosity": -1}, "verbosity=-1"),
        ({"precision.name": "fp8"}, "precision.name=fp8"),
        ({"optimizer.name": "adam"}, "optimizer.name=adam"),
        ({"data.name": "imagnet"}, "data.name=imagnet"),
        ({"data.augment": "crop"}, "data.augment=crop"),
        ({"data.on_error": "stop"}, "data.on_error=stop"),
        ({"data.decoder": "cuda"}, "data.decoder=cuda"),
        ({"schedule.form": "hole"}, "schedule.form=hole"),
        ({"optimizer.clip": "LR"}, "optimizer.clip=LR"),
        ({"optimizer.clip": [50, 0]}, "optimizer.clip=[50,0]: give optimizer.clip=none"),
        ({"optimizer.clip": [0, float("inf")]}, "optimizer.clip="),
        ({"optimizer.clamp": 0}, "optimizer.clamp=0"),
        ({"optimizer.clamp": True}, "optimizer.clamp=True"),
        ({"optimizer.denominator": "both"}, "optimizer.denominator=both"),
        ({"optimizer.lr_placement": "inside", "optimizer.ratio_placement": "outside"}, "optimizer.lr_placement=inside"),
        ({"optimizer.lr_placement": "inside", "optimizer.decay_placement": "base"}, "optimizer.decay_placement=base"),
        ({"schedule.warmup_start": 29.5}, "schedule.warmup_start=29.5"),
        ({"schedule.warmup_start": -0.1}, "schedule.warmup_start=-0.1"),
        ({"schedule.warmup_start": "slow"}, "schedule.warmup_start=slow"),
        ({"schedule.warmup_start": 0, "schedule.warmup_epochs": 0.0}, "schedule.warmup_start=0"),
        ({"schedule.end_lr": 30.0}, "schedule.end_lr=30"),
        ({"schedule.steps": [1.0]}, "schedule.steps=[1.0] has no meaning with schedule.form=whole"),
        ({"schedule.step_factor": 0.2}, "schedule.step_factor=0.2 has no meaning"),
        ({"schedule.form": "steps", "schedule.power": 2.0}, "schedule.power=2.0 has no meaning"),
        ({"schedule.form": "steps", "schedule.end_lr": 0.1}, "schedule.end_lr=0.1 has no meaning"),
        ({"schedule.form": "steps"}, "schedule.steps: "),
        ({"schedule.form": "steps", "schedule.steps": [4.0, 2.0]}, "schedule.steps=[4.0, 2.0]"),
        ({"schedule.form": "steps", "schedule.steps": [0.5]}, "within the warm-up"),
        ({"schedule.form": "steps", "schedule.steps": [4.0, 10.0]}, "schedule.scale_warmup=true"),
        ({"data.min_crop": 0.1}, "data.min_crop=0.1 has no meaning with data.augment=none"),
        ({"data.augment": "inception", "data.min_crop": 0.0}, "data.min_crop=0.0"),
        ({"plan.world": 0}, "plan.world=0"),
        ({"launch.nodes": 0}, "launch.nodes=0"),
        ({"plan.world": 9, "launch.nodes": 2, "launch.nproc": 4}, "plan.world=9: launch.nodes=2"),
        ({"plan.overlap": 1.5}, "plan.overlap=1.5"),
        ({"plan.device": "a1000"}, "plan.device=a1000"),
        ({"plan.picture": "p.png"}, "plan.picture=p.png: to plot hours"),
        ({"optimizer.name": "sgd", "optimizer.base": "Adam", "optimizer.lr": 1.0}, "optimizer.base=Adam"),
        ({"seed": 2**63}, "seed="),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"data.eval_crop": 0.0}, "data.eval_crop=0.0"),
        ({"data.eval_crop": 1.1}, "data.eval_crop=1.1"),
        ({"data.eval_crop": float("nan")}, "data.eval_crop=nan"),
        ({"data.holdout": 0.0}, "data.holdout=0.0"),
        ({"data.holdout": 1.0}, "data.holdout=1.0"),
        ({"data.mean": [0.1, 0.2]}, "data.mean="),
        ({"data.mean": [0.1, 0.2, float("nan")]}, "data.mean="),
        ({"data.std": [0.1, 0.2, 0.0]}, "data.std="),
        ({"data.std": [0.1, float("nan"), 0.1]}, "data.std="),
        ({"data.std": [0.1, float("inf"), 0.1]}, "data.std="),
        ({"data.std": [1e-50, 0.1, 0.1]}, "data.std="),
        ({"data.mean": [1e39, 0.1, 0.1]}, "data.mean="),
        ({"optimizer.lr": 1e39}, "optimizer.lr=1e+39: it is beyond 3.403e+38, the largest float32"),
        ({"optimizer.weight_decay": 1e39}, "optimizer.weight_decay=1e+39"),
        ({"optimizer.momentum": 1e39}, "optimizer.momentum=1e+39"),
        ({"optimizer.eps": 1e39}, "optimizer.eps=1e+39"),
        ({"optimizer.clamp": 1e39}, "optimizer.clamp=1e+39"),
        ({"optimizer.clip": [0, 1e39]}, "optimizer.clip="),
        ({"optimizer.lr": 1e-46}, "optimizer.lr=1e-46: it is 0 in float32"),
        ({"optimizer.trust_coef": 1e-46}, "optimizer.trust_coef=1e-46"),
        ({"data.root": ""}, "data.root=: the value is empty"),
        ({"checkpoint.path": ""}, "checkpoint.path=: the value is empty"),
        ({"run.name": "x" * 256}, "it is too long (256 bytes)"),
        ({"run.dir": "a/" + "é" * 128}, "it is too long (258 bytes)"),
        ({"model.weights": "x/" * 2048}, "it is too long (4,096 bytes)"),
        ({"run.name": "a\r"}, "run.name='a\\r': it has a character that cannot be printed"),
        ({"run.dir": "a\udce9"}, "run.dir='a\\udce9'"),
        ({"data.root": "a\0b"}, "zero byte"),
        ({"schedule.warmup_epochs": 10.0}, "schedule.warmup_epochs=10.0"),
        ({"schedule.warmup_epochs": 11.5}, "schedule.warmup_epochs=11.5"),
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"micro_batch": "all"}, "micro_batch=all"),
        ({"launch.nproc": 0}, "launch.nproc=0"),
        ({"launch.nproc": "gpu"}, "launch.nproc=gpu"),
        ({"launch.threads": 0}, "launch.threads=0"),
        ({"data.workers": -1}, "data.workers=-1"),
        ({"data.workers": "many"}, "data.workers=many"),
        ({"run.name": ""}, "run.name=''"),
        ({"run.name": "a/b"}, "run.name='a/b'"),
        ({"run.name": ".."}, "run.name='..'"),
        ({"run.name": "a", "run.dir": "b"}, "run.dir and run.name"),
        ({"mode": "evaluate"}, "checkpoint.path"),
        ({"mode": "evaluate", "checkpoint.path": "run", "model.weights": "w"}, "=run and model.weights=w are both set"),
        ({"mode": "export"}, "checkpoint.path"),
        ({"mode": "export", "model.weights": "w.pt"}, "checkpoint.path"),
        ({"recipe.rows.32k.momentun": 0.9}, "row 32k: 'momentun' is not a field of a row. Did you mean 'momentum'?"),
    ],
    ids=str,
)
def test_invalid_values_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    assert message in refusal(**values)


def test_the_limits_themselves_are_allowed() -> None:
    for values in (
        {"data__eval_crop": 1.0},
        {"seed": 2**63 - 1},
        {"data__workers": 0},
        {"micro_batch": 1},
        {"launch__nproc": "auto"},
        {"schedule__warmup_epochs": 7.99},
        {"data__mean": [-1.0, 0.0, 2.0]},
        {"mode": "evaluate", "model__weights": "w.pt"},
        {"mode": "export", "checkpoint__path": "x"},
        {"optimizer__lr": 3.4028234e38},
        {"optimizer__lr": 1.5e-45},
        {"run__name": "x" * 255},
        {"run__name": "é 😀"},
    ):
        resolved(**values)


def test_a_run_shorter_than_its_warm_up_is_offered_scale_warmup() -> None:
    message = refusal("data=cifar10", epochs=2)
    assert message.startswith("epochs=2: the warm-up of row 32k is not shorter (5 epochs).")
    assert "schedule.scale_warmup=true, which shrinks it with the run to 0.111 epochs" in message
    config = resolved("data=cifar10", epochs=2, schedule__scale_warmup=True)
    assert config.schedule.warmup_epochs == pytest.approx(0.111, abs=1e-3)
    assert "scale_warmup" not in refusal("data=cifar10", epochs=2, schedule__warmup_epochs=3.0)


def test_a_failed_interpolation_names_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    assert refusal(data__root="${nowhere}") == "data.root: Interpolation key 'nowhere' not found"
    assert re.match(r"optimizer\.base: .*'NOT_SET' not found", refusal(optimizer__base="${oc.env:NOT_SET}"))


def test_a_misspelled_choice_is_answered_with_the_nearest() -> None:
    assert "Did you mean 'train'?" in refusal(mode="trian")
    assert "Did you mean 'imagenet'?" in refusal(data__name="imagnet")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("+sede=1", "sede: there is no such key. Did you mean 'seed'?"),
        ("+optimizer.betas=[0.9,0.99]", "optimizer.betas"),
        ("++data.rot=/x", "data.rot: there is no such key. Did you mean 'data.root'?"),
        ("+run.place.name=x", "run.place"),
        ("+gpus=4", "gpus: there is no such key. Did you mean 'launch.nproc'?"),
    ],
)
def test_an_unknown_key_is_refused_even_with_hydras_plus(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        resolve(composed(override))


def test_optimizer_kwargs_take_any_keyword() -> None:
    config = resolve(composed("optimizer.base=AdamW", "optimizer.lr=0.1", "++optimizer.kwargs.betas=[0.9,0.99]"))
    assert config.optimizer.kwargs == {"betas": [0.9, 0.99]}


def test_flatten_has_every_field_of_the_schema_once() -> None:
    def count(node: Any) -> int:
        if not dataclasses.is_dataclass(node):
            return 1
        return sum(count(getattr(node, f.name)) for f in dataclasses.fields(node))

    leaves = flatten(Config())
    assert len(leaves) == count(Config())
    assert leaves["optimizer.trust_coef"] is None
    assert leaves["data.mean"] == [0.485, 0.456, 0.406]
    assert leaves["optimizer.kwargs"] == {}


# Keys that say how a run is executed and what it reports, not what it computes.
EXECUTION = {
    "compile",
    "channels_last",
    "mode",
    "max_updates",
    "micro_batch",
    "device",
    "resume",
    "log_every",
    "verbosity",
    "run.dir",
    "run.name",
    "launch.nodes",
    "launch.nproc",
    "launch.threads",
    "distributed.timeout",
    "distributed.bucket_mb",
    "evaluate.report",
    "evaluate.outputs",
    "checkpoint.every_updates",
    "checkpoint.every_minutes",
    "checkpoint.keep",
    "guard.max_loss",
    "guard.on_divergence",
    "guard.max_rollbacks",
    "export.path",
    "plan.path",
    "plan.picture",
    "plan.world",
    "check.seconds",
    "check.samples",
    "plan.device",
    "plan.images_per_second",
    "plan.cores",
    "plan.decode_rate",
    "plan.latency_us",
    "plan.update_ms",
    "plan.bandwidth_gb",
    "plan.all_reduce",
    "plan.overlap",
    "optimizer.preset",
    "data.workers",
    "data.decoder",
    "data.cache_dir",
    "data.cache_gb",
    "data.on_error",
    "data.max_bad",
}
# The hash covers a recipe's name and the values that it fills in.
RECIPE_TEXT = ("recipe.source", "recipe.common", "recipe.rows")


def with_leaf(config: Config, key: str, value: Any) -> Config:
    changed = deepcopy(config)
    node: Any = changed
    *path, leaf = key.split(".")
    for part in path:
        node = getattr(node, part)
    assert getattr(node, leaf) != value
    setattr(node, leaf, value)
    return changed


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [0.5, 0.5, 0.5]
    return "another" if value != "another" else "yet another"


def test_the_hash_covers_exactly_the_keys_of_the_experiment() -> None:
    # The global order does not use data.window_shards.
    config = resolved("data=imagenet", data__order="shards")
    keys = [
        f"{group.name}.{leaf.name}" if dataclasses.is_dataclass(getattr(config, group.name)) else group.name
        for group in dataclasses.fields(config)
        for leaf in (
            dataclasses.fields(getattr(config, group.name))
            if dataclasses.is_dataclass(getattr(config, group.name))
            else [group]
        )
    ]
    assert set(keys) > EXECUTION
    for key in keys:
        if key in RECIPE_TEXT:
            continue
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        value = {"betas": [0.9, 0.99]} if key == "optimizer.kwargs" else another(value)
        same = run_hash(with_leaf(config, key, value)) == run_hash(config)
        assert same == (key in EXECUTION), key


def test_the_hash_ignores_window_shards_in_the_global_order() -> None:
    expected = run_hash(resolved("data=imagenet"))
    assert run_hash(resolved("data=imagenet", data__window_shards=3)) == expected
    assert run_hash(resolved("data=imagenet", data__order="shards")) != expected


def test_a_url_needs_order_shards_and_stays_a_url() -> None:
    with pytest.raises(ConfigError, match=r"data\.root=s3://b/x: .*data\.order=shards"):
        resolved("data=imagenet", data__root="s3://b/x")
    config = resolved("data=imagenet", data__root="s3://b/x", data__order="shards", data__cache_dir="here")
    data = absolute_paths(config).data
    assert (data.root, data.cache_dir) == ("s3://b/x", str(Path("here").resolve()))
    assert absolute_paths(resolved("data=imagenet", data__root="x")).data.root == str(Path("x").resolve())


def test_the_hash_does_not_depend_on_the_origin_of_values() -> None:
    expected = run_hash(resolved("data=imagenet"))
    assert re.fullmatch("[0-9a-f]{8}", expected)
    assert run_hash(resolved("data=imagenet", "batch=32k")) == expected
    assert run_hash(resolved("data=imagenet", optimizer__lr=29.0, epochs=90)) == expected
    assert run_hash(resolved("data=imagenet", "optimizer=lars")) == expected
    assert run_hash(resolved("data=imagenet", **{"recipe.rows.8k.lr": 1.0})) == expected


@given(first=st.integers(0, 2**63 - 1), second=st.integers(0, 2**63 - 1))
def test_seeds_have_different_hashes(first: int, second: int) -> None:
    one, two = Config(seed=first), Config(seed=second)
    assert (run_hash(one) == run_hash(two)) == (first == second)


def test_hashing_does_not_change_the_config() -> None:
    config = resolved()
    before = deepcopy(config)
    run_hash(config)
    assert config == before


def test_a_batchs_name_and_nominal_size_must_agree() -> None:
    with pytest.raises(ConfigError, match=r"batch\.name=8k"):
        resolved(batch__name="8k")
    with pytest.raises(ConfigError, match=r"batch\.nominal=0"):
        resolved(batch__nominal=0)


def test_a_literal_batch_needs_a_row_for_the_other_values() -> None:
    with pytest.raises(ConfigError, match="no row"):
        resolved("batch=64k", batch__size=64, optimizer__lr=1.0)


def test_lars_options_are_refused_with_plain_sgd() -> None:
    for key, value in {"trust_coef": 0.1, "preset": "mlperf", "clip": "none", "adapt_norm_bias": True}.items():
        with pytest.raises(ConfigError, match=rf"optimizer\.{key}"):
            resolved("optimizer=sgd", optimizer__lr=1.0, **{f"optimizer__{key}": value})


def test_experiment_settings_leave_out_execution() -> None:
    shown = experiment_settings(resolved("data=mini", "batch='32k'", batch__size=128, optimizer__lr=2.5), 128)
    assert shown["batch"] == 128
    assert shown["optimizer.lr"] == 2.5
    assert {"seed", "epochs", "model.name", "recipe.name"} <= shown.keys()
    # The name 32k is not its batch, and execution and settings of other modes do not affect what it computes.
    for other in (
        "batch.name",
        "batch.nominal",
        "log_every",
        "launch.nproc",
        "check.seconds",
        "data.workers",
        "recipe.rows",
    ):
        assert not any(key == other or key.startswith(f"{other}.") for key in shown), other
