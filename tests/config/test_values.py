"""A config's hash and settings cover the keys that affect a run's result, and no others."""

from __future__ import annotations

import dataclasses
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resolving import resolved

from lars_train.config import Config, absolute_paths, experiment_settings, flatten, run_hash
from lars_train.errors import ConfigError


def test_commands_of_the_first_version_keep_their_hash() -> None:
    # Recorded with commit 27db652. A run of that version resumes only if its command still has the same hash.
    recorded = {("data=imagenet",): "9b11aab4", ("data=cifar10", "batch=8k"): "c2aa4fd0"}
    assert {words: run_hash(resolved(*words)) for words in recorded} == recorded


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


# Keys that affect how a run is executed or what it reports, but not its result.
EXECUTION = {
    "compile",
    "cuda_graphs",
    "channels_last",
    "mode",
    "max_updates",
    "micro_batch",
    "device",
    "resume",
    "log_every",
    "log.wandb",
    "log.mlflow",
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
    "evaluate.ema",
    "checkpoint.every_updates",
    "checkpoint.every_minutes",
    "checkpoint.keep",
    "guard.max_loss",
    "guard.on_divergence",
    "guard.max_rollbacks",
    "export.path",
    "export.ema",
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


def test_the_hash_covers_a_presets_options_but_not_its_name() -> None:
    expected = run_hash(resolved("data=imagenet"))
    assert run_hash(resolved("data=imagenet", optimizer__preset="torchlars")) == expected
    assert run_hash(resolved("data=imagenet", optimizer__preset="timm")) != expected
    by_hand = {"optimizer__eps": 1e-7, "optimizer__lr_placement": "inside"}
    assert run_hash(resolved("data=imagenet", **by_hand)) == run_hash(
        resolved("data=imagenet", optimizer__preset="mlperf")
    )


def test_the_hash_does_not_depend_on_the_origin_of_values() -> None:
    expected = run_hash(resolved("data=imagenet"))
    assert re.fullmatch("[0-9a-f]{8}", expected)
    assert run_hash(resolved("data=imagenet", "batch=32k")) == expected
    assert run_hash(resolved("data=imagenet", optimizer__lr=29.0, epochs=90)) == expected
    assert run_hash(resolved("data=imagenet", "optimizer=lars")) == expected
    assert run_hash(resolved("data=imagenet", **{"recipe.rows.8k.lr": 1.0})) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("data=imagenet", "9b11aab4"),
        ("data=cifar10", "2e5e2d55"),
        ("data=synthetic", "0da34088"),
        ("data=folder data.root=x batch=8k", "7a110beb"),
    ],
)
def test_hashes_are_those_of_the_first_version(arguments: str, expected: str) -> None:
    # As in commit 27db652. A changed hash would give a run of that version another directory.
    assert run_hash(resolved(*arguments.split())) == expected


@given(first=st.integers(0, 2**63 - 1), second=st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_seeds_have_different_hashes(first: int, second: int) -> None:
    one, two = Config(seed=first), Config(seed=second)
    assert (run_hash(one) == run_hash(two)) == (first == second)


def test_hashing_does_not_change_the_config() -> None:
    config = resolved()
    before = deepcopy(config)
    run_hash(config)
    assert config == before


def test_a_url_needs_order_shards_and_stays_a_url() -> None:
    with pytest.raises(ConfigError, match=r"data\.root=s3://b/x: .*data\.order=shards"):
        resolved("data=imagenet", data__root="s3://b/x")
    config = resolved("data=imagenet", data__root="s3://b/x", data__order="shards", data__cache_dir="here")
    data = absolute_paths(config).data
    assert (data.root, data.cache_dir) == ("s3://b/x", str(Path("here").resolve()))
    assert absolute_paths(resolved("data=imagenet", data__root="x")).data.root == str(Path("x").resolve())


def test_experiment_settings_leave_out_execution() -> None:
    shown = experiment_settings(resolved("data=mini", "batch='32k'", batch__size=128, optimizer__lr=2.5), 128)
    assert shown["batch"] == 128
    assert shown["optimizer.lr"] == 2.5
    assert {"seed", "epochs", "model.name", "recipe.name"} <= shown.keys()
    # The batch is not that of the name 32k. The keys of execution and of other modes do not affect the result.
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
