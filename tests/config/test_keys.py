"""The error for an unknown name suggests the probable key or choice, or nothing if that is unclear."""

from __future__ import annotations

import pytest

from lars_train.config.keys import _ALIASES, GROUPS, leaf_keys, suggestion
from lars_train.config.schema import choices_of
from lars_train.errors import closest

OPTIMIZERS = ["ASGD", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RMSprop", "SGD"]


@pytest.mark.parametrize(
    ("word", "choices", "found"),
    [
        ("Adamw", OPTIMIZERS, "AdamW"),
        ("adam", OPTIMIZERS, "Adam"),
        ("RMSProp", OPTIMIZERS, "RMSprop"),
        ("lamb", OPTIMIZERS, None),
        ("fp8", choices_of("precision"), None),
        ("fp61", choices_of("precision"), None),
        ("FP16", choices_of("precision"), "fp16"),
        ("cifar100", choices_of("data"), None),
        ("imagenet1k", choices_of("data"), "imagenet"),
        ("imagnet", choices_of("data"), "imagenet"),
        ("resent50", choices_of("model"), "resnet50"),
        ("resnet51", choices_of("model"), None),
        ("resnet", choices_of("model"), None),
        ("32kk", choices_of("batch"), "32k"),
        ("h200", ["a100", "cpu", "h100", "v100"], None),
        ("nus", ["mlperf", "nus-hpc"], "nus-hpc"),
        ("x", [], None),
    ],
)
def test_closest_finds_misspellings_but_not_other_choices(word: str, choices: list[str], found: str | None) -> None:
    assert closest(word, choices) == found


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.pretrained", "'model.weights'"),
        ("gpus", "'launch.nproc'"),
        ("warmup", "'schedule.warmup_epochs'"),
        ("nproc_per_node", "'launch.nproc'"),
        ("train.lr", "'optimizer.lr'"),
        ("lr", "'optimizer.lr'"),
        ("batc", "'batch'"),
        ("batch_size", "'batch.size'"),
        ("data.rooot", "'data.root'"),
        ("data.num_workers", "'data.workers'"),
        ("epoch", "'epochs'"),
        ("optimizer.weight_decy", "'optimizer.weight_decay'"),
        ("optimizer.betas", "optimizer.kwargs.betas"),
        ("model.drop_path_rate", "model.kwargs.drop_path_rate"),
    ],
)
def test_the_error_for_an_unknown_key_suggests_the_probable(key: str, words: str) -> None:
    assert words in suggestion(key)


def test_unrelated_words_get_no_suggestion() -> None:
    assert [key for key in ("foo", "x", "logging", "name", "fp8") if suggestion(key)] == []


def test_every_suggested_key_exists() -> None:
    assert set(_ALIASES.values()) <= {*leaf_keys(), *GROUPS}
    assert set(_ALIASES).isdisjoint(leaf_keys())
