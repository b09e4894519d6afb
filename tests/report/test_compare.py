from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import composed

from lars_train.config import choices_of, flatten, published_top1, resolve
from lars_train.config.rows import row_name
from lars_train.report.compare import Row, make_rows
from lars_train.report.read import RunRecord, read_run
from lars_train.report.table import notes

MakeRun = Callable[..., Path]


def rows(*directories: Path) -> list[Row]:
    return make_rows([read_run(directory) for directory in directories])


def test_recipe_rows_are_sorted_and_differ_in_batch_only(make_run: MakeRun) -> None:
    found = rows(make_run("a", "32k"), make_run("b", "256"), make_run("c", "8k"))
    assert [row.first.batch for row in found] == ["256", "8k", "32k"]
    assert [row.differs for row in found] == [{}, {}, {}]


def test_seeds_share_a_row_with_mean_and_deviation(make_run: MakeRun) -> None:
    best = [70.0, 71.0, 73.5]
    directories = [make_run(str(seed), top1=(10.0, value, 20.0 + seed), seed=seed) for seed, value in enumerate(best)]
    (row,) = rows(*directories)
    mean = row.mean(lambda run: run.best_top1)
    assert mean is not None
    assert (mean.value, mean.deviation, mean.count) == (statistics.mean(best), statistics.stdev(best), 3)
    last = row.mean(lambda run: run.final_top1)
    assert last is not None
    assert last.value == 21.0
    (single,) = rows(directories[0])
    alone = single.mean(lambda run: run.best_top1)
    assert alone is not None
    assert (alone.value, alone.deviation) == (70.0, None)


@pytest.mark.parametrize(
    "arguments",
    [
        {"ended": None},
        {"ended": "failed", "reason": "Diverged: loss nan"},
        {"ended": "stopped", "reason": "Stopped: SIGTERM"},
        {"planned": 9},
    ],
    ids=["unfinished", "failed", "stopped", "cut short"],
)
def test_unfinished_runs_are_excluded_from_means(arguments: dict[str, Any], make_run: MakeRun) -> None:
    found = rows(
        make_run("a", top1=(1.0, 70.0), seed=1), make_run("b", top1=(90.0,), seed=2, **arguments), make_run("c", seed=3)
    )
    assert [len(row.runs) for row in found] == [2, 1]
    assert [run.directory.name for run in found[0].runs] == ["a", "c"]
    assert found[1].first.state != "finished"
    assert found[1].published is None


def test_a_finished_resumed_run_is_included_in_the_mean(make_run: MakeRun) -> None:
    (row,) = rows(make_run("a", seed=1), make_run("b", seed=2, starts=3))
    assert [run.resumes for run in row.runs] == [0, 2]


@pytest.mark.parametrize("content", ["{", "{}", '{"settings": {}, "plan": {"nominal_batch": 32768}}'])
def test_runs_with_unknown_settings_have_separate_rows(content: str, make_run: MakeRun) -> None:
    known, lost = (
        [make_run(f"a{seed}", seed=seed) for seed in (1, 2)],
        [make_run(f"b{seed}", seed=seed) for seed in (3, 4)],
    )
    for directory in lost:
        final = json.loads((directory / "final.json").read_text())
        (directory / "final.json").write_text(json.dumps({**final, "batch": "32k", "nominal_batch": 32768}))
        (directory / "run.json").write_text(content)
    found = rows(lost[0], *known, lost[1])
    assert [[run.directory.name for run in row.runs] for row in found] == [["a1", "a2"], ["b3"], ["b4"]]
    assert [row.differs for row in found] == [{}, *({"settings": "unknown", "run": name} for name in ("b3", "b4"))]
    assert [row.published for row in found] == [72.26, None, None]
    (note,) = [note for note in notes(found) if "Unknown settings" in note]
    assert "run.json" in note
    assert ": b3, b4." in note


def test_a_seed_counts_only_once(make_run: MakeRun) -> None:
    (row,) = rows(make_run("a", top1=(50.0,)), make_run("b", top1=(60.0,)), make_run("c", top1=(70.0,), seed=1))
    assert [run.directory.name for run in row.runs] == ["a", "c"]
    assert [run.directory.name for run in row.repeats] == ["b"]


def test_among_equal_seeds_the_complete_run_counts(make_run: MakeRun) -> None:
    damaged = make_run("a", top1=(50.0,))
    (damaged / "metrics.jsonl").unlink()
    (row,) = rows(damaged, make_run("b", top1=(60.0,)), make_run("c", top1=(70.0,), seed=1))
    assert [run.directory.name for run in row.runs] == ["b", "c"]
    assert [run.directory.name for run in row.repeats] == ["a"]


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"optimizer__lr": 20.0}, [{}, {"optimizer.lr": "20.0"}]),
        ({"optimizer__lr": 1.0}, [{}, {"optimizer.lr": "1.0"}]),
        ({"epochs": 30}, [{}, {"epochs": "30"}]),
        ({"model__name": "resnet18"}, [{"model.name": "resnet50"}, {"model.name": "resnet18"}]),
        ({"data__flip": False}, [{"data.flip": "not set"}, {"data.flip": "false"}]),
        ({"recipe__name": "mine"}, [{"recipe": "torchlars"}, {"recipe": "mine"}]),
        ({"precision": "fp32"}, [{"precision.name": "bf16"}, {"precision.name": "fp32"}]),
        ({"samples": 1000}, [{"training images": "1281167"}, {"training images": "1000"}]),
    ],
)
def test_other_differences_separate_rows_and_are_named(
    changes: dict[str, Any], differs: list[dict[str, str]], make_run: MakeRun
) -> None:
    found = rows(make_run("a", "32k"), make_run("b", "32k", seed=1, **changes), make_run("c", "8k"))
    assert [row.differs for row in found if row.first.batch == "32k"] in (differs, differs[::-1])
    assert len(found) == 3


LARS_ALONE = {"eps": 1e-8, "clamp": "none", "preset": "torchlars", "zero_norm": "decay", "trust_coef": 0.001}


def of_optimizer(name: str, **changes: Any) -> dict[str, Any]:
    """Settings as `config.resolve` returns them: LARS's options are null for other optimizers."""
    own = {f"optimizer__{key}": value if name == "lars" else None for key, value in LARS_ALONE.items()}
    return {"optimizer__name": name, **own, **changes}


def test_options_implied_by_the_optimizer_are_not_listed(make_run: MakeRun) -> None:
    lars = make_run("a", optimizer__weight_decay=2e-4, **of_optimizer("lars"))
    found = rows(lars, make_run("b", optimizer__weight_decay=1e-4, **of_optimizer("sgd")))
    assert [row.differs for row in found] == [
        {"optimizer.weight_decay": "0.0002"},
        {"optimizer.name": "sgd", "optimizer.weight_decay": "0.0001"},
    ]


def test_options_that_differ_within_an_optimizer_are_listed(make_run: MakeRun) -> None:
    one, other = (make_run(str(eps), **of_optimizer("lars", optimizer__eps=eps)) for eps in (1e-4, 1e-5))
    found = rows(one, other, make_run("b", **of_optimizer("sgd")))
    assert [row.differs for row in found] == [
        {"optimizer.name": "sgd"},
        {"optimizer.eps": "0.0001"},
        {"optimizer.eps": "1e-05"},
    ]
    # Also without the third run.
    assert [row.differs for row in rows(one, other)] == [row.differs for row in found[1:]]


def test_floats_have_six_digits_or_enough_to_differ(make_run: MakeRun) -> None:
    def cells(values: list[Any]) -> set[str]:
        names = (f"{number}-{values[0]}" for number in range(len(values)))
        found = rows(*(make_run(name, other__key=value) for name, value in zip(names, values, strict=True)))
        return {row.differs["other.key"] for row in found}

    assert cells([1 / 6, 2.0, "0.16666666666666666x", "1.25.1111111"]) == {
        "0.166667",
        "2.0",
        "0.16666666666666666x",
        "1.25.1111111",
    }
    assert cells([[1 / 3, 20.0], [2 / 3, 20.0]]) == {"[0.333333, 20.0]", "[0.666667, 20.0]"}
    assert cells([1 / 7, 1 / 7 + 1e-8]) == {"0.1428571", "0.1428572"}
    assert cells([0.1 + 0.2, 0.3]) == {"0.30000000000000004", "0.3"}


def test_execution_settings_do_not_separate_rows(make_run: MakeRun) -> None:
    changes = {"run__name": "b", "launch__nproc": 4, "log_every": 3, "checkpoint__keep": 9, "micro_batch": 64}
    (row,) = rows(make_run("a"), make_run("b", seed=1, **changes))
    assert len(row.runs) == 2


def test_windows_separate_rows_only_in_shard_order(make_run: MakeRun) -> None:
    def pair(order: str) -> list[Row]:
        return rows(*(make_run(f"{order}{w}", seed=w, data__order=order, data__window_shards=w) for w in (3, 16)))

    assert [len(row.runs) for row in pair("global")] == [2]
    assert [row.differs for row in pair("shards")] == [{"data.window_shards": "16"}, {"data.window_shards": "3"}]


def test_a_run_without_resolved_precision_matches_the_others(make_run: MakeRun) -> None:
    early = make_run("b", seed=1, ended=None, precision=None)
    (early / "metrics.jsonl").unlink()
    assert [row.differs for row in rows(make_run("a"), early)] == [{}, {}]


def test_a_scaled_warm_up_equals_the_recipes(make_run: MakeRun) -> None:
    shrunk = {"epochs": 9, "schedule__scale_warmup": True}
    found = rows(make_run("a", "256", **shrunk), make_run("b", "8k", schedule__warmup_epochs=0.5, **shrunk))
    assert [row.differs for row in found] == [{}, {}]
    found = rows(make_run("c", "256", **shrunk), make_run("d", "8k", schedule__warmup_epochs=0.6, **shrunk))
    assert [row.differs for row in found] == [{}, {"schedule.warmup_epochs": "0.6"}]


def test_a_full_scale_recipe_row_has_a_published_value(make_run: MakeRun) -> None:
    (row,) = rows(make_run("a", top1=(72.0, 71.0)), make_run("b", top1=(72.0, 73.0), seed=1))
    assert row.published == 72.26
    assert row.difference == pytest.approx(72.5 - 72.26)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__lr": 20.0},
        {"epochs": 3},
        {"model__ghost_batch": 64},
        {"model__ema": 0.999},
        {"evaluate__flip": True},
        {"data__name": "folder"},
        {"data__image_size": 192},
        {"data__train_size": 160},
        {"data__eval_crop": 1.0},
        {"model__name": "resnet18"},
        {"batch__size": 32768},
        {"global_batch": 1280},
        {"samples": 50_000},
        {"recipe__rows.32k.published_top1": "72"},
        {"recipe__rows.32k.published_top1": None},
    ],
)
def test_other_runs_have_no_published_value(changes: dict[str, Any], make_run: MakeRun) -> None:
    (row,) = rows(make_run("a", **changes))
    assert row.published is None
    assert row.difference is None


@pytest.mark.parametrize("recipe", choices_of("recipe"))
def test_rows_of_shipped_recipes_differ_in_batch_only(recipe: str) -> None:
    rows_of_it = composed(f"recipe={recipe}").recipe.rows
    names = [name for name in choices_of("batch") if row_name(rows_of_it, name) is not None]
    configs = {
        data: [resolve(composed(f"recipe={recipe}", f"batch='{name}'", *settings)) for name in names]
        for data, settings in {"imagenet": ["data=imagenet", "data.root=/d"], "mini": ["data=mini"]}.items()
    }
    for data, found in configs.items():
        made_of = [RunRecord(Path(), "finished", settings=flatten(config), batch=config.batch.name) for config in found]
        assert [row.differs for row in make_rows(made_of)] == [{} for _ in names], data
    lengths = [
        resolve(composed(f"recipe={recipe}", f"batch='{name}'", "data=imagenet", f"epochs={epochs}"))
        for name in names
        for epochs in rows_of_it[name].get("by_epochs", {})
    ]
    for config in [*configs["imagenet"], *lengths]:
        (row,) = make_rows([RunRecord(Path(), "finished", settings=flatten(config))])
        assert row.published == published_top1(config)
