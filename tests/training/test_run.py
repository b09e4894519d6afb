"""A run logs, checkpoints and evaluates as configured; killed at any instant, it resumes to the same weights."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny
from torch import Tensor

from lars_train.config import Config
from lars_train.errors import ConfigError, DataError, Stopped
from lars_train.export import export, origin
from lars_train.launch import Ranks
from lars_train.monitoring.fields import FIELDS, TIMING_FIELDS
from lars_train.monitoring.log import RunLog
from lars_train.monitoring.progress import Progress
from lars_train.optim.lars import LARS
from lars_train.signals import SignalHandler
from lars_train.training import checkpoint, metrics_logger, session
from lars_train.training import run as run_module
from lars_train.training.prepare import prepare
from lars_train.training.run import Run
from lars_train.training.run_directory import Invocation
from lars_train.training.trainer import Trainer

# 4 updates per epoch, 3 ghost batches per update, micro-batches of 2 and 1 ghost batches.
CHANGES: dict[str, Any] = {
    "epochs": 3,
    "log_every": 3,
    "micro_batch": 16,
    "batch": {"size": 24},
    "data": {"image_size": 16, "augment": "pad_crop", "pad": 2, "train_count": 100, "val_count": 22, "workers": "auto"},
    "model": {"ghost_batch": 8},
    "optimizer": {"trust_coef": 0.01, "weight_decay": 0.001},
    "schedule": {"warmup_epochs": 1},
    "checkpoint": {"every_updates": 3},
}


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def config(directory: Path, **changes: Any) -> Config:
    """Return the tiny run in `directory`. `changes`: config keys with ``__`` for the dot."""
    return tiny(CHANGES, {"run": {"dir": str(directory)}}, **changes)


def train(directory: Path, **changes: Any) -> dict[str, Any]:
    return session.train(prepare(config(directory, **changes)), Ranks(), Invocation(("lars-train",)))


def lines(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without measured times."""
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING_FIELDS} for line in found]


def state(directory: Path) -> dict[str, Any]:
    found = checkpoint.latest(directory / "checkpoints")
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unbroken") / "run"
    train(directory)
    return directory


def assert_same_outcome(directory: Path, expected: Path) -> None:
    ours, theirs = (json.loads((d / "final.json").read_text()) for d in (directory, expected))
    for timed in ("seconds", "directory"):
        del ours[timed], theirs[timed]
    assert ours == theirs
    for key in ("model", "optimizer"):
        assert_equal(state(directory)[key], state(expected)[key])
    assert lines(directory) == lines(expected)
    assert (directory / "trust_ratios.jsonl").read_bytes() == (expected / "trust_ratios.jsonl").read_bytes()


def assert_equal(got: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_equal(got[key], expected[key])
    elif isinstance(expected, Tensor):
        assert torch.equal(got, expected)
    else:
        assert got == expected


def test_a_run_leaves_what_scripts_rely_on(unbroken: Path) -> None:
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "final.json", "run.json", ".hydra", "tensorboard"} <= {
        p.name for p in unbroken.iterdir()
    }
    found = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    # Every third update, and the end of every epoch of 4.
    assert [(line["update"], "val/top1" in line) for line in found] == [
        (u, kind) for u in (3, 4, 6, 8, 9, 12) for kind in ((False, True) if u % 4 == 0 else (False,))
    ]
    for line in found:
        expected = {"train/loss", "train/lr", "train/images_per_s", "train/wait_share", "train/grad_norm"}
        expected |= {"loader/images_per_s", "loader/fast_share"}
        if "val/top1" in line:
            expected = {"val/top1", "val/top5", "val/loss", "val/count", "val/best_top1"}
        assert expected <= line.keys() <= FIELDS.keys()
        assert line["epoch"] == line["update"] / 4
    assert [p.name for p in checkpoint.listing(unbroken / "checkpoints")] == [f"update-{u:09d}.pt" for u in (8, 9, 12)]
    # The rate of update 9 of 12, after the warm-up.
    assert next(v["train/lr"] for v in found if v["update"] == 9) == pytest.approx((1 - 8 / 12) ** 2)


def test_tensorboard_shows_layers_stages_noise_and_images(unbroken: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(unbroken / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    quantities = ("weight_norm", "grad_norm", "trust_ratio", "layer_lr", "update_ratio")
    assert set(tags["histograms"]) == {f"layers/{what}" for what in quantities}
    stages = {f"stage_{what}/{stage}" for what in quantities for stage in ("stem", "layer1", "layer2", "layer3", "fc")}
    noise = {"noise/grad_sq", "noise/trace"}
    assert stages | noise | {"memory/host", "checkpoint/wait_seconds"} <= set(tags["scalars"])
    logged = [line["update"] for line in lines(unbroken) if "train/loss" in line]
    for tag in stages:
        assert [event.step for event in events.Scalars(tag)] == logged
    (images,) = events.Images("samples/augmented")
    assert (images.step, events.SummaryMetadata("custom_scalars__config__").plugin_data.plugin_name) == (
        logged[0],
        "custom_scalars",
    )


def test_every_log_line_has_its_layers_trust_ratios(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[list[float]] = []
    step = LARS.step

    def watched(optimizer: LARS, closure: None = None) -> None:
        ratios = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                w, g = (t.detach().double().norm().item() for t in (parameter, parameter.grad))
                ratios.append(0.01 * w / (g + group["weight_decay"] * w + optimizer.eps) if w and g else 1.0)
        expected.append(ratios)
        return step(optimizer, closure)

    monkeypatch.setattr(LARS, "step", watched)
    train(tmp_path / "run")
    found = [json.loads(line) for line in (tmp_path / "run" / "trust_ratios.jsonl").read_text().splitlines()]
    assert [line["update"] for line in found] == [line["update"] for line in lines(unbroken) if "train/loss" in line]
    layers = json.loads((tmp_path / "run" / "trust_ratios.fields.json").read_text())["layers"]
    assert sorted(layers) == sorted(state(unbroken)["model"].keys() & set(layers))
    for line in found:
        assert sorted(line["trust_ratios"]) == pytest.approx(sorted(expected[line["update"] - 1]), rel=1e-3)


def test_without_lars_there_are_no_trust_ratios(tmp_path: Path) -> None:
    train(tmp_path / "run", optimizer__name="sgd", optimizer__trust_coef=None, max_updates=2)
    assert not (tmp_path / "run" / "trust_ratios.jsonl").exists()


def test_the_record_of_a_start_has_its_settings_and_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_update", at_call(8, Trainer.run_update))
        with pytest.raises(KeyboardInterrupt):
            train(directory)
    final = train(directory)
    record = json.loads((directory / "run.json").read_text())
    assert {"samples": 100, "global_batch": 24, "updates": 12, "nominal_batch": 24}.items() <= record["plan"].items()
    killed, last = record["started"]
    assert (killed["resumed_at"], last["resumed_at"]) == (0, 6)
    assert "ended" not in killed
    assert {"how": "finished", "update": 12, "seconds": final["seconds"]}.items() <= last["ended"].items()
    assert last["resolved"]["precision"] == "fp32"


def test_logged_time_continues_after_a_kill_without_the_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: clock[0])
    one_update = Trainer.run_update

    def timed(trainer: Trainer, *arguments: Any, **keywords: Any) -> Any:
        clock[0] += 10
        return one_update(trainer, *arguments, **keywords)

    monkeypatch.setattr(Trainer, "run_update", timed)
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_update", at_call(8, timed))
        with pytest.raises(KeyboardInterrupt):
            train(directory)
    clock[0] += 1e6
    assert train(directory)["seconds"] == 120
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["run/seconds"] for line in found] == [10.0 * line["update"] for line in found]


def test_the_final_record_matches_the_log_and_the_weights(unbroken: Path) -> None:
    final = json.loads((unbroken / "final.json").read_text())
    evaluations = [line for line in lines(unbroken) if "val/top1" in line]
    assert final["final_top1"] == evaluations[-1]["val/top1"]
    assert final["best_top1"] == max(line["val/top1"] for line in evaluations) == evaluations[-1]["val/best_top1"]
    assert {line["val/count"] for line in evaluations} == {22} == {final["val_count"]}
    assert (final["updates"], final["planned_updates"], final["global_batch"]) == (12, 12, 24)
    digest = hashlib.sha256()
    for name, tensor in sorted(state(unbroken)["model"].items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    assert final["weights_sha256"] == digest.hexdigest()


def test_training_learns(unbroken: Path) -> None:
    losses = [line["train/loss"] for line in lines(unbroken) if "train/loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert json.loads((unbroken / "final.json").read_text())["final_top1"] > 60


def at_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, except that call `number` raises KeyboardInterrupt."""
    calls = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return function(*arguments, **keywords)

    return counted


KILLS: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "before the first checkpoint": (Trainer, "run_update", (3,)),
    "between checkpoints": (Trainer, "run_update", (8,)),
    "three times": (Trainer, "run_update", (5, 4, 5)),
    "after a log line": (RunLog, "write", (5,)),
    "within a checkpoint": (checkpoint, "verify", (2,)),
    "after a checkpoint": (checkpoint, "listing", (5,)),
    "in an evaluation": (Run, "_evaluate", (2,)),
    "before the final record": (Run, "_finish", (1,)),
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_ends_with_the_same_weights(
    kill: str, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, calls = KILLS[kill]
    for call in calls:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, at_call(call, getattr(owner, name)))
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "run")
        assert not (tmp_path / "run" / "final.json").exists()
    train(tmp_path / "run")
    assert_same_outcome(tmp_path / "run", unbroken)


METHODS: dict[str, Any] = {
    "loss": "bce",
    "augment__mixup": 0.2,
    "augment__cutmix": 1.0,
    "augment__auto": "trivial",
}


def test_a_killed_run_with_methods_ends_with_the_same_weights(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "unbroken", **METHODS)
    assert lines(tmp_path / "unbroken")[0]["train/loss"] != lines(unbroken)[0]["train/loss"]
    for call in (6, 5):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "run_update", at_call(call, Trainer.run_update))
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "run", **METHODS)
    train(tmp_path / "run", **METHODS)
    assert_same_outcome(tmp_path / "run", tmp_path / "unbroken")


def test_a_run_that_stopped_early_resumes_to_the_same_weights(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, bars = tmp_path / "run", list[tuple[int, ...]]()
    monkeypatch.setattr(Progress, "start_epoch", lambda _, *bar: bars.append(bar))
    for stop in (2, 5, 8):
        final = train(directory, max_updates=stop)
        assert (final["updates"], final["planned_updates"]) == (stop, 12)
        # An early stop ends with an evaluation.
        assert [v for v in lines(directory) if "val/top1" in v][-1]["update"] == stop
    # Epoch, updates in it, and updates already made. The bar of the last epoch ends where the run ends.
    assert bars == [(0, 2, 0), (0, 4, 2), (1, 1, 0), (1, 4, 1)]
    assert train(directory)["updates"] == 12
    assert_equal(state(directory)["model"], state(unbroken)["model"])
    assert json.loads((directory / "final.json").read_text())["weights_sha256"] == state_hash(unbroken)


def test_low_validation_accuracy_is_explained_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        metrics_logger, "validation_gap_note", lambda logged, result: f"NOTE: {logged['train/top1']:g} {result.top1:g}"
    )
    for stop in (4, 8):
        train(tmp_path / "run", max_updates=stop)
    values = {name: line[name] for line in lines(tmp_path / "run")[:3] for name in line}
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOTE: ")]
    assert notes == [f"NOTE: {values['train/top1']:g} {values['val/top1']:g}"]


def state_hash(directory: Path) -> str:
    text: str = json.loads((directory / "final.json").read_text())["weights_sha256"]
    return text


def test_a_finished_run_is_reported_and_not_trained_again(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (unbroken / "run.json").read_text()
    monkeypatch.setattr(Run, "train", None)
    assert train(unbroken) == json.loads((unbroken / "final.json").read_text())
    # A later max_updates than the run's end changes nothing.
    assert train(unbroken, max_updates=13) == train(unbroken)
    for prepared in (prepare(config(unbroken, max_updates=n)) for n in (3, 11)):
        with pytest.raises(ConfigError, match=r"max_updates=\d+: the run in .* has finished at update 12; .*run\.name"):
            session.find_finished(prepared)
    assert (unbroken / "run.json").read_text() == before


def test_a_run_starts_over_with_resume_never(unbroken: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    train(directory, max_updates=5)
    train(directory, max_updates=2, resume="never")
    assert state(directory)["update"] == 2
    assert state(tmp_path / "run.old1")["update"] == 5
    assert [line["update"] for line in lines(directory)] == [2, 2]


def test_stored_decisions_are_kept(tmp_path: Path) -> None:
    train(tmp_path / "run", max_updates=3, micro_batch="auto")
    first = state(tmp_path / "run")["resolved"]
    assert first["micro_batch"] == 24
    saved = checkpoint.listing(tmp_path / "run" / "checkpoints")[-1]
    content = {**checkpoint.load(saved), "resolved": {**first, "micro_batch": 8}}
    checkpoint.save(saved.parent, 3, content, keep=1)
    train(tmp_path / "run", max_updates=4, micro_batch="auto")
    assert state(tmp_path / "run")["resolved"]["micro_batch"] == 8


def test_a_damaged_last_checkpoint_does_not_change_the_result(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run_update", at_call(8, Trainer.run_update))
        with pytest.raises(KeyboardInterrupt):
            train(directory)
    last = checkpoint.listing(directory / "checkpoints")[-1]
    last.write_bytes(last.read_bytes()[:1000])
    train(directory, max_updates=5)
    assert f"{last} is damaged" in capsys.readouterr().err
    assert last not in checkpoint.listing(directory / "checkpoints")
    train(directory)
    assert "damaged" not in capsys.readouterr().err
    assert_equal(state(directory)["model"], state(unbroken)["model"])


def test_a_resumed_run_remembers_its_best_result_and_its_time(tmp_path: Path) -> None:
    train(tmp_path / "run", max_updates=3)
    saved = checkpoint.listing(tmp_path / "run" / "checkpoints")[-1]
    checkpoint.save(saved.parent, 3, {**checkpoint.load(saved), "best_top1": 101.0, "seconds": 5000.0}, keep=1)
    final = train(tmp_path / "run", max_updates=4)
    assert final["best_top1"] == lines(tmp_path / "run")[-1]["val/best_top1"] == 101.0
    assert final["final_top1"] <= 100
    assert 5000 < final["seconds"] < 5100


def test_a_new_run_may_start_from_another_runs_checkpoint(tmp_path: Path) -> None:
    train(tmp_path / "first", max_updates=3)
    changes = {"optimizer__weight_decay": 0.25, "optimizer__momentum": 0.5, "optimizer__eps": 1e-3}
    prepared = prepare(config(tmp_path / "second", checkpoint__path=str(tmp_path / "first"), max_updates=5, **changes))
    seen: list[tuple[float, float, float]] = []
    run_update = Trainer.run_update

    def watch(trainer: Trainer, *arguments: Any, **keywords: Any) -> Any:
        (group,) = trainer.optimizer.param_groups
        assert isinstance(trainer.optimizer, LARS)
        seen.append((group["weight_decay"], group["momentum"], trainer.optimizer.eps))
        return run_update(trainer, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run_update", watch)
        final = session.train(prepared, Ranks(), Invocation())
    assert final["updates"] == 5
    assert seen == [(0.25, 0.5, 1e-3)] * 2


def test_evaluating_the_checkpoint_gives_the_runs_own_result(unbroken: Path, tmp_path: Path) -> None:
    asked = config(tmp_path, mode="evaluate", checkpoint__path=str(unbroken), data__val_count=9999, data__pad=9)
    c, content = session.evaluation_config(asked, ())
    result = session.evaluate_only(c, content, Ranks())
    last = [line for line in lines(unbroken) if "val/top1" in line][-1]
    assert {k: result[k] for k in ("val/top1", "val/top5", "val/count")} == {
        k: last[k] for k in ("val/top1", "val/top5", "val/count")
    }
    assert result["val/loss"] == pytest.approx(last["val/loss"], rel=1e-6)
    assert (result["model"], result["data"], result["undecodable"]) == ("small", "synthetic", [])
    # Keys on the command line take precedence.
    asked = replace(asked, verbosity=2, deterministic=True, channels_last=False)
    c, content = session.evaluation_config(asked, ("data.val_count=9999", "device=cpu", "deterministic=true"))
    assert (c.data.val_count, c.data.pad) == (9999, 2)
    assert (c.verbosity, c.deterministic, c.channels_last) == (2, True, "auto")


def test_a_checkpoint_is_evaluated_with_flips_if_its_run_was(tmp_path: Path) -> None:
    final = train(tmp_path / "run", epochs=1, schedule__warmup_epochs=0, evaluate__flip=True)
    asked = config(tmp_path / "other", mode="evaluate", checkpoint__path=str(tmp_path / "run"))
    found = [session.evaluation_config(asked, overrides) for overrides in ((), ("evaluate.flip=false",))]
    flipped, plain = (session.evaluate_only(*each, Ranks()) for each in found)
    assert flipped["val/top1"] == final["final_top1"]
    assert flipped["val/loss"] == lines(tmp_path / "run")[-1]["val/loss"] != plain["val/loss"]
    assert origin(*checkpoint.find(str(tmp_path / "run")))["flip"] is True


def test_exported_weights_load_into_torchvisions_own_model(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    train(tmp_path / "run", max_updates=1, model__name="resnet18", data__val_count=2, precision__name="fp64")
    asked = config(tmp_path, mode="export", checkpoint__path=str(tmp_path / "run"))
    path, _ = export(asked)
    assert path.parent == tmp_path / "run" / "checkpoints"
    model = resnet18(num_classes=4)
    model.load_state_dict(torch.load(path, weights_only=True))
    for key, value in state(tmp_path / "run")["model"].items():
        assert torch.equal(model.state_dict()[key], value.to(model.state_dict()[key].dtype)), key
    assert all(v.is_contiguous() for v in torch.load(path, weights_only=True).values())
    # A run directory still works with an export among its checkpoints.
    assert state(tmp_path / "run")["update"] == 1
    own = path.parent / "update-000000001.pt"
    with pytest.raises(ConfigError, match=r"export\.path=.*: is a checkpoint of the run"):
        export(config(tmp_path, mode="export", checkpoint__path=str(own), export__path=str(own)))
    with pytest.raises(ConfigError, match=r"export\.path=.* does not exist"):
        export(config(tmp_path, mode="export", checkpoint__path=str(path.parent), export__path="/no/x.pth"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 48 training and 8 validation images of 4 classes; 2 training images and 1 validation image are damaged."""
    root = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 12), ("val", 2)):
        for label in range(4):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (16, 16), (60 * label, 5 * number, 0)).save(folder / f"{number:02d}.png")
    for name in ("train/class1/03.png", "train/class2/07.png", "val/class3/01.png"):
        (root / name).write_bytes((root / name).read_bytes()[:20])
    return root


FOLDER: dict[str, Any] = {
    "data__name": "folder",
    **dict.fromkeys(("data__train_count", "data__val_count", "data__num_classes")),
    "batch__size": 16,
    "epochs": 2,
}


def test_bad_images_are_named_once_and_counted(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = train(tmp_path / "run", data__root=str(photographs), data__max_bad=3, **FOLDER)
    assert final["bad_images"] == 3
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()]
    assert sorted(line["image"] for line in listed) == sorted(
        str(photographs / name) for name in ("train/class1/03.png", "train/class2/07.png", "val/class3/01.png")
    )
    output = capsys.readouterr().out
    for line in listed:
        assert line["reason"]
        assert 0 < line["update"] <= 6
        assert output.count(line["image"]) == 1
    assert [v for v in lines(tmp_path / "run") if "train/loss" in v][-1]["train/bad_images"] >= 2
    evaluations = [v for v in lines(tmp_path / "run") if "val/top1" in v]
    assert {(v["val/bad_images"], v["val/count"]) for v in evaluations} == {(1, 8)}
    assert max(v["val/top1"] for v in evaluations) <= 100 * 7 / 8


def test_a_run_resumes_after_its_images_moved(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [tmp_path / name for name in ("here", "there", "others")]
    for place in places:
        shutil.copytree(photographs, place)
    (places[2] / "train/class0/00.png").rename(places[2] / "train/class1/new.png")
    monkeypatch.chdir(tmp_path)
    here, there, others = ({"data__root": str(place), **FOLDER} for place in places)
    # In the default directory.
    by_default = config(tmp_path, run__dir=None, max_updates=3, **here)
    session.train(prepare(by_default), Ranks(), Invocation())
    (directory,) = (tmp_path / "runs").iterdir()
    (note,) = prepare(config(tmp_path, run__dir=None, **there)).notes
    assert f"to resume it, set run.dir={directory.relative_to(tmp_path)}" in note
    assert not prepare(config(tmp_path, run__dir=None, **others)).notes
    with pytest.raises(ConfigError, match=r"another config \(data\.root: .*here' there, .*others' now\)"):
        train(directory, **others)
    capsys.readouterr()
    final = train(directory, **there)
    output = capsys.readouterr().out
    assert f"data.root      was {places[0]} so far in this run" in output
    assert "resumed        at update 3" in output
    assert final["weights_sha256"] == train(tmp_path / "unbroken", **here)["weights_sha256"]
    assert json.loads((directory / "run.json").read_text())["settings"]["data.root"] == str(places[1])
    # None of the three bad images is counted twice.
    assert final["bad_images"] == 3
    assert train(directory, **there) == final


def test_more_bad_images_than_allowed_fail_the_run(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.max_bad=1"):
        train(tmp_path / "run", data__root=str(photographs), data__max_bad=1, **FOLDER)
    named = (tmp_path / "run" / "bad_images.jsonl").read_text()
    assert named.count("cannot") + named.count(".png") >= 2
    assert not (tmp_path / "run" / "final.json").exists()


def test_bad_images_are_not_tolerated_with_on_error_fail(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"class[12]/0[37]\.png"):
        train(tmp_path / "run", data__root=str(photographs), data__on_error="fail", **FOLDER)


def test_a_resumed_run_does_not_report_bad_images_twice(photographs: Path, tmp_path: Path) -> None:
    for stop in (3, 6):
        train(tmp_path / "run", data__root=str(photographs), max_updates=stop, **FOLDER)
    assert len((tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()) == 3


def test_a_signal_during_an_evaluation_loses_no_updates(
    unbroken: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    noted: list[SignalHandler] = []
    enter, whole = SignalHandler.__enter__, run_module.evaluate_split

    def entered(handler: SignalHandler) -> SignalHandler:
        noted.append(handler)
        return enter(handler)

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        noted[-1].received = signal.SIGTERM
        return whole(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(SignalHandler, "__enter__", entered)
        patch.setattr(run_module, "evaluate_split", interrupted)
        with pytest.raises(Stopped, match="SIGTERM: stopped after update 4, with a checkpoint"):
            train(tmp_path / "run")
    assert [p.name for p in checkpoint.listing(tmp_path / "run/checkpoints")] == [
        "update-000000003.pt",
        "update-000000004.pt",
    ]
    final = train(tmp_path / "run")
    expected = json.loads((unbroken / "final.json").read_text())
    assert final["weights_sha256"] == expected["weights_sha256"]
    assert final["best_top1"] == expected["best_top1"]


def test_a_checkpoint_of_another_model_is_skipped_with_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "other", max_updates=4, model__name="resnet20")
    train(tmp_path / "run", max_updates=3)
    stranger = "checkpoints/update-000000004.pt"
    (tmp_path / "run" / stranger).write_bytes((tmp_path / "other" / stranger).read_bytes())
    capfd.readouterr()
    assert train(tmp_path / "run", max_updates=5)["updates"] == 5
    output = capfd.readouterr()
    assert "update-000000004.pt does not fit: the checkpoint holds model resnet20" in output.err
    assert "resumed        at update 3" in output.out


def test_a_run_without_its_checkpoints_does_not_restart(tmp_path: Path) -> None:
    train(tmp_path / "run", max_updates=3)
    for path in (tmp_path / "run/checkpoints").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="checkpoints are missing"):
        train(tmp_path / "run", max_updates=5)
    assert train(tmp_path / "run", max_updates=5, resume="never")["updates"] == 5


def test_a_run_continued_past_its_end_has_no_final_record_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "run"
    train(directory, max_updates=3)

    def cut_off(run: Run, *arguments: Any) -> Any:
        raise Stopped("power")

    with monkeypatch.context() as patched:
        patched.setattr(Run, "train", cut_off)
        with pytest.raises(Stopped):
            train(directory, max_updates=5)
    assert not (directory / "final.json").exists()
    # Nothing is left to do, and the result is written again.
    assert train(directory, max_updates=3)["updates"] == 3
    assert train(directory, max_updates=5)["updates"] == 5
    with monkeypatch.context() as patched:
        patched.setattr(Run, "train", cut_off)
        with pytest.raises(Stopped):
            train(directory, max_updates=7)
    with pytest.raises(ConfigError, match=r"max_updates=3: the run in .* is already at update 5"):
        train(directory, max_updates=3)
