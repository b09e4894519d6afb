from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from lars_train.config import choices_of, config_dir, flatten, published_top1, register, resolve
from lars_train.config.rows import row_name
from lars_train.report.compare import Row, make_rows
from lars_train.report.read import RunRecord, read_run
from lars_train.report.table import notes

Made = Callable[..., Path]


def rows(*directories: Path) -> list[Row]:
    return make_rows([read_run(directory) for directory in directories])


def test_the_rows_of_a_recipe_differ_in_nothing_else_and_stand_by_size(made: Made) -> None:
    found = rows(made("a", "32k"), made("b", "256"), made("c", "8k"))
    assert [row.first.batch for row in found] == ["256", "8k", "32k"]
    assert [row.differs for row in found] == [{}, {}, {}]


def test_seeds_make_one_row_with_their_mean_and_sample_deviation(made: Made) -> None:
    best = [70.0, 71.0, 73.5]
    directories = [made(str(seed), top1=(10.0, value, 20.0 + seed), seed=seed) for seed, value in enumerate(best)]
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
def test_what_is_not_finished_is_in_no_mean(arguments: dict[str, Any], made: Made) -> None:
    found = rows(made("a", top1=(1.0, 70.0), seed=1), made("b", top1=(90.0,), seed=2, **arguments), made("c", seed=3))
    assert [len(row.runs) for row in found] == [2, 1]
    assert [run.directory.name for run in found[0].runs] == ["a", "c"]
    assert found[1].first.state != "finished"
    assert found[1].published is None


def test_a_resumed_run_that_is_finished_counts_and_its_resumes_are_known(made: Made) -> None:
    (row,) = rows(made("a", seed=1), made("b", seed=2, starts=3))
    assert [run.resumes for run in row.runs] == [0, 2]


@pytest.mark.parametrize("content", ["{", "{}", '{"settings": {}, "plan": {"nominal_batch": 32768}}'])
def test_a_run_whose_settings_are_not_known_is_in_no_mean_and_parts_no_other_rows(content: str, made: Made) -> None:
    known, lost = [made(f"a{seed}", seed=seed) for seed in (1, 2)], [made(f"b{seed}", seed=seed) for seed in (3, 4)]
    for directory in lost:
        final = json.loads((directory / "final.json").read_text())
        (directory / "final.json").write_text(json.dumps({**final, "batch": "32k", "nominal_batch": 32768}))
        (directory / "run.json").write_text(content)
    found = rows(lost[0], *known, lost[1])
    assert [[run.directory.name for run in row.runs] for row in found] == [["a1", "a2"], ["b3"], ["b4"]]
    assert [row.differs for row in found] == [{}, *({"settings": "unknown", "run": name} for name in ("b3", "b4"))]
    assert [row.published for row in found] == [72.26, None, None]
    (told,) = [note for note in notes(found) if "Unknown settings" in note]
    assert "run.json" in told
    assert ": b3, b4." in told


def test_the_same_seed_twice_is_no_second_measurement(made: Made) -> None:
    (row,) = rows(made("a", top1=(50.0,)), made("b", top1=(60.0,)), made("c", top1=(70.0,), seed=1))
    assert [run.directory.name for run in row.runs] == ["a", "c"]
    assert [run.directory.name for run in row.repeats] == ["b"]


def test_of_two_with_one_seed_the_one_whose_files_are_whole_counts(made: Made) -> None:
    damaged = made("a", top1=(50.0,))
    (damaged / "metrics.jsonl").unlink()
    (row,) = rows(damaged, made("b", top1=(60.0,)), made("c", top1=(70.0,), seed=1))
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
def test_what_differs_beyond_batch_and_recipe_row_is_named_and_parts_the_rows(
    changes: dict[str, Any], differs: list[dict[str, str]], made: Made
) -> None:
    found = rows(made("a", "32k"), made("b", "32k", seed=1, **changes), made("c", "8k"))
    assert [row.differs for row in found if row.first.batch == "32k"] in (differs, differs[::-1])
    assert len(found) == 3


LARS_ALONE = {"eps": 1e-8, "clamp": "none", "preset": "torchlars", "zero_norm": "decay", "trust_coef": 0.001}


def of_optimizer(name: str, **changes: Any) -> dict[str, Any]:
    """Settings as `config.resolve` leaves them: the options of LARS are null for all others."""
    own = {f"optimizer__{key}": value if name == "lars" else None for key, value in LARS_ALONE.items()}
    return {"optimizer__name": name, **own, **changes}


def test_options_that_follow_from_the_optimizer_s_name_are_not_told_beside_it(made: Made) -> None:
    lars = made("a", optimizer__weight_decay=2e-4, **of_optimizer("lars"))
    found = rows(lars, made("b", optimizer__weight_decay=1e-4, **of_optimizer("sgd")))
    assert [row.differs for row in found] == [
        {"optimizer.weight_decay": "0.0002"},
        {"optimizer.name": "sgd", "optimizer.weight_decay": "0.0001"},
    ]


def test_options_of_one_optimizer_that_its_own_runs_differ_in_are_told_of_those(made: Made) -> None:
    one, other = (made(str(eps), **of_optimizer("lars", optimizer__eps=eps)) for eps in (1e-4, 1e-5))
    found = rows(one, other, made("b", **of_optimizer("sgd")))
    assert [row.differs for row in found] == [
        {"optimizer.name": "sgd"},
        {"optimizer.eps": "0.0001"},
        {"optimizer.eps": "1e-05"},
    ]
    # The same without the third.
    assert [row.differs for row in rows(one, other)] == [row.differs for row in found[1:]]


def test_floats_are_told_in_six_digits_or_in_as_many_as_tell_them_apart(made: Made) -> None:
    def told(values: list[Any]) -> set[str]:
        names = (f"{number}-{values[0]}" for number in range(len(values)))
        found = rows(*(made(name, other__key=value) for name, value in zip(names, values, strict=True)))
        return {row.differs["other.key"] for row in found}

    assert told([1 / 6, 2.0, "0.16666666666666666x", "1.25.1111111"]) == {
        "0.166667",
        "2.0",
        "0.16666666666666666x",
        "1.25.1111111",
    }
    assert told([[1 / 3, 20.0], [2 / 3, 20.0]]) == {"[0.333333, 20.0]", "[0.666667, 20.0]"}
    assert told([1 / 7, 1 / 7 + 1e-8]) == {"0.1428571", "0.1428572"}
    assert told([0.1 + 0.2, 0.3]) == {"0.30000000000000004", "0.3"}


def test_names_places_and_pace_part_no_rows(made: Made) -> None:
    changes = {"run__name": "b", "launch__nproc": 4, "log_every": 3, "checkpoint__keep": 9, "micro_batch": 64}
    (row,) = rows(made("a"), made("b", seed=1, **changes))
    assert len(row.runs) == 2


def test_windows_part_rows_in_the_order_by_shards_alone(made: Made) -> None:
    def pair(order: str) -> list[Row]:
        return rows(*(made(f"{order}{w}", seed=w, data__order=order, data__window_shards=w) for w in (3, 16)))

    assert [len(row.runs) for row in pair("global")] == [2]
    assert [row.differs for row in pair("shards")] == [{"data.window_shards": "16"}, {"data.window_shards": "3"}]


def test_a_run_that_ended_before_it_knew_its_precision_counts_as_the_others(made: Made) -> None:
    early = made("b", seed=1, ended=None, precision=None)
    (early / "metrics.jsonl").unlink()
    assert [row.differs for row in rows(made("a"), early)] == [{}, {}]


def test_a_warm_up_that_shrinks_with_the_run_is_the_recipe_s(made: Made) -> None:
    shrunk = {"epochs": 9, "schedule__scale_warmup": True}
    found = rows(made("a", "256", **shrunk), made("b", "8k", schedule__warmup_epochs=0.5, **shrunk))
    assert [row.differs for row in found] == [{}, {}]
    found = rows(made("c", "256", **shrunk), made("d", "8k", schedule__warmup_epochs=0.6, **shrunk))
    assert [row.differs for row in found] == [{}, {"schedule.warmup_epochs": "0.6"}]


def test_a_recipe_s_row_at_full_scale_is_compared_with_what_is_published(made: Made) -> None:
    (row,) = rows(made("a", top1=(72.0, 71.0)), made("b", top1=(72.0, 73.0), seed=1))
    assert row.published == 72.26
    assert row.difference == pytest.approx(72.5 - 72.26)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__lr": 20.0},
        {"epochs": 3},
        {"model__ghost_batch": 64},
        {"data__name": "folder"},
        {"model__name": "resnet18"},
        {"batch__size": 32768},
        {"global_batch": 1280},
        {"samples": 50_000},
        {"recipe__rows.32k.published_top1": "72"},
        {"recipe__rows.32k.published_top1": None},
    ],
)
def test_nothing_else_is_compared_with_what_is_published(changes: dict[str, Any], made: Made) -> None:
    (row,) = rows(made("a", **changes))
    assert row.published is None
    assert row.difference is None


@pytest.mark.parametrize("recipe", choices_of("recipe"))
def test_the_rows_of_a_shipped_recipe_differ_in_nothing_else(recipe: str) -> None:
    register()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        rows_of_it = compose("config", [f"recipe={recipe}"]).recipe.rows
        names = [name for name in choices_of("batch") if row_name(rows_of_it, name) is not None]
        configs = {
            data: [resolve(compose("config", [f"recipe={recipe}", f"batch='{name}'", *settings])) for name in names]
            for data, settings in {"imagenet": ["data=imagenet", "data.root=/d"], "mini": ["data=mini"]}.items()
        }
    for data, found in configs.items():
        made_of = [RunRecord(Path(), "finished", settings=flatten(config), batch=config.batch.name) for config in found]
        assert [row.differs for row in make_rows(made_of)] == [{} for _ in names], data
    for config in configs["imagenet"]:
        (row,) = make_rows([RunRecord(Path(), "finished", settings=flatten(config))])
        assert row.published == published_top1(config)
