"""A divergence is found at its update and reported with its cause. A rollback skips the samples that led to it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import nn, optim

from lars_train import LARS
from lars_train.config import Config
from lars_train.errors import ConfigError, Diverged
from lars_train.export import export
from lars_train.launch import Ranks
from lars_train.training import checkpoint, device, session
from lars_train.training import guard as guard_module
from lars_train.training import run as run_module
from lars_train.training.guard import Divergence, Guard
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation
from lars_train.training.trainer import Trainer

# 4 updates per epoch, 12 in total; a checkpoint every second update.
SETTINGS: dict[str, Any] = {
    "epochs": 3,
    "log_every": 2,
    "batch": {"size": 24},
    "data": {"image_size": 16, "augment": "pad_crop", "train_count": 100, "val_count": 22},
    "model": {"ghost_batch": 8},
    "optimizer": {"trust_coef": 0.01, "weight_decay": 0.001},
    "schedule": {"warmup_epochs": 1},
    "checkpoint": {"every_updates": 2},
    "evaluate": {"every_epochs": 3},
}


@pytest.fixture
def float16(monkeypatch: pytest.MonkeyPatch) -> None:
    # Processors without float16 arithmetic can emulate it; the program refuses it there because that is slow.
    monkeypatch.setattr(device, "_cpu_has", lambda *flags: True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings(**changes: Any) -> Config:
    return tiny(SETTINGS, changes)


def train(directory: Path, precision: str = "fp32", **guard: Any) -> dict[str, Any]:
    changes: dict[str, Any] = {"run": {"dir": str(directory)}, "guard": guard, "precision": {"name": precision}}
    if precision == "fp16":
        # Processors without the arithmetic take seconds for larger images.
        changes["data"] = {"image_size": 8}
    return session.train(prepare(settings(**changes)), Ranks(), Invocation(("lars-train",)))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class SpoiledGradients:
    """Set a gradient to NaN for the batch at each of `positions`, and record the positions of all batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *positions: int, die_at: int | None = None) -> None:
        self.seen: list[int] = []
        original = Trainer._forward_backward

        def forward_backward(trainer: Trainer, batch: Any) -> Any:
            position = trainer.update + trainer.skipped
            if position == die_at:
                raise KeyboardInterrupt
            loss = original(trainer, batch)
            self.seen.append(position)
            if position in positions:
                parameter = next(trainer.network.parameters())
                assert parameter.grad is not None
                parameter.grad.fill_(math.nan)
            return loss

        monkeypatch.setattr(Trainer, "_forward_backward", forward_backward)


def test_a_loss_that_is_not_finite_stops_the_run_with_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    SpoiledGradients(monkeypatch, 4)
    # The fifth update makes weights NaN, which the loss of the sixth update shows.
    with pytest.raises(Diverged, match=r"diverged at update 6: loss nan, lr 0\.[0-9]+") as caught:
        train(tmp_path / "run")
    assert "largest gradient norms at update 5: conv1.weight nan" in str(caught.value)
    assert "\nStopped; divergence.jsonl in " in str(caught.value)
    (record,) = lines(tmp_path / "run/divergence.jsonl")
    assert record["update"] == 6
    assert record["loss"] is None
    assert record["action"] == "stop"
    assert len(record["largest_gradients"]) == 5
    (start,) = json.loads((tmp_path / "run/run.json").read_text())["started"]
    assert start["ended"]["how"] == "failed"
    assert start["ended"]["reason"].startswith("Diverged: diverged at update 6")
    update, content = checkpoint.latest(tmp_path / "run/checkpoints") or (None, {})
    assert content["update"] == 4, update
    assert all(torch.isfinite(t).all() for t in content["model"].values())


def test_a_rollback_skips_the_samples_before_the_divergence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spoiled = SpoiledGradients(monkeypatch, 4)
    final = train(tmp_path / "run", on_divergence="rollback")
    # Positions 4 and 5, between the checkpoint and the divergence, are not repeated.
    assert spoiled.seen == [0, 1, 2, 3, 4, 5, *range(6, 14)]
    step = {"from_update": 6, "to_update": 4, "passed_over_from": 4, "passed_over": 2}
    assert final["updates"] == 12
    assert final["passed_over"] == 2
    assert final["rollbacks"] == [step]
    (record,) = lines(tmp_path / "run/divergence.jsonl")
    assert step.items() <= record.items()
    logged = lines(tmp_path / "run/metrics.jsonl")
    assert [line["update"] for line in logged if "train/loss" in line] == [2, 4, 6, 8, 10, 12]
    assert all(math.isfinite(line["train/loss"]) for line in logged if "train/loss" in line)


def test_a_run_killed_after_a_rollback_ends_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        SpoiledGradients(patch, 4)
        unbroken = train(tmp_path / "unbroken", on_divergence="rollback")
    with monkeypatch.context() as patch:
        SpoiledGradients(patch, 4, die_at=7)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", on_divergence="rollback")
    with monkeypatch.context() as patch:
        resumed = SpoiledGradients(patch, 4)
        killed = train(tmp_path / "killed", on_divergence="rollback")
    assert resumed.seen[0] == 6
    records = [(line["action"], line["update"]) for line in lines(tmp_path / "killed/divergence.jsonl")]
    assert records == [("rollback", 6)]
    for key in ("weights_sha256", "rollbacks", "passed_over", "best_top1"):
        assert killed[key] == unbroken[key]


def test_rollbacks_are_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    SpoiledGradients(monkeypatch, *range(4, 100))
    with pytest.raises(Diverged, match="Stopped after 2 rollbacks; "):
        train(tmp_path / "run", on_divergence="rollback", max_rollbacks=2)
    # A repeated divergence goes one checkpoint further back.
    records = [(line["action"], line.get("to_update")) for line in lines(tmp_path / "run/divergence.jsonl")]
    assert records == [("rollback", 4), ("rollback", 2), ("stop", None)]


def test_no_rollback_resumes_from_weights_with_a_nonfinite_loss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The first step is far too large: its loss is finite, but that of the next update is not.
    exploding = {"name": "sgd", "lr": 3e38, "trust_coef": None, "weight_decay": 0.0}
    monkeypatch.setitem(SETTINGS, "optimizer", exploding)
    monkeypatch.setitem(SETTINGS, "schedule", {"warmup_epochs": 0})
    monkeypatch.setitem(SETTINGS, "checkpoint", {"every_updates": 1})
    with pytest.raises(Diverged, match="after 3 rollbacks"):
        train(tmp_path / "run", on_divergence="rollback", max_rollbacks=3)
    records = [(line["update"], line.get("to_update")) for line in lines(tmp_path / "run/divergence.jsonl")]
    assert records == [(2, 0), (2, 0), (2, 0), (2, None)]
    # The checkpoints that the next start uses, and the discarded ones.
    folder = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["diverged-000000001.pt", "update-000000000.pt"]
    # With keep=1 there is no checkpoint to resume from, and the next start reports that.
    monkeypatch.setitem(SETTINGS, "checkpoint", {"every_updates": 1, "keep": 1})
    with pytest.raises(Diverged, match="There is no earlier checkpoint"):
        train(tmp_path / "one", on_divergence="rollback")
    with pytest.raises(ConfigError, match=r"the run diverged, and there is no checkpoint .*resume=never"):
        train(tmp_path / "one", on_divergence="rollback")


def test_a_validation_loss_that_is_not_finite_is_a_divergence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The last step makes weights NaN, but no training loss is computed from them.
    SpoiledGradients(monkeypatch, 11)
    directory = tmp_path / "run"
    with pytest.raises(Diverged, match="diverged at update 12: validation loss nan"):
        train(directory)
    (record,) = lines(directory / "divergence.jsonl")
    assert (record["quantity"], record["update"], record["action"]) == ("val/loss", 12, "stop")
    names = [f"update-{update:09d}.pt" for update in (8, 10)]
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["diverged-000000012.pt", *names]
    assert not (directory / "final.json").exists()
    assert not any("val/top1" in line for line in lines(directory / "metrics.jsonl"))
    (start,) = json.loads((directory / "run.json").read_text())["started"]
    assert start["ended"]["how"] == "failed"
    # Its weights can be neither exported nor evaluated.
    aside, copy = directory / "checkpoints/diverged-000000012.pt", tmp_path / "copy.pt"
    with pytest.raises(ConfigError, match="the run diverged with these weights, and set them aside"):
        export(settings(mode="export", checkpoint={"path": str(aside)}))
    shutil.copyfile(aside, copy)
    spoiled = {"checkpoint": {"path": str(copy)}}
    with pytest.raises(ConfigError, match=r"values that are not finite .*the run diverged"):
        export(settings(mode="export", **spoiled))
    with pytest.raises(Diverged, match="val/loss is nan"):
        session.evaluate_only(*session.evaluation_config(settings(mode="evaluate", **spoiled), ()), Ranks())
    # The same run resumes from the good checkpoint and, with rollback, skips the samples.
    final = train(directory, on_divergence="rollback")
    assert final["rollbacks"] == [{"from_update": 12, "to_update": 10, "passed_over_from": 10, "passed_over": 2}]
    assert math.isfinite(lines(directory / "metrics.jsonl")[-1]["val/loss"])
    assert checkpoint.load(directory / "checkpoints/best.pt")["update"] == 12


def test_a_rollback_before_the_first_checkpoint_restarts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    SpoiledGradients(monkeypatch, 0)
    final = train(tmp_path / "run", on_divergence="rollback")
    assert final["rollbacks"] == [{"from_update": 2, "to_update": 0, "passed_over_from": 0, "passed_over": 2}]
    assert final["updates"] == 12


def test_a_loss_above_the_limit_is_a_divergence(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="diverged at update 1: loss"):
        train(tmp_path / "low", max_loss=0.01)
    assert train(tmp_path / "high", max_loss=100.0)["updates"] == 12


def test_a_report_that_cannot_be_written_hides_no_divergence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(guard_module, "write_atomic", full)
    with pytest.raises(Diverged, match="diverged at update 1: loss"):
        train(tmp_path / "run", max_loss=0.01)
    assert "WARNING: divergence.jsonl cannot be written (No space left on device)" in capsys.readouterr().out


def test_bad_settings_of_the_guard_are_refused(tmp_path: Path) -> None:
    for guard in ({"max_loss": 0.0}, {"max_rollbacks": -1}, {"on_divergence": "hope"}):
        with pytest.raises(ConfigError, match=f"guard.{next(iter(guard))}"):
            train(tmp_path / "run", **guard)


@pytest.mark.usefixtures("float16")
def test_steps_that_float16_skips_do_not_advance_the_schedule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rates: list[tuple[int, float]] = []
    original = Trainer.run_update

    def run_update(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        info = original(trainer, *args, **kwargs)
        rates.append((trainer.update, info.lr))
        return info

    monkeypatch.setattr(Trainer, "run_update", run_update)
    spoiled = SpoiledGradients(monkeypatch, 1, 2, 11)
    final = train(tmp_path / "run", precision="fp16")
    assert spoiled.seen == list(range(15))
    assert final["passed_over"] == 3
    assert [update for update, _ in rates] == [1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10, 11, 12]
    assert rates[1][1] == rates[2][1] == rates[3][1]
    assert [line["update"] for line in lines(tmp_path / "run/metrics.jsonl") if "train/loss" in line] == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]


@pytest.mark.usefixtures("float16")
def test_float16_that_never_takes_a_step_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(guard_module, "_MAX_SKIPPED", 5)
    original = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda trainer: original(trainer) and False)
    with pytest.raises(Diverged, match="6 batches in a row"):
        train(tmp_path / "run", precision="fp16")


def test_the_report_has_the_layers_of_the_previous_update() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    lars = LARS(optim.SGD(model.parameters(), lr=0.1), trust_coef=0.1, record=True)
    guard = Guard(5.0)
    expected: list[tuple[str, float, float, float]] = []
    for update, loss in enumerate((1.0, 2.0, 6.0, math.nan), start=1):
        before = [(n, p.norm().item()) for n, p in model.named_parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(update))
        if update == 2:
            expected = [(n, w, p.grad.norm().item()) for (n, w), p in zip(before, model.parameters(), strict=True)]  # type: ignore
        lars.step()
        guard.watch(update, torch.tensor(loss), lars)
    found = guard.found(model, lambda update: update / 10)
    assert found is not None
    assert (found.update, found.loss, found.lr) == (3, 6.0, 0.3)
    for layer, (name, weight, grad) in zip(found.layers, expected, strict=True):
        assert layer[0] == name
        assert layer[1:] == pytest.approx((weight, grad, 0.1 * weight / (grad + 1e-8)), rel=1e-5)
    guard.reset()
    assert guard.found(model, float) is None


def test_a_divergence_in_the_first_update_reports_its_own_layers() -> None:
    model = nn.Linear(2, 1)
    lars = LARS(optim.SGD(model.parameters(), lr=0.1), record=True)
    guard = Guard(5.0)
    for update in (7, 8):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(update))
        lars.step()
        guard.watch(update, torch.tensor(6.0), lars)
    found = guard.found(model, float)
    assert found is not None
    assert (found.update, found.layers_of) == (7, 7)
    assert {layer[0]: layer[2] for layer in found.layers} == pytest.approx({"weight": 7 * math.sqrt(2), "bias": 7.0})
    assert found.record()["layers_of_update"] == 7


@pytest.mark.parametrize(("bad", "has_layers"), [(3, False), (17, False), (18, True), (23, True)])
def test_a_late_check_still_finds_the_update_and_its_layers(
    monkeypatch: pytest.MonkeyPatch, bad: int, has_layers: bool
) -> None:
    monkeypatch.setattr(guard_module, "_MAX_LOSSES", 4)
    monkeypatch.setattr(guard_module, "_MAX_LAYERS", 7)
    model = nn.Linear(2, 1)
    lars = LARS(optim.SGD(model.parameters(), lr=0.1), record=True)
    guard = Guard(None)
    for update in range(1, 24):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(update))
        lars.step()
        guard.watch(update, torch.tensor([math.nan if update == bad else 1.0]), lars)
        if update == 2:
            assert guard.found(model, float) is None
    found = guard.found(model, float)
    assert found is not None
    assert (found.update, found.layers_of) == (bad, bad - 1)
    # The layers of the last seven updates, 17 to 23, are kept.
    assert bool(found.layers) is has_layers
    if has_layers:
        assert {layer[0]: layer[2] for layer in found.layers}["bias"] == pytest.approx(bad - 1)


def test_a_rollback_undone_by_a_kill_is_recorded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        SpoiledGradients(patch, 4)
        original = run_module.Run._save

        def save(run: run_module.Run) -> None:
            if run.state.rollbacks:
                raise KeyboardInterrupt
            original(run)

        patch.setattr(run_module.Run, "_save", save)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", on_divergence="rollback")
    assert len(lines(tmp_path / "run/divergence.jsonl")) == 1
    SpoiledGradients(monkeypatch, 4)
    assert len(train(tmp_path / "run", on_divergence="rollback")["rollbacks"]) == 1
    assert len(lines(tmp_path / "run/divergence.jsonl")) == 1


def test_a_report_works_without_layers() -> None:
    assert Divergence(3, math.inf, 0.1, (), 2).lines() == ["diverged at update 3: loss inf, lr 0.1."]
    assert Divergence(3, math.inf, 0.1, (), 2).record()["loss"] is None


def test_a_rollback_keeps_the_best_result_at_its_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Position 4 makes weights NaN after the evaluation at update 4. The checkpoint is saved before that evaluation.
    SpoiledGradients(monkeypatch, 4)
    scores = iter([90.0, 90.0, 10.0, 10.0])
    whole = run_module.evaluate_split

    def scored(*arguments: Any, **keywords: Any) -> Any:
        result = whole(*arguments, **keywords)
        assert result is not None
        return replace(result, top1=next(scores))

    monkeypatch.setattr(run_module, "evaluate_split", scored)
    monkeypatch.setitem(SETTINGS, "evaluate", {"every_epochs": 1})
    final = train(tmp_path / "run", on_divergence="rollback")
    assert final["best_top1"] == 90.0
    best = checkpoint.load(tmp_path / "run/checkpoints/best.pt")
    assert best["update"] == 4


def test_a_rollback_beyond_the_best_result_discards_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Two divergences after the evaluation at update 8 roll back to 8, then to 6, and skip the samples.
    SpoiledGradients(monkeypatch, 8, 10)
    scores = iter([50.0, 90.0, 90.0, 10.0, 10.0])
    whole = run_module.evaluate_split
    monkeypatch.setattr(run_module, "evaluate_split", lambda *a, **k: replace(whole(*a, **k), top1=next(scores)))  # type: ignore[type-var]
    monkeypatch.setitem(SETTINGS, "evaluate", {"every_epochs": 1})
    final = train(tmp_path / "run", on_divergence="rollback")
    assert [step["to_update"] for step in final["rollbacks"]] == [8, 6]
    assert final["best_top1"] == 50.0
    assert checkpoint.load(tmp_path / "run/checkpoints/best.pt")["update"] == 4
