"""The JPEG decoder that a run chooses when it starts and resumes, and the lines that it prints about the decoder."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

from lars_train.config import Config, DataConfig, resolve
from lars_train.data.dataset import Source
from lars_train.data.decode import native
from lars_train.data.loading.loader import EvalSpec
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.training import checkpoint, session
from lars_train.training import resolve as resolve_module
from lars_train.training.distributed import Group
from lars_train.training.prepare import prepare
from lars_train.training.resolve import check_decoder, choose_decoder, decoder_lines
from lars_train.training.run_directory import Invocation

CPU = torch.device("cpu")


@dataclass(frozen=True)
class FakeGroup(Group):
    """A fake group, in which another rank has only Pillow unless `everywhere`."""

    everywhere: bool = True

    def all_reduce_min(self, value: int, device: torch.device) -> int:
        return value if self.everywhere else 0


def set_native(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    """Make the native decoder available or unavailable."""
    monkeypatch.setattr(native, "is_available", lambda: available)


class OneFile:
    """A split with one file."""

    labels = np.zeros(1, np.int32)

    def __init__(self, name: str) -> None:
        self._name = name

    def __len__(self) -> int:
        return 1

    def name(self, sample: int) -> str:
        return self._name

    def location(self, sample: int) -> str:
        return self._name

    def read(self, sample: int) -> bytes:
        return b""


JPEGS: Source = OneFile("class/x.JPEG")


@pytest.mark.parametrize(
    ("setting", "stored", "here", "everywhere", "expected"),
    [
        ("auto", None, True, True, "native"),
        ("auto", None, False, True, "pillow"),
        ("auto", None, True, False, "pillow"),
        ("auto", "pillow", True, True, "pillow"),
        ("auto", "native", True, True, "native"),
        ("auto", "native", False, True, "pillow"),
        ("auto", "native", True, False, "pillow"),
        ("auto", "unknown", True, True, "native"),
        ("auto", "unknown", False, True, "pillow"),
        ("pillow", "native", True, True, "pillow"),
        ("unknown", None, True, True, "native"),
        ("native", "pillow", True, True, "native"),
    ],
)
def test_the_decoder_follows_config_then_run_then_speed(
    setting: str, stored: str | None, here: bool, everywhere: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_native(monkeypatch, here)
    config = Config(data=DataConfig(decoder=setting))
    assert choose_decoder(config, stored, FakeGroup(Ranks(), everywhere), CPU) == expected


def test_a_missing_native_decoder_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(data=DataConfig(decoder="native"))
    set_native(monkeypatch, True)
    with pytest.raises(ConfigError, match=r"data\.decoder=native: another rank .*libjpeg-dev.*pip install"):
        choose_decoder(config, None, FakeGroup(Ranks(), False), CPU)
    set_native(monkeypatch, False)
    with pytest.raises(ConfigError, match=r"data\.decoder=native: .*libjpeg-dev.*pip install"):
        check_decoder(config)


@pytest.mark.parametrize(
    ("setting", "chosen", "stored", "here", "starts"),
    [
        ("auto", "native", None, True, []),
        ("auto", "native", "native", True, []),
        ("pillow", "pillow", None, False, []),
        ("pillow", "pillow", "pillow", True, []),
        ("auto", "pillow", None, False, ["NOTE: Pillow decodes the JPEGs, at less than half the speed"]),
        ("auto", "pillow", "pillow", False, ["NOTE: Pillow decodes the JPEGs, at less than half the speed"]),
        ("auto", "pillow", None, True, ["NOTE: Pillow decodes the JPEGs, because another rank"]),
        (
            "auto",
            "pillow",
            "pillow",
            True,
            ["NOTE: Pillow decodes the JPEGs, as at the start of this run. data.decoder=native"],
        ),
        ("auto", "pillow", "native", False, ["WARNING: this run has decoded JPEGs with native", "NOTE: "]),
        ("pillow", "pillow", "native", True, ["WARNING: this run has decoded JPEGs with native"]),
        ("native", "native", "pillow", True, ["WARNING: this run has decoded JPEGs with pillow"]),
    ],
)
def test_decoder_lines_are_printed_once_and_only_for_jpegs(
    setting: str,
    chosen: str,
    stored: str | None,
    here: bool,
    starts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_native(monkeypatch, here)
    lines = list(decoder_lines(setting, chosen, stored, JPEGS))
    assert len(lines) == len(starts)
    assert all(line.startswith(start) and "\n" not in line for line, start in zip(lines, starts, strict=True))
    text = "".join(lines)
    assert ("libjpeg-dev" in text) == (not here and setting == "auto")
    assert ("at most 1 level" in text) == (stored not in (None, chosen))
    assert list(decoder_lines(setting, chosen, stored, OneFile("class/x.png"))) == []


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Write six JPEGs of two classes for training, and four for validation."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for number in range(count):
            path = tmp_path / "data" / split / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(file, "JPEG")
            path.write_bytes(file.getvalue())
    return tmp_path / "data"


def train(root: Path, directory: Path, **changes: Any) -> None:
    session.train(prepare(small_run(root, directory, **changes)), Ranks(), Invocation(("lars-train",)))


def small_run(root: Path, directory: Path, **changes: Any) -> Config:
    values = {
        "seed": 3,
        "epochs": 2,
        "device": "cpu",
        "micro_batch": 2,
        "batch": {"size": 2},
        "recipe": {"rows": {"32k": {}}},
        "run": {"dir": str(directory)},
        "data": {"name": "folder", "root": str(root), "image_size": 32, "workers": 0},
        "model": {"name": "small", "ghost_batch": 2},
        "optimizer": {"lr": 1.0, "trust_coef": 0.01, "weight_decay": 0.001},
        "schedule": {"warmup_epochs": 0.0},
        "precision": {"name": "fp32"},
        "launch": {"threads": 1},
    }
    raw = OmegaConf.merge(OmegaConf.structured(Config), values)
    for key, value in changes.items():
        OmegaConf.update(raw, key.replace("__", "."), value)
    assert isinstance(raw, DictConfig)
    return resolve(raw)


def decoders(directory: Path) -> list[str]:
    return [start["resolved"]["decoder"] for start in json.loads((directory / "run.json").read_text())["started"]]


def test_mode_evaluate_uses_the_configured_decoder(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(photographs, tmp_path / "run", max_updates=1)
    asked: list[str] = []
    whole = session.evaluate_split

    def seen(network: nn.Module, spec: EvalSpec, *arguments: Any, **options: Any) -> Any:
        asked.append(spec.decoder)
        return whole(network, replace(spec, decoder="pillow"), *arguments, **options)

    monkeypatch.setattr(session, "evaluate_split", seen)
    config = small_run(photographs, tmp_path / "run", mode="evaluate", checkpoint__path=str(tmp_path / "run"))
    capsys.readouterr()
    for here, setting, expected in [(True, "auto", "native"), (True, "pillow", "pillow"), (False, "auto", "pillow")]:
        set_native(monkeypatch, here)
        chosen, content = session.evaluation_config(config, ())
        chosen.data.decoder = setting
        session.evaluate_only(chosen, content, Ranks())
        assert asked.pop() == expected
        assert capsys.readouterr().err.count("libjpeg-dev") == (not here)
    set_native(monkeypatch, False)
    chosen.data.decoder = "native"
    with pytest.raises(ConfigError, match=r"data\.decoder=native"):
        session.evaluate_only(chosen, content, Ranks())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(directory / "checkpoints")
    assert found is not None
    return dict(found[1]["model"])


@pytest.mark.skipif(native.jpeg is None, reason="the decoder in C was not built")
def test_a_resumed_run_keeps_its_decoder_or_warns(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken, same, other = tmp_path / "unbroken", tmp_path / "same", tmp_path / "other"
    train(photographs, unbroken)
    for directory in (same, other):
        train(photographs, directory, max_updates=2)
    assert "Pillow" not in capsys.readouterr().out
    train(photographs, same)
    assert decoders(same) == ["native", "native"]
    assert all(torch.equal(value, weights(unbroken)[key]) for key, value in weights(same).items())
    set_native(monkeypatch, False)
    capsys.readouterr()
    train(photographs, other)
    output = capsys.readouterr().out
    assert output.count("WARNING: this run has decoded JPEGs with native so far") == 1
    assert output.count("libjpeg-dev") == 1
    assert decoders(other) == ["native", "pillow"]


@pytest.mark.skipif(native.jpeg is None, reason="the decoder in C was not built")
def test_a_run_that_began_with_pillow_keeps_it(photographs: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        set_native(patch, False)
        train(photographs, tmp_path / "run", max_updates=2)
    train(photographs, tmp_path / "run")
    assert decoders(tmp_path / "run") == ["pillow", "pillow"]


def test_a_missing_decoder_is_found_before_anything_is_written(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_native(monkeypatch, False)
    with pytest.raises(ConfigError, match=r"data\.decoder=native"):
        train(photographs, tmp_path / "run", data__decoder="native")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(native.jpeg is None, reason="the decoder in C was not built")
def test_a_run_with_an_unknown_decoder_resumes_with_a_warning(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(resolve_module, "choose_decoder", lambda *arguments: "library")
        train(photographs, tmp_path / "run", max_updates=2)
    capsys.readouterr()
    train(photographs, tmp_path / "run")
    assert (
        capsys.readouterr().out.count("WARNING: this run has decoded JPEGs with library so far, and now uses native")
        == 1
    )
    assert decoders(tmp_path / "run") == ["library", "native"]
