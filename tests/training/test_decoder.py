"""Which decoder a run's JPEGs go through, when it starts and when it goes on, and what is said of it."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from lars_train.config import Config, DataConfig, resolve
from lars_train.data import gpu, library, native
from lars_train.data.source import Source
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.training import checkpoint, session
from lars_train.training import decoder as decoder_module
from lars_train.training.decoder import check_decoder, choose_decoder, decoder_lines
from lars_train.training.distributed import Group
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Among(Group):
    """A rank among others, of whom one has no decoder but Pillow unless `everywhere`."""

    everywhere: bool = True

    def minimum(self, value: int, device: torch.device) -> int:
        return value if self.everywhere else 0


def have(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Have these decoders be here, beside Pillow, and no others."""
    monkeypatch.setattr(native, "is_there", lambda: "native" in names)
    monkeypatch.setattr(library, "is_there", lambda: "library" in names)
    monkeypatch.setattr(gpu, "is_possible", lambda: "gpu" in names)
    monkeypatch.setattr(decoder_module, "_fault_of_gpu", lambda device: None if "gpu" in names else "there is none.")


class Named:
    """A split of one file."""

    labels = np.zeros(1, np.int32)

    def __init__(self, name: str) -> None:
        self._name = name

    def __len__(self) -> int:
        return 1

    def name(self, sample: int) -> str:
        return self._name

    def where(self, sample: int) -> str:
        return self._name

    def read(self, sample: int) -> bytes:
        return b""


JPEGS: Source = Named("class/x.JPEG")


BOTH = ("native", "library")


@pytest.mark.parametrize(
    ("wanted", "stored", "here", "everywhere", "expected"),
    [
        ("auto", None, BOTH, True, "native"),
        ("auto", None, ("library",), True, "library"),
        ("auto", None, ("library", "gpu"), True, "library"),
        ("auto", None, (), True, "pillow"),
        ("auto", None, BOTH, False, "pillow"),
        ("auto", "pillow", BOTH, True, "pillow"),
        ("auto", "native", BOTH, True, "native"),
        ("auto", "library", BOTH, True, "library"),
        ("auto", "native", ("library",), True, "library"),
        ("auto", "library", ("native",), True, "native"),
        ("auto", "native", (), True, "pillow"),
        ("auto", "gpu", ("native", "gpu"), True, "gpu"),
        ("auto", "gpu", ("native",), True, "native"),
        ("auto", "of a later version", BOTH, True, "native"),
        ("pillow", "native", BOTH, True, "pillow"),
        ("native", "pillow", BOTH, True, "native"),
        ("library", "native", BOTH, True, "library"),
        ("gpu", "native", ("gpu",), True, "gpu"),
    ],
)
def test_the_decoder_is_the_config_s_then_the_run_s_first_one_then_the_fastest_and_one_for_all_ranks(
    wanted: str,
    stored: str | None,
    here: tuple[str, ...],
    everywhere: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have(monkeypatch, *here)
    config = Config(data=DataConfig(decoder=wanted))
    # All have Pillow.
    group = Among(Ranks(), everywhere or expected == wanted == "pillow")
    assert choose_decoder(config, stored, group, CPU) == expected


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("native", r"libjpeg-dev.*pip install"),
        ("library", r"pip install 'lars-train\[decode\]'"),
        ("gpu", r"device=cuda and pip install 'lars-train\[decode\]'"),
    ],
)
def test_a_decoder_that_is_wanted_and_not_there_is_refused_with_the_remedy(
    name: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(data=DataConfig(decoder=name))
    have(monkeypatch, name)
    with pytest.raises(ConfigError, match=rf"data\.decoder={name}: another rank .*{remedy}"):
        choose_decoder(config, None, Among(Ranks(), False), CPU)
    have(monkeypatch)
    with pytest.raises(ConfigError, match=rf"data\.decoder={name}: .*{remedy}"):
        check_decoder(config)


def test_the_gpu_is_no_decoder_for_a_run_on_the_cpu_or_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "is_possible", lambda: True)
    config = Config(data=DataConfig(decoder="gpu"), device="cpu")
    with pytest.raises(ConfigError, match=r"data\.decoder=gpu: no GPU can decode here"):
        check_decoder(config)
    config.device = "auto"
    with pytest.raises(ConfigError, match=r"data\.decoder=gpu: no GPU can decode here"):
        choose_decoder(config, None, Group(Ranks()), CPU)
    monkeypatch.setattr(gpu, "fault", lambda device: "it refuses a common JPEG")
    decoder_module._fault_of_gpu.cache_clear()
    monkeypatch.setattr(Among, "minimum", lambda self, value, device: value)
    with pytest.raises(ConfigError, match=r"data\.decoder=gpu: cuda:3 cannot decode: it refuses a common JPEG\. "):
        choose_decoder(config, None, Among(Ranks()), torch.device("cuda", 3))
    decoder_module._fault_of_gpu.cache_clear()


@pytest.mark.parametrize(
    ("wanted", "decided", "stored", "here", "said"),
    [
        ("auto", "native", None, BOTH, []),
        ("auto", "native", "native", BOTH, []),
        ("pillow", "pillow", None, (), []),
        ("pillow", "pillow", "pillow", BOTH, []),
        ("library", "library", None, ("library",), []),
        ("gpu", "gpu", None, ("gpu",), []),
        (
            "auto",
            "library",
            None,
            ("library",),
            ["NOTE: JPEGs are decoded by nvImageCodec; the decoder in C is faster"],
        ),
        (
            "auto",
            "library",
            "library",
            BOTH,
            ["NOTE: JPEGs are decoded by nvImageCodec, as this run began; data.decoder=na"],
        ),
        ("auto", "library", None, BOTH, ["NOTE: JPEGs are decoded by nvImageCodec, for another rank"]),
        ("auto", "library", "native", ("library",), ["WARNING: this run's JPEGs were decoded by native", "NOTE: "]),
        ("auto", "pillow", None, (), ["NOTE: JPEGs are decoded by Pillow, at under half the speed"]),
        ("auto", "pillow", None, BOTH, ["NOTE: JPEGs are decoded by Pillow, for another rank"]),
        (
            "auto",
            "pillow",
            "pillow",
            BOTH,
            ["NOTE: JPEGs are decoded by Pillow, as this run began; data.decoder=native"],
        ),
        (
            "auto",
            "pillow",
            "pillow",
            ("library",),
            ["NOTE: JPEGs are decoded by Pillow, as this run began; data.decoder=li"],
        ),
        ("auto", "pillow", "native", (), ["WARNING: this run's JPEGs were decoded by native", "NOTE: "]),
        ("pillow", "pillow", "native", BOTH, ["WARNING: this run's JPEGs were decoded by native"]),
        ("native", "native", "pillow", BOTH, ["WARNING: this run's JPEGs were decoded by pillow"]),
        ("gpu", "gpu", "native", (*BOTH, "gpu"), ["WARNING: this run's JPEGs were decoded by native"]),
        ("auto", "native", "gpu", BOTH, ["WARNING: this run's JPEGs were decoded by gpu"]),
    ],
)
def test_what_changes_or_is_missing_is_said_once_a_start_and_only_of_jpegs(
    wanted: str,
    decided: str,
    stored: str | None,
    here: tuple[str, ...],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have(monkeypatch, *here)
    lines = list(decoder_lines(wanted, decided, stored, JPEGS))
    assert len(lines) == len(said)
    assert all(line.startswith(start) and "\n" not in line for line, start in zip(lines, said, strict=True))
    told = "".join(lines)
    fastest_here = decided == (here[0] if here else "pillow")
    assert ("libjpeg-dev" in told) == ("native" not in here and wanted == "auto" and fastest_here)
    assert ("lars-train[decode]" in told) == (not here and wanted == "auto")
    changed_on_the_cpu = stored not in (None, decided) and "gpu" not in (stored, decided)
    assert ("at most 1 level" in told) == changed_on_the_cpu
    assert list(decoder_lines(wanted, decided, stored, Named("class/x.png"))) == []


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Six JPEGs of two classes to train on, four to evaluate."""
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


def test_an_evaluation_alone_uses_the_decoder_that_the_config_names(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(photographs, tmp_path / "run", max_updates=1)
    asked: list[str] = []
    whole = session.evaluate_split

    def seen(*arguments: Any, **options: Any) -> Any:
        asked.append(options["decoder"])
        return whole(*arguments, **{**options, "decoder": "pillow"})

    monkeypatch.setattr(session, "evaluate_split", seen)
    config = small_run(photographs, tmp_path / "run", mode="evaluate", checkpoint__path=str(tmp_path / "run"))
    capsys.readouterr()
    cases = [(BOTH, "auto", "native"), (BOTH, "pillow", "pillow"), ((), "auto", "pillow"), (BOTH, "library", "library")]
    for here, wanted, expected in cases:
        have(monkeypatch, *here)
        chosen, content = session.evaluation_config(config, ())
        chosen.data.decoder = wanted
        session.evaluate_only(chosen, content, Ranks())
        assert asked.pop() == expected
        assert capsys.readouterr().err.count("libjpeg-dev") == (not here)
    have(monkeypatch)
    chosen.data.decoder = "native"
    with pytest.raises(ConfigError, match=r"data\.decoder=native"):
        session.evaluate_only(chosen, content, Ranks())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(directory / "checkpoints")
    assert found is not None
    return dict(found[1]["model"])


@pytest.mark.skipif(native.jpeg is None, reason="the decoder in C was not built")
def test_a_continuation_keeps_the_decoder_and_its_weights_and_says_where_it_cannot(
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
    have(monkeypatch)
    capsys.readouterr()
    train(photographs, other)
    said = capsys.readouterr().out
    assert said.count("WARNING: this run's JPEGs were decoded by native so far") == 1
    assert said.count("libjpeg-dev") == 1
    assert decoders(other) == ["native", "pillow"]


@pytest.mark.skipif(native.jpeg is None, reason="the decoder in C was not built")
def test_a_run_that_began_with_pillow_goes_on_with_it(photographs: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        have(patch)
        train(photographs, tmp_path / "run", max_updates=2)
    train(photographs, tmp_path / "run")
    assert decoders(tmp_path / "run") == ["pillow", "pillow"]


@pytest.mark.skipif(library.nvimgcodec() is None, reason="nvImageCodec is not installed")
def test_a_run_by_the_library_goes_on_with_it_and_tells_of_its_share(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(native, "is_there", lambda: False)
        train(photographs, tmp_path / "run", max_updates=2)
    train(photographs, tmp_path / "run")
    assert decoders(tmp_path / "run") == ["library", "library"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["loader/fast_share"] for line in lines if "loader/fast_share" in line} == {1.0}


@pytest.mark.parametrize("name", ["native", "library", "gpu"])
def test_a_decoder_wanted_and_not_there_is_found_before_anything_is_written(
    name: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch)
    with pytest.raises(ConfigError, match=rf"data\.decoder={name}"):
        train(photographs, tmp_path / "run", data__decoder=name)
    assert not (tmp_path / "run").exists()
