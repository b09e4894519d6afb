"""Values out of range are refused with their key, and the limits of a range are allowed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from resolving import refusal, resolved
from tiny import composed

from lars_train.config import flatten, resolve
from lars_train.errors import ConfigError

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
    "data.train_size",
    "data.eval_size",
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
        ({"optimizer.ratio_of": "step", "optimizer.clamp": 10.0}, "optimizer.ratio_of=step"),
        ({"schedule.warmup_start": 29.5}, "schedule.warmup_start=29.5"),
        ({"schedule.warmup_start": -0.1}, "schedule.warmup_start=-0.1"),
        ({"schedule.warmup_start": "slow"}, "schedule.warmup_start=slow"),
        ({"schedule.warmup_start": 0, "schedule.warmup_epochs": 0.0}, "schedule.warmup_start=0"),
        ({"schedule.end_lr": 30.0}, "schedule.end_lr=30"),
        ({"schedule.steps": [1.0]}, "schedule.steps=[1.0] has no effect with schedule.form=whole"),
        ({"schedule.step_factor": 0.2}, "schedule.step_factor=0.2 has no effect"),
        ({"schedule.form": "steps", "schedule.power": 2.0}, "schedule.power=2.0 has no effect"),
        ({"schedule.form": "steps", "schedule.end_lr": 0.1}, "schedule.end_lr=0.1 has no effect"),
        (
            {"schedule.form": "cosine", "schedule.power": 2.0},
            "schedule.power=2.0 has no effect with",
        ),
        ({"schedule.form": "cosine", "schedule.steps": [1.0]}, "schedule.steps=[1.0] has no effect"),
        ({"schedule.form": "cosine", "schedule.end_lr": 30.0}, "schedule.end_lr=30"),
        ({"schedule.form": "steps"}, "schedule.form=steps: set schedule.steps"),
        ({"schedule.form": "steps", "schedule.steps": [4.0, 2.0]}, "schedule.steps=[4.0, 2.0]"),
        ({"schedule.form": "steps", "schedule.steps": [0.5]}, "after the warm-up"),
        ({"schedule.form": "steps", "schedule.steps": [4.0, 10.0]}, "schedule.scale_warmup=true"),
        ({"data.min_crop": 0.1}, "data.min_crop=0.1 has no effect with data.augment=none"),
        ({"data.augment": "inception", "data.min_crop": 0.0}, "data.min_crop=0.0"),
        ({"plan.world": 0}, "plan.world=0"),
        ({"launch.nodes": 0}, "launch.nodes=0"),
        ({"plan.world": 9, "launch.nodes": 2, "launch.nproc": 4}, "plan.world=9: launch.nodes=2"),
        ({"plan.overlap": 1.5}, "plan.overlap=1.5"),
        ({"plan.device": "a1000"}, "plan.device=a1000"),
        ({"plan.picture": "p.png"}, "plan.picture=p.png: the plot needs a speed"),
        ({"optimizer.name": "sgd", "optimizer.base": "Adam", "optimizer.lr": 1.0}, "optimizer.base=Adam"),
        ({"seed": 2**63}, "seed="),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"loss": "mse"}, "loss=mse"),
        ({"augment.auto": "auto"}, "augment.auto=auto"),
        ({"augment.randaugment_ops": 2}, "augment.randaugment_ops=2 has no effect with augment.auto=none"),
        (
            {"augment.auto": "trivial", "augment.randaugment_magnitude": 9},
            "augment.randaugment_magnitude=9 has no effect",
        ),
        ({"augment.auto": "randaugment", "augment.randaugment_ops": 0}, "augment.randaugment_ops=0"),
        ({"augment.auto": "randaugment", "augment.randaugment_magnitude": 31}, "augment.randaugment_magnitude=31"),
        ({"augment.auto": "randaugment", "augment.randaugment_magnitude": -1}, "augment.randaugment_magnitude=-1"),
        ({"augment.mixup": -0.1}, "augment.mixup=-0.1"),
        ({"augment.cutmix": float("inf")}, "augment.cutmix=inf"),
        ({"augment.mixup": 0.2, "model.ghost_batch": 1}, "augment.mixup=0.2: a ghost batch of one image has no pairs"),
        ({"augment.cutmix": 1.0, "batch.size": 1, "optimizer.lr": 1.0}, "augment.cutmix=1: a ghost batch of one image"),
        ({"bce_threshold": 0.2}, "bce_threshold=0.2 has no effect with loss=cross_entropy"),
        ({"loss": "bce", "bce_threshold": 1.0}, "bce_threshold=1.0"),
        ({"loss": "bce", "bce_threshold": float("nan")}, "bce_threshold=nan"),
        ({"loss": "bce", "bce_threshold": 0.2, "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect"),
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
        ({"optimizer.lr": 1e39}, "optimizer.lr=1e+39: it must be at most 3.403e+38, the largest float32"),
        ({"optimizer.weight_decay": 1e39}, "optimizer.weight_decay=1e+39"),
        ({"optimizer.momentum": 1e39}, "optimizer.momentum=1e+39"),
        ({"optimizer.eps": 1e39}, "optimizer.eps=1e+39"),
        ({"optimizer.clamp": 1e39}, "optimizer.clamp=1e+39"),
        ({"optimizer.clip": [0, 1e39]}, "optimizer.clip="),
        ({"optimizer.lr": 1e-46}, "optimizer.lr=1e-46: it rounds to 0 in float32"),
        ({"optimizer.trust_coef": 1e-46}, "optimizer.trust_coef=1e-46"),
        ({"data.root": ""}, "data.root=: the value is empty"),
        ({"checkpoint.path": ""}, "checkpoint.path=: the value is empty"),
        ({"run.name": "x" * 256}, "it is too long (256 bytes)"),
        ({"run.dir": "a/" + "é" * 128}, "it is too long (258 bytes)"),
        ({"model.weights": "x/" * 2048}, "it is too long (4,096 bytes)"),
        ({"run.name": "a\r"}, "run.name='a\\r': it has an unprintable character"),
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
        ({"recipe.rows.32k.momentun": 0.9}, "row 32k: 'momentun' is not a valid field. Did you mean 'momentum'?"),
    ],
    ids=str,
)
def test_invalid_values_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    assert message in refusal(**values)


def test_the_limits_of_a_range_are_allowed() -> None:
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


def test_a_failed_interpolation_names_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    assert refusal(data__root="${nowhere}") == "data.root: Interpolation key 'nowhere' not found"
    assert re.match(r"optimizer\.base: .*'NOT_SET' not found", refusal(optimizer__base="${oc.env:NOT_SET}"))


def test_the_error_for_a_misspelled_choice_has_the_nearest() -> None:
    assert "Did you mean 'train'?" in refusal(mode="trian")
    assert "Did you mean 'imagenet'?" in refusal(data__name="imagnet")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("+sede=1", "sede: unknown key. Did you mean 'seed'?"),
        ("+optimizer.betas=[0.9,0.99]", "optimizer.betas"),
        ("++data.rot=/x", "data.rot: unknown key. Did you mean 'data.root'?"),
        ("+run.place.name=x", "run.place"),
        ("+gpus=4", "gpus: unknown key. Did you mean 'launch.nproc'?"),
    ],
)
def test_an_unknown_key_is_refused_even_with_hydras_plus(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        resolve(composed(override))


def test_optimizer_kwargs_take_any_keyword() -> None:
    config = resolve(composed("optimizer.base=AdamW", "optimizer.lr=0.1", "++optimizer.kwargs.betas=[0.9,0.99]"))
    assert config.optimizer.kwargs == {"betas": [0.9, 0.99]}


def test_the_name_and_nominal_size_of_a_batch_must_agree() -> None:
    with pytest.raises(ConfigError, match=r"batch\.name=8k"):
        resolved(batch__name="8k")
    with pytest.raises(ConfigError, match=r"batch\.nominal=0"):
        resolved(batch__nominal=0)
