"""Bad input is refused before a run writes anything, and a checkpoint is used only if it fits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from lars_train.config import Config
from lars_train.data.dataset import fingerprint
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.training import session
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation
from lars_train.training.session import find_finished


def config(directory: Path, **changes: Any) -> Config:
    return tiny({"max_updates": 1, "run": {"dir": str(directory)}}, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    threads = torch.get_num_threads()
    session.train(prepare(config(directory)), Ranks(), Invocation())
    torch.set_num_threads(threads)
    return directory


def test_preparing_writes_nothing(tmp_path: Path) -> None:
    prepared = prepare(config(tmp_path / "a" / "run"))
    assert prepared.directory == tmp_path / "a" / "run"
    assert (len(prepared.dataset.train), prepared.plan.updates, prepared.start_from) == (24, 6, None)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_fits_is_read(trained: Path, tmp_path: Path) -> None:
    start = prepare(config(tmp_path / "run", checkpoint__path=str(trained))).start_from
    assert start is not None
    assert start["update"] == 1
    # The length of the run and its rates may differ.
    prepare(config(tmp_path / "run", checkpoint__path=str(trained), epochs=5, optimizer__lr=0.1))
    prepare(config(tmp_path / "run", checkpoint__path=str(trained), optimizer__clip="lr", optimizer__nesterov=True))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model__name": "resnet20"}, r"the checkpoint holds model small, not resnet20; choose model=small"),
        ({"data__num_classes": 5}, r"another data set: it has 4 classes .* the chosen data set has 5"),
        ({"data__train_count": 25}, r"file names or labels differ"),
        ({"batch__size": 4}, r"update 1 of a run with 3 updates per epoch does not fit this run"),
        (
            {"optimizer__base": "AdamW"},
            r"state comes from a run with optimizer\.base=SGD.* optimizer\.base=AdamW.* model\.weights",
        ),
        ({"optimizer__decay_norm_bias": False}, r"optimizer\.decay_norm_bias=True.* use the same value"),
        ({"optimizer__adapt_norm_bias": False}, r"optimizer\.adapt_norm_bias=True.* use the same value"),
        ({"optimizer__preset": "mlperf"}, r"optimizer\.lr_placement=outside.* use the same value"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    changes: dict[str, Any], reason: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        prepare(config(tmp_path / "run", checkpoint__path=str(trained), **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_data_changed_does_not_resume(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The config and the directory are the same, but the files are not.
    monkeypatch.setattr("lars_train.data.sources.builtin.fingerprint", lambda *given: fingerprint(*given)[::-1])
    prepared = prepare(config(trained, max_updates=2))
    before = contents(trained)
    with pytest.raises(ConfigError, match=r"file names or labels differ.*resume=never"):
        session.train(prepared, Ranks(), Invocation())
    assert contents(trained) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_with_only_damaged_checkpoints_is_unchanged(trained: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(trained, directory)
    for path in (directory / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    before = contents(directory)
    with pytest.raises(ConfigError, match=r"no checkpoint in .* can be used"):
        session.train(prepare(config(directory, max_updates=2)), Ranks(), Invocation())
    assert contents(directory) == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"optimizer__base": "Adan"}, r"torch\.optim has no such class"),
        ({"data__root": "/x"}, r"data\.root=/x has no effect with data=synthetic"),
        ({"batch__size": 10}, r"not a multiple of the ghost batch"),
        ({"micro_batch": 6}, r"micro_batch=6 is not a multiple"),
        (
            {"batch__size": 1, "batch__scaled": False, "optimizer__lr": 1.0, "data__image_size": 4},
            r"^batch\.size=1: .* one pixel .* at least 2",
        ),
        ({"model__ghost_batch": 1, "data__image_size": 4}, r"model\.ghost_batch=1: .* one pixel .* at least 2"),
        ({"model__name": "resnet51"}, r"resnet51"),
        ({"model__weights": "/missing.pth"}, r"model\.weights=/missing\.pth"),
        ({"checkpoint__path": "/missing"}, r"checkpoint\.path=/missing: no such file"),
    ],
)
def test_bad_input_is_found_before_anything_is_written(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        prepare(config(tmp_path / "run", **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_another_run_is_refused(trained: Path) -> None:
    assert find_finished(prepare(config(trained))) is not None
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        find_finished(prepare(config(trained, seed=1)))
