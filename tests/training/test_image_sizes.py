"""Runs train and evaluate at the sizes of their config, and resume exactly where the size changes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lars_train.config import Config
from lars_train.export import export
from lars_train.launch import Ranks
from lars_train.models.factory import build_model
from lars_train.training import checkpoint, metrics_logger, session
from lars_train.training.metrics import flops_per_image
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation
from lars_train.training.trainer import Trainer

# Three updates an epoch. In epochs 2 and 3, interpolation gives 42.7 and 53.3 pixels, which are rounded to 32 and 64.
SCHEDULE: dict[str, Any] = {
    "epochs": 5,
    "log_every": 1,
    "micro_batch": 4,
    "data": {"size_schedule": [32, 64, 1, 4], "image_size": 40, "augment": "inception"},
    "checkpoint": {"every_updates": 2},
    "evaluate": {"every_epochs": 2},
}
SIZES = [32, 32, 32, 64, 64]


def config(directory: Path, *changes: dict[str, Any], **values: Any) -> Config:
    return tiny(*changes, {"run": {"dir": str(directory)}}, **values)


def train(directory: Path, *changes: dict[str, Any], **values: Any) -> dict[str, Any]:
    return session.train(prepare(config(directory, *changes, **values)), Ranks(), Invocation(("lars-train",)))


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def seen() -> Iterator[list[tuple[bool, int]]]:
    """The inputs of networks' first layers: True in training, and the size."""
    found: list[tuple[bool, int]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Conv2d) and module.in_channels == 3 and len(inputs[0]) > 1:
            assert inputs[0].is_contiguous(memory_format=torch.channels_last)
            found.append((module.training, inputs[0].shape[-1]))

    handle = register_module_forward_pre_hook(record)
    yield found
    handle.remove()


def test_training_and_evaluation_have_their_own_sizes(tmp_path: Path, seen: list[tuple[bool, int]]) -> None:
    sizes = {"data": {"train_size": 12, "image_size": None, "eval_size": 16, "eval_resize": 18, "eval_crop": None}}
    train(tmp_path / "run", sizes, epochs=1, micro_batch=4, model__name="resnet20")
    assert set(seen) == {(True, 12), (False, 16)}
    record = json.loads((tmp_path / "run" / "run.json").read_text())["started"][-1]
    network = build_model("resnet20", num_classes=4, ghost_batch=4, zero_gamma=False)
    assert record["flops_per_image"] == flops_per_image(network, 12)
    export(config(tmp_path, mode="export", checkpoint__path=str(tmp_path / "run")))
    card = (tmp_path / "run" / "checkpoints" / "MODEL.md").read_text()
    assert "resized so that the shorter side is 18" in card
    assert "center-cropped to 16 x 16" in card
    # The size in evaluation is that of the checkpoint, unless it is set.
    base: dict[str, Any] = {"mode": "evaluate", "checkpoint__path": str(tmp_path / "run")}

    def evaluation(**values: Any) -> tuple[int | None, float | None]:
        overrides = tuple(f"{key.replace('__', '.')}={value}" for key, value in values.items())
        data = session.evaluation_config(config(tmp_path, **base, **values), overrides)[0].data
        return data.image_size, data.eval_crop

    assert evaluation() == (16, 16 / 18)
    assert evaluation(data__eval_size=24) == evaluation(data__image_size=24) == (24, 16 / 18)
    assert evaluation(data__eval_resize=20) == (16, 16 / 20)
    assert evaluation(data__eval_crop=0.5) == (16, 0.5)
    seen.clear()
    chosen, content = session.evaluation_config(config(tmp_path, **base), ())
    result = session.evaluate_only(chosen, content, Ranks())
    assert set(seen) == {(False, 16)}
    assert result["val/loss"] == pytest.approx(lines(tmp_path / "run")[-1]["val/loss"], rel=1e-6)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unbroken") / "run"
    train(directory, SCHEDULE, data__workers=2)
    return directory


def test_a_run_resizes_at_the_start_of_an_epoch(tmp_path: Path, seen: list[tuple[bool, int]], unbroken: Path) -> None:
    train(tmp_path / "run", SCHEDULE)
    assert [size for training, size in seen if training] == [size for size in SIZES for _ in range(6)]
    assert {size for training, size in seen if not training} == {40}
    # The same weights with two loader workers.
    assert_same_weights(tmp_path / "run", unbroken)


def assert_same_weights(directory: Path, expected: Path) -> None:
    ours, theirs = (checkpoint.latest(d / "checkpoints") for d in (directory, expected))
    assert ours is not None
    assert theirs is not None
    for key, value in theirs[1]["model"].items():
        assert torch.equal(ours[1]["model"][key], value), key
    assert [line.get("train/loss") for line in lines(directory)] == [line.get("train/loss") for line in lines(expected)]


def killed_at(number: int) -> Callable[..., Any]:
    """Return `Trainer.run_update`, except that call `number` raises KeyboardInterrupt."""
    calls, run_update = itertools.count(1), Trainer.run_update

    def killed(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return run_update(*arguments, **keywords)

    return killed


@pytest.mark.parametrize("kills", [(6,), (9, 2), (10, 2, 4)], ids=str)
def test_a_killed_run_resumes_at_the_size_of_its_epoch(
    kills: tuple[int, ...], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The size changes between the updates 9 and 10; a checkpoint is saved every two updates, and at an epoch's end.
    for kill in kills:
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "run_update", killed_at(kill))
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "run", SCHEDULE, data__workers=2)
    train(tmp_path / "run", SCHEDULE, data__workers=2)
    assert_same_weights(tmp_path / "run", unbroken)


def test_the_log_counts_the_operations_of_the_epochs_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[float, float]] = []
    time_left = metrics_logger.MetricsLogger._time_left

    def watched(logger: metrics_logger.MetricsLogger, rate: float) -> float:
        found.append((logger._flops_of(logger._batches - 1).per_image, logger._updates_left()))
        return time_left(logger, rate)

    monkeypatch.setattr(metrics_logger.MetricsLogger, "_time_left", watched)
    train(tmp_path / "run", SCHEDULE)
    network = build_model("small", num_classes=4, ghost_batch=4, zero_gamma=False)
    each = [flops_per_image(network, size) for size in SIZES for _ in range(3)]
    assert [flops for flops, _ in found] == each
    left = [sum(each[update:]) / each[update - 1] for update in range(1, 16)]
    assert [weighted for _, weighted in found] == pytest.approx(left)
    record = json.loads((tmp_path / "run" / "run.json").read_text())["started"][-1]
    assert record["flops_per_image"] == each[0]
    assert record["flops_by_size"] == {"32": each[0], "64": each[-1]}
