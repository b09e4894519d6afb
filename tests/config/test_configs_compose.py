"""Every shipped YAML file composes into the schema and resolves to the names and numbers that it states."""

from __future__ import annotations

from itertools import product

import pytest
import torchvision
from omegaconf import OmegaConf
from resolving import resolved
from tiny import composed

from lars_train.config import choices_of, config_dir
from lars_train.errors import ConfigError

GROUPS = ("batch", "data", "model", "optimizer", "precision", "recipe", "schedule")
ROWS = {
    "torchlars": ("256", "8k", "16k", "32k"),
    "mlperf": (
        *("1632", "2k", "3200", "3264", "4k", "8k", "13056", "16k", "20k", "32k", "35k", "40448", "48k", "56k"),
        *("58880", "64k", "67456", "67840"),
    ),
    "lamb": ("4k", "8k", "16k", "32k"),
    "ffcv": ("4k",),
    "rsb": ("2k",),
    "nus": ("512", "1k", "4k", "8k", "16k", "32k"),
    "goyal": ("8k",),
}
DATA = ("cifar10", "custom", "fashion_mnist", "folder", "huggingface", "imagenet", "mini", "synthetic")
CHOICES = [(group, name) for group in GROUPS for name in choices_of(group)]
# A learning rate, because the row has one only for its own optimizer.
LITERAL = ("batch.size=64", "optimizer.lr=0.1")
# What a choice needs that names no network.
NETWORKS = {"timm": "model.name=resnet50d", "custom": "model.target=own:make"}


def test_groups_and_choices_are_as_documented() -> None:
    assert {path.parent.name for path in config_dir().glob("*/*.yaml")} <= set(GROUPS)
    assert set(choices_of("data")) == set(DATA)
    assert set(choices_of("recipe")) == set(ROWS)
    assert {name for rows in ROWS.values() for name in rows} <= set(choices_of("batch"))


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=lambda word: word)
def test_every_shipped_choice_composes_and_resolves(group: str, name: str) -> None:
    chosen = f"{group}='{name}'"
    if group == "batch" and name not in ROWS["torchlars"]:
        with pytest.raises(ConfigError, match=f"batch={name}: .*256, 8k, 16k, 32k"):
            resolved(chosen)
        return
    row = (f"batch='{ROWS[name][0]}'",) if group == "recipe" else ()
    needed = (NETWORKS[name],) if group == "model" and name in NETWORKS else ()
    config = resolved(chosen, *row, *(LITERAL if group == "optimizer" else ()), *needed)
    if needed:
        assert config.model.source == name
    elif group in ("batch", "data", "model", "precision", "recipe"):
        assert getattr(config, group).name == name
    if group == "optimizer" and name != "recipe":
        expected = {"adamw": ("torch", "AdamW")}.get(name, (name, "SGD"))
        assert (config.optimizer.name, config.optimizer.base) == expected
    for value in (
        config.epochs,
        config.label_smoothing,
        config.batch.scaled,
        config.model.ghost_batch,
        config.model.zero_gamma or needed,
        config.optimizer.lr,
        config.optimizer.weight_decay,
        config.schedule.form,
    ):
        assert value is not None


@pytest.mark.parametrize(("data", "row"), list(product(DATA, ROWS["torchlars"])))
def test_every_data_set_resolves_with_every_row(data: str, row: str) -> None:
    config = resolved(f"data={data}", f"batch='{row}'")
    assert (config.data.name, config.batch.name) == (data, row)
    assert config.batch.scaled is (data not in ("imagenet", "folder", "huggingface", "custom"))
    assert config.optimizer.name == ("sgd" if row == "256" else "lars")
    assert config.epochs == (10 if data == "mini" else 90)


def test_the_default_is_row_32k_with_small_on_the_embedded_data() -> None:
    config = resolved()
    assert (config.data.name, config.model.name, config.batch.name) == ("mini", "small", "32k")
    assert (config.recipe.name, config.optimizer.name, config.precision.name) == ("torchlars", "lars", "auto")


def test_a_data_set_chooses_a_network_that_can_be_overridden() -> None:
    networks = {
        "mini": "small",
        "fashion_mnist": "small",
        "cifar10": "resnet20",
        "imagenet": "resnet50",
        "folder": "resnet50",
        "huggingface": "resnet50",
        "custom": "resnet50",
        "synthetic": "resnet50",
    }
    assert {data: composed(f"data={data}").model.name for data in DATA} == networks
    for overrides in (("data=mini", "model=resnet50"), ("model=resnet50", "data=mini")):
        assert composed(*overrides).model.name == "resnet50"


def test_batch_names_give_the_nominal_size() -> None:
    nominal = {
        "256": 256,
        "512": 512,
        "1k": 1024,
        "1632": 1632,
        "2k": 2048,
        "3200": 3200,
        "3264": 3264,
        "4k": 4096,
        "8k": 8192,
        "13056": 13056,
        "16k": 16384,
        "20k": 20480,
        "32k": 32768,
        "35k": 35840,
        "40448": 40448,
        "48k": 49152,
        "56k": 57344,
        "58880": 58880,
        "64k": 65536,
        "67456": 67456,
        "67840": 67840,
    }
    for name, size in nominal.items():
        assert composed(f"batch='{name}'", hydra=True).batch == {**composed().batch, "name": name, "nominal": size}
    assert set(choices_of("batch")) == set(nominal)


def test_every_resnet_of_torchvision_and_cifar_has_a_config() -> None:
    module = torchvision.models.resnet
    theirs = {name for name in module.__all__ if name.islower()}
    assert len(theirs) >= 10
    cifar = {"tiny", "small", "resnet20", "resnet32", "resnet44", "resnet56"}
    assert set(choices_of("model")) == theirs | cifar | set(NETWORKS)


def test_every_recipe_row_states_optimizer_lr_decay_and_warm_up() -> None:
    for name, rows in ROWS.items():
        recipe = OmegaConf.to_container(OmegaConf.load(config_dir() / "recipe" / f"{name}.yaml"))
        assert isinstance(recipe, dict)
        assert tuple(recipe["rows"]) == rows
        assert recipe["source"].startswith("https://")
        for row in recipe["rows"].values():
            row |= recipe["common"]
            assert {"optimizer", "lr", "weight_decay", "warmup_epochs"} <= row.keys()
            lengths = row.get("by_epochs", {"": row})
            assert all("published_top1" in length for length in lengths.values())


def test_imagenet_dir_is_the_default_root_of_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGENET_DIR", "/data/imagenet")
    assert resolved("data=imagenet").data.root == "/data/imagenet"
    assert resolved("data=imagenet", "data.root=/elsewhere").data.root == "/elsewhere"
    monkeypatch.delenv("IMAGENET_DIR")
    assert resolved("data=imagenet").data.root is None
