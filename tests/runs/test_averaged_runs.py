"""A run with blurpool, flips and averaged weights: formula, resume, any world size, evaluation and export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DATA, final, metrics, start_ranks, tiny
from torch import Tensor

from lars_train.config import Config
from lars_train.errors import ConfigError
from lars_train.export import CARD, export
from lars_train.launch import Ranks
from lars_train.models.factory import build_model
from lars_train.models.weights import weights_sha256
from lars_train.monitoring.fields import LAYOUT_DEPENDENT_FIELDS, TIMING_FIELDS
from lars_train.report.lars_report import read_rows
from lars_train.report.table import notes
from lars_train.training import checkpoint, session
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation
from lars_train.training.trainer import Trainer

# 12 updates, 4 per epoch. The average enters late enough that the first evaluation is of the weights alone.
DECAY, START = 0.75, 4
CHANGES: dict[str, Any] = {
    "epochs": 3,
    "log_every": 3,
    "batch": {"size": 24},
    "data": {"image_size": 16, "augment": "pad_crop", "pad": 2, "train_count": 100, "val_count": 22},
    "model": {"ghost_batch": 8, "ema": DECAY, "ema_start": START, "blurpool": True},
    "optimizer": {"trust_coef": 0.01, "weight_decay": 0.001},
    "schedule": {"warmup_epochs": 1},
    "checkpoint": {"every_updates": 3},
    "evaluate": {"flip": True},
    "precision": {"name": "fp64"},
}


@pytest.fixture(autouse=True, scope="module")
def process_state() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(directory: Path, **changes: Any) -> Config:
    return tiny(CHANGES, {"run": {"dir": str(directory)}}, **changes)


def train(directory: Path, **changes: Any) -> dict[str, Any]:
    return session.train(prepare(config(directory, **changes)), Ranks(), Invocation())


def evaluated(directory: Path, *overrides: str, **changes: Any) -> dict[str, Any]:
    asked = config(directory, mode="evaluate", checkpoint__path=str(directory), **changes)
    return session.evaluate_only(*session.evaluation_config(asked, overrides), Ranks())


def last(directory: Path) -> dict[str, Any]:
    found = checkpoint.latest(directory / "checkpoints")
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    """Return the directory of a run, and the network's state after each update."""
    directory, states, original = (
        tmp_path_factory.mktemp("whole") / "run",
        list[dict[str, Tensor]](),
        Trainer.run_update,
    )

    def watched(trainer: Trainer, *arguments: Any, **keywords: Any) -> Any:
        info = original(trainer, *arguments, **keywords)
        states.append({key: value.clone() for key, value in trainer.network.state_dict().items()})
        return info

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run_update", watched)
        train(directory)
    return directory, states


def test_the_average_follows_the_formula_in_a_run(whole: tuple[Path, list[dict[str, Tensor]]]) -> None:
    directory, states = whole
    expected = states[START]
    for state in states[START + 1 :]:
        expected = {key: DECAY * expected[key] + (1 - DECAY) * value for key, value in state.items()}
    found = last(directory)["ema"]
    for key in (key for key, value in found.items() if value.is_floating_point()):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-12, atol=1e-14, msg=key)


def test_both_networks_are_evaluated_and_the_average_counts(
    whole: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    directory, _ = whole
    lines, result = [line for line in metrics(directory) if "val/top1" in line], final(directory)
    # Up to update 4 the average is the weights.
    assert lines[0]["val/ema_loss"] == lines[0]["val/loss"]
    average, weights = evaluated(directory), evaluated(directory, evaluate__ema=False)
    for kind in ("top1", "top5", "loss"):
        assert average[f"val/{kind}"] == pytest.approx(lines[-1][f"val/ema_{kind}"], rel=1e-6)
        assert weights[f"val/{kind}"] == pytest.approx(lines[-1][f"val/{kind}"], rel=1e-6)
    assert average["val/loss"] != pytest.approx(weights["val/loss"], rel=1e-3)
    assert average["notes"] == [
        "NOTE: this evaluates the average of the weights (model.ema); evaluate.ema=false evaluates the weights."
    ]
    assert weights["notes"] == []
    assert (result["final_top1"], result["weights_top1"]) == (lines[-1]["val/ema_top1"], lines[-1]["val/top1"])
    assert result["best_top1"] == lines[-1]["val/best_top1"] == max(line["val/ema_top1"] for line in lines)
    best = next(line["update"] for line in lines if line["val/ema_top1"] == result["best_top1"])
    assert checkpoint.load(directory / "checkpoints/best.pt")["update"] == best
    (row,) = read_rows([directory])
    assert [point.value for point in row.first.top1] == [line["val/ema_top1"] for line in lines]
    assert "Runs with model.ema: top-1 is that of the average of the weights." in notes([row])
    network = build_model("small", num_classes=4, ghost_batch=8, zero_gamma=False, blurpool=True).double()
    network.load_state_dict(last(directory)["ema"])
    assert result["ema_sha256"] == weights_sha256(network) != result["weights_sha256"]


def test_the_average_is_exported_and_blurpool_recorded(
    whole: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    directory, _ = whole
    for part, ema in (("ema", None), ("model", False)):
        asked = config(tmp_path, mode="export", checkpoint__path=str(directory), export__ema=ema)
        asked.export.path = str(tmp_path / f"{part}.pth")
        path, line = export(asked)
        assert line == ("the average of the weights (model.ema)" if part == "ema" else "")
        state = torch.load(path, weights_only=True)
        about = json.loads(state._metadata["lars_train"])
        assert (about["blurpool"], about["ema"]) == (True, DECAY if part == "ema" else None)
        assert about["top1"] == final(directory)["final_top1" if part == "ema" else "weights_top1"]
        assert all(torch.equal(value, last(directory)[part][key].to(value.dtype)) for key, value in state.items())
        alone = {"mode": "evaluate", "model__weights": str(path), "model__ema": None, "model__ema_start": 0}
        with pytest.raises(ConfigError, match=r"network with model\.blurpool=true"):
            session.evaluate_only(config(tmp_path, **alone, model__blurpool=False), None, Ranks())
        found = session.evaluate_only(config(tmp_path, **alone), None, Ranks())
        assert found["val/loss"] == pytest.approx(evaluated(directory, evaluate__ema=ema)["val/loss"], rel=1e-5)
    text = (tmp_path / CARD).read_text()
    assert "| weights | exponential moving average, decay 0.75 |" in text
    assert "small with blurpool" in text
    assert "zero_gamma=False, blurpool=True)" in text
    assert "mirror image |" in text


def test_a_killed_run_ends_with_the_same_average(
    whole: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = whole
    # Kill the run after updates 7 and 10. The last checkpoints before are of updates 6 and 9, within an epoch.
    for updates in (7, 4):
        left, original = [None] * updates, Trainer.run_update

        def killed(*arguments: Any, left: list[None] = left, original: Any = original, **keywords: Any) -> Any:
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return original(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "run_update", killed)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "run")
    train(tmp_path / "run")
    left_out = {"seconds", "directory"}
    results = [{k: v for k, v in final(d).items() if k not in left_out} for d in (tmp_path / "run", directory)]
    assert results[0] == results[1]
    timeless = [
        [{k: v for k, v in line.items() if k not in TIMING_FIELDS} for line in metrics(d)]
        for d in (tmp_path / "run", directory)
    ]
    assert timeless[0] == timeless[1]
    for part in ("model", "ema"):
        assert all(torch.equal(v, last(directory)[part][k]) for k, v in last(tmp_path / "run")[part].items())


def test_what_does_not_fit_the_checkpoint_is_refused(
    whole: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    directory, _ = whole
    start = {"checkpoint__path": str(directory)}
    with pytest.raises(ConfigError, match=r"network with model\.blurpool=true"):
        prepare(config(tmp_path / "a", model__blurpool=False, **start))
    with pytest.raises(ConfigError, match=r"network with model\.blurpool=true"):
        evaluated(directory, "model.blurpool=false", model__blurpool=False)
    plain = {"model__ema": None, "model__ema_start": 0}
    train(tmp_path / "plain", max_updates=3, **plain)
    with pytest.raises(ConfigError, match=r"evaluate\.ema=true: the checkpoint has no average"):
        evaluated(tmp_path / "plain", evaluate__ema=True)
    with pytest.raises(ConfigError, match=r"has no average .*model\.ema_start=3"):
        prepare(config(tmp_path / "b", model__ema_start=1, checkpoint__path=str(tmp_path / "plain")))
    # Before its start, the average is the weights, so the checkpoint has all that is needed.
    begun = train(tmp_path / "c", max_updates=4, checkpoint__path=str(tmp_path / "plain"))
    assert begun["final_top1"] == begun["weights_top1"]
    assert "ema" not in last(tmp_path / "plain")
    for changes, message in (
        ({"model__ema": 1.0}, "model.ema=1.0: the decay must be above 0 and below 1"),
        ({"model__ema": None}, "model.ema_start=4 has no effect without model.ema"),
        ({"model__ema_start": 12}, "model.ema_start=12: the run has only 12 updates"),
        ({"mode": "evaluate", "model__weights": "x", "evaluate__ema": True}, "evaluate.ema=true needs checkpoint.path"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(config(tmp_path / "d", **changes))


@pytest.mark.slow
def test_any_world_size_gives_the_same_average(tmp_path: Path) -> None:
    settings = [*DATA, "batch.size=64", "optimizer.lr=2", "epochs=1", "precision=fp64"]
    settings += [
        "data.train_count=256",
        "model.ema=0.9",
        "model.ema_start=1",
        "model.blurpool=true",
        "evaluate.flip=true",
    ]
    for world in (1, 2, 3):
        done = start_ranks([*settings, f"run.name=world{world}"], tmp_path, world)
        assert [rank.returncode for rank in done] == [0] * world, [rank.stderr for rank in done]
    one, *others = (tmp_path / "runs" / f"world{world}" for world in (1, 2, 3))
    for other in others:
        for ours, theirs in zip(metrics(other), metrics(one), strict=True):
            assert ours.keys() - LAYOUT_DEPENDENT_FIELDS == theirs.keys() - LAYOUT_DEPENDENT_FIELDS
            for key in ours.keys() - LAYOUT_DEPENDENT_FIELDS:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-10, abs=0), key
        for part in ("model", "ema"):
            for key, value in last(one)[part].items():
                torch.testing.assert_close(last(other)[part][key], value, rtol=1e-10, atol=1e-13, msg=key)
