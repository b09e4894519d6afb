"""Sizes come from the command line, else from the data's config, else from the recipe's row."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from resolving import refusal, resolved

from lars_train.config import Config, DataConfig, resolve, row_sizes_left_out, run_hash, with_row
from lars_train.errors import ConfigError

ROW = {"recipe.rows.32k.train_size": 160, "recipe.rows.32k.eval_size": 256, "recipe.rows.32k.eval_resize": 292}
RECIPE = {"train_size": 160, "eval_size": 256, "eval_resize": 292}
FOLDER = "data=folder data.root=x"


@pytest.mark.parametrize(
    ("arguments", "row", "expected"),
    [
        ("data=imagenet", False, (224, None, 0.875)),
        (FOLDER, False, (224, None, 0.875)),
        ("data=imagenet data.image_size=288", False, (288, None, 0.875)),
        ("data=imagenet data.train_size=160", False, (224, 160, 0.875)),
        ("data=imagenet data.train_size=176 data.eval_size=224 data.eval_resize=232", False, (224, 176, 224 / 232)),
        ("data=imagenet data.image_size=176 data.eval_size=224", False, (224, 176, 0.875)),
        ("data=imagenet data.image_size=160 data.train_size=160", False, (160, None, 0.875)),
        ("data=cifar10", False, (32, None, 1.0)),
        ("data=cifar10 data.train_size=24", False, (32, 24, 1.0)),
        ("data=cifar10 data.eval_resize=36 data.eval_crop=null", False, (32, None, 32 / 36)),
        ("data=imagenet", True, (256, 160, 256 / 292)),
        ("data=synthetic", True, (256, 160, 1.0)),
        (f"{FOLDER} data.train_size=128", True, (256, 128, 256 / 292)),
        ("data=imagenet data.eval_size=288", True, (288, 160, 0.875)),
        ("data=imagenet data.eval_crop=0.9", True, (256, 160, 0.9)),
        ("data=imagenet data.eval_resize=300", True, (256, 160, 256 / 300)),
        ("data=imagenet data.image_size=192", True, (192, None, 0.875)),
        ("data=cifar10", True, (32, None, 1.0)),
        ("data=mini", True, (28, None, 1.0)),
    ],
)
def test_set_sizes_take_precedence_over_those_of_the_row(
    arguments: str, row: bool, expected: tuple[int, int | None, float]
) -> None:
    config = resolved(*arguments.split(), **(ROW if row else {}))
    data = config.data
    assert (data.image_size, data.train_size, data.eval_crop) == expected
    assert (data.eval_size, data.eval_resize) == (None, None)
    # A run's config.yaml gives the same config again.
    assert again(config) == config.data


@pytest.mark.parametrize(
    ("arguments", "left_out"),
    [
        ("data=imagenet", {}),
        ("data=imagenet data.train_size=128", {"train_size": 160}),
        ("data=imagenet data.eval_size=288", {"eval_size": 256, "eval_resize": 292}),
        ("data=cifar10", RECIPE),
    ],
)
def test_sizes_of_the_row_that_do_not_apply_are_known(arguments: str, left_out: dict[str, Any]) -> None:
    assert row_sizes_left_out(resolved(*arguments.split(), **ROW)) == left_out
    assert row_sizes_left_out(resolved(*arguments.split())) == {}


def again(config: Config) -> DataConfig:
    """Resolve a resolved config."""
    raw = OmegaConf.merge(OmegaConf.structured(Config), dataclasses.asdict(config))
    assert isinstance(raw, DictConfig)
    return resolve(raw).data


def test_conflicting_sizes_are_refused() -> None:
    for values, message in (
        ({"data__eval_resize": 223}, "data.eval_resize=223: .* at least the evaluation size, 224"),
        ({"data__eval_resize": 0, "data__eval_size": 1}, "data.eval_resize=0: "),
        ({"data__eval_resize": 256, "data__eval_crop": 0.9}, "data.eval_crop=0.9 is set too"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolved("data=imagenet", **values)
    assert "data.eval_crop=null" in refusal("data=cifar10", data__eval_resize=36)


SCHEDULED = {"recipe.rows.32k.size_schedule": [160, 192, 65, 76], "recipe.rows.32k.eval_size": 256}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("data=imagenet", (256, None, [160, 192, 65, 76])),
        ("data=imagenet epochs=45 schedule.scale_warmup=true", (256, None, [160, 192, 32, 38])),
        ("data=imagenet data.train_size=176", (256, 176, None)),
        ("data=imagenet data.size_schedule=[128,256,0,9]", (256, None, [128, 256, 0, 9])),
        ("data=imagenet data.image_size=224", (224, None, None)),
        ("data=imagenet data.image_size=224 data.size_schedule=[192,160,3,3]", (224, None, [192, 160, 3, 3])),
        ("data=cifar10", (32, None, None)),
        ("data=cifar10 data.size_schedule=[32,64,3,7]", (32, None, [32, 64, 3, 7])),
    ],
)
def test_a_row_may_resize_progressively(arguments: str, expected: tuple[Any, ...]) -> None:
    config = resolved(*arguments.split(), **SCHEDULED)
    assert (config.data.image_size, config.data.train_size, config.data.size_schedule) == expected
    assert again(config) == config.data
    scaled = "scale_warmup" in arguments
    unused = [] if arguments == "data=imagenet" or scaled else ["size_schedule"]
    assert [key for key in row_sizes_left_out(config) if key == "size_schedule"] == unused


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([160, 192], "give four numbers"),
        ([160, 192, 0, 1, 2], "give four numbers"),
        ([160, 180, 0, 8], "two different multiples of 32"),
        ([192, 192, 0, 8], "two different multiples of 32"),
        ([0, 192, 0, 8], "two different multiples of 32"),
        ([-32, 192, 0, 8], "two different multiples of 32"),
        ([160, 192, 9, 8], "in order and below epochs=90"),
        ([160, 192, -1, 8], "in order and below epochs=90"),
        ([160, 192, 0, 90], "in order and below epochs=90.*scale_warmup"),
    ],
)
def test_an_invalid_schedule_is_refused(schedule: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.size_schedule=.*{message}"):
        resolved("data=imagenet", data__size_schedule=schedule)


def test_a_schedule_and_a_training_size_are_refused() -> None:
    assert "data.train_size=160 is set too" in refusal(
        "data=imagenet", data__size_schedule=[160, 192, 0, 8], data__train_size=160
    )


def test_equal_sizes_have_equal_hashes() -> None:
    def of(**values: Any) -> str:
        return run_hash(resolved("data=imagenet", **values))

    assert of() == of(data__image_size=224) == of(data__train_size=224, data__eval_resize=256)
    assert of(data__train_size=160) == of(data__image_size=160, data__eval_size=224)
    assert len({of(), of(data__train_size=160), of(data__eval_size=160), of(data__eval_resize=232)}) == 4


def test_a_planned_row_has_its_own_sizes_unless_they_are_set() -> None:
    def sizes(config: Config) -> tuple[int | None, int | None]:
        return config.data.image_size, config.data.train_size

    assert sizes(with_row(resolved("data=imagenet", **ROW), "8k")) == (224, None)
    assert sizes(with_row(resolved("data=imagenet", "batch=8k", **ROW), "32k")) == (256, 160)
    assert sizes(with_row(resolved("data=cifar10", "batch=8k", **ROW), "32k")) == (32, None)
    assert sizes(with_row(resolved("data=imagenet", "batch=8k", data__train_size=128, **ROW), "32k")) == (224, 128)
