"""A batch finds its row by number or name; a batch without a row is refused with settings that work."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from resolving import resolved
from tiny import composed

from lars_train.config import nominal_batch, published_top1, resolve
from lars_train.config.arguments import prepare_arguments
from lars_train.config.compose import explain
from lars_train.errors import ConfigError
from lars_train.run_plan import make_plan

IMAGES = 1_281_167


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("mlperf", {"4096": "4k", "57344": "56k", "65536": "64k", "1632": "1632"}),
        ("nus", {"1024": "1k", "4096": "4k"}),
        ("goyal", {"8192": "8k"}),
        ("torchlars", {"256": "256"}),
    ],
)
def test_a_batch_may_be_named_4096_or_4k(recipe: str, names: dict[str, str]) -> None:
    for number, name in names.items():
        config = resolved(f"recipe={recipe}", f"batch={number}", "data=imagenet")
        assert config == resolved(f"recipe={recipe}", f"batch={name}", "data=imagenet")
        assert config.batch.nominal == int(number)


def test_a_recipe_may_name_its_rows_4096_or_4k() -> None:
    raw = composed("data=imagenet", "batch=4k")
    OmegaConf.update(raw, "recipe.rows.'4096'", {"lr": 3.5, "published_top1": 1.0}, force_add=True)
    rows = OmegaConf.to_container(raw.recipe.rows)
    assert isinstance(rows, dict)
    raw.recipe.rows = {str(key).strip("'"): value for key, value in rows.items()}
    config = resolve(raw)
    assert (config.optimizer.lr, published_top1(config)) == (3.5, 1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("batch=1632",),
            ("batch=256 (lr 0.2, warm-up 0 epochs)", "batch=8k (lr 12.8", "one is for sgd and the other for lars"),
        ),
        (("recipe=nus", "batch=2k"), ("batch=1k (lr 5.65685, warm-up 0.3125 epochs)", "batch=4k (lr 11.3137")),
        (("recipe=nus", "batch=64k"), ("nearest is batch=32k (lr 32", "batch.size=65536")),
        (("recipe=mlperf", "batch=256"), ("nearest is batch=1632 (lr 7.4", "batch.size=256")),
        (("recipe=goyal",), ("its rows are 8k.", "nearest is batch=8k (lr 3.2")),
        (("recipe=nus", "batch=64k", "batch.size=1000", "optimizer.lr=1"), ("no row", "such as batch=1k")),
    ],
)
def test_a_batch_without_a_row_is_refused_with_the_nearest_rows(arguments: tuple[str, ...], words: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(*arguments)
    assert [word for word in words if word not in str(caught.value)] == []


def refusal_of(*arguments: str) -> str:
    """Return the error message, whether another recipe has the batch or none."""
    try:
        resolved(*arguments)
    except ConfigError as error:
        return str(error)
    except MissingConfigException as error:
        return explain(error, prepare_arguments(list(arguments), None))
    raise AssertionError("no recipe refused the settings")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # 12,288 lies at log2(1.5) = 0.58496 of the way: 12.8 (25/12.8)^0.58496; 16 2^(0.58496/2); 2.5 + 2.5 * 0.58496.
        (("batch=12k",), ("batch=8k (lr 12.8", "batch=16k (lr 25", "batch=16k batch.size=12288 optimizer.lr=18.9")),
        (("batch=12288",), ("batch=8k (lr 12.8", "batch=16k (lr 25", "batch=16k batch.size=12288 optimizer.lr=18.9")),
        (("batch=12K", "recipe=nus"), ("batch=8k (lr 16", "optimizer.lr=19.6 schedule.warmup_epochs=3.96")),
        # log(24576/20480)/log(32768/20480) = 0.38793; 32 is the largest divisor of 24,576 up to 40.
        (("batch=24k", "recipe=mlperf"), ("batch=20k batch.size=24576", "lr=21.7", "epochs=13.6", "ghost_batch=32")),
        (("batch=24k", "recipe=nus"), ("batch=16k (lr 22.6", "batch=32k (lr 32", "batch=32k batch.size=24576")),
        (("batch=12k", "recipe=goyal"), ("its rows are 8k.", "nearest is batch=8k", "does not extrapolate")),
        (("batch=128k",), ("nearest is batch=32k (lr 29", "does not extrapolate", "batch.size=131072")),
        (("batch=64k",), ("does not extrapolate", "a recipe that has the batch (mlperf)")),
        (("batch=12k", "batch.size=20000", "optimizer.lr=1"), ("no row", "such as batch=16k")),
    ],
)
def test_a_batch_of_no_recipe_is_refused_with_the_nearest_rows(
    arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    message = refusal_of(*arguments, "data=imagenet")
    assert [word for word in (*words, "has no row for it") if word not in message] == []
    assert ("by hand" in message) != ("does not extrapolate" in message or "such as" in message)


@pytest.mark.parametrize("batch", ["24k", "28k"])
@pytest.mark.parametrize("data", ["imagenet", "mini", "cifar10"])
def test_the_settings_suggested_between_two_rows_work(data: str, batch: str) -> None:
    images = {"imagenet": IMAGES, "mini": 10_000, "cifar10": 50_000}[data]
    message = (
        refusal_of("recipe=mlperf", f"batch={batch}", f"data={data}")
        .split("by hand")[1]
        .split(" The interpolated warm-up")[0]
    )
    offered = re.findall(r"\b(?:batch|optimizer|schedule|model)[a-z_.]*=[\w.]+", message)
    config = resolved("recipe=mlperf", f"data={data}", *(setting.rstrip(",") for setting in offered))
    # 24,576 lies at log(24576/20480)/log(32768/20480) = 0.38793 of the way from 22 to 21.2, and from 12 to 16 epochs.
    way, epochs = {"24k": (0.38793, 52), "28k": (0.71588, 58)}[batch]
    assert config.optimizer.lr == pytest.approx(22 * (21.2 / 22) ** way, rel=5e-3)
    share = 10 / epochs if data == "mini" else 1
    assert config.schedule.warmup_epochs == pytest.approx((12 + 4 * way) * share, rel=5e-3)
    plan = make_plan(config, images)
    assert plan.nominal_batch == nominal_batch(batch)
    assert plan.updates_per_epoch == pytest.approx(IMAGES // nominal_batch(batch), rel=0.35)


def test_a_suggested_warm_up_explains_how_it_shrinks() -> None:
    message = refusal_of("recipe=mlperf", "batch=24k", "epochs=1")
    # 12 + 4 * 0.38793 epochs of 52.
    assert "schedule.warmup_epochs=0.261" in message
    assert "13.6 of the 52 epochs of batch=20k. Because schedule.scale_warmup is true, it is scaled to" in message
    assert "this run's epochs=1: 13.6 * 1 / 52 = 0.261." in message
    for more in ("schedule.scale_warmup=false", "data=imagenet"):
        message = refusal_of("recipe=mlperf", "batch=24k", "epochs=20", more)
        assert "schedule.warmup_epochs=13.6" in message
        assert "shrunk" not in message


def test_suggested_settings_keep_given_values() -> None:
    given = ("batch.scaled=false", "optimizer.lr=7.123456", "schedule.warmup_epochs=1.5", "model.ghost_batch=64")
    message = refusal_of("recipe=mlperf", "batch=24k", *given)
    assert [setting for setting in given if setting not in message.split("(the values that you set stay):")[1]] == []
    assert "batch.scaled=true" not in message
    assert "shrunk" not in message
    assert "batch.scaled=false" in refusal_of("recipe=nus", "batch=64k", "batch.scaled=false")
    assert "batch.scaled=true" in refusal_of("recipe=mlperf", "batch=24k", "batch.scaled=true", "data=imagenet")
