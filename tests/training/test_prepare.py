from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from lars_train.config import Config, resolve
from lars_train.data.source import fingerprint
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.training import checkpoint, session
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation
from lars_train.training.session import find_finished

TINY: dict[str, Any] = {
    "epochs": 2,
    "max_updates": 1,
    "device": "cpu",
    "batch": {"size": 8},
    "recipe": {"rows": {"32k": {}}},
    "data": {
        "name": "synthetic",
        "image_size": 8,
        "augment": "none",
        "eval_crop": 1.0,
        "train_count": 24,
        "val_count": 4,
        "num_classes": 4,
    },
    "model": {"name": "small", "ghost_batch": 4},
    "optimizer": {"lr": 1.0},
    "precision": {"name": "fp32"},
    "launch": {"threads": 1},
}


def config(directory: Path, **changes: Any) -> Config:
    raw = OmegaConf.merge(OmegaConf.structured(Config), TINY, {"run": {"dir": str(directory)}})
    for key, value in changes.items():
        OmegaConf.update(raw, key.replace("__", "."), value)
    assert isinstance(raw, DictConfig)
    return resolve(raw)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    threads = torch.get_num_threads()
    session.train(prepare(config(directory)), Ranks(), Invocation())
    torch.set_num_threads(threads)
    return directory


def test_checking_writes_nothing(tmp_path: Path) -> None:
    prepared = prepare(config(tmp_path / "a" / "run"))
    assert prepared.directory == tmp_path / "a" / "run"
    assert (len(prepared.dataset.train), prepared.plan.updates, prepared.start_from) == (24, 6, None)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_fits_is_read(trained: Path, tmp_path: Path) -> None:
    start = prepare(config(tmp_path / "run", checkpoint__path=str(trained))).start_from
    assert start is not None
    assert start["update"] == 1
    # Another length and other rates may be chosen.
    prepare(config(tmp_path / "run", checkpoint__path=str(trained), epochs=5, optimizer__lr=0.1))
    prepare(config(tmp_path / "run", checkpoint__path=str(trained), optimizer__clip="lr", optimizer__nesterov=True))


def test_a_checkpoint_of_an_older_version_which_had_fewer_options_is_read(trained: Path, tmp_path: Path) -> None:
    path = next((trained / "checkpoints").glob("update-*.pt"))
    content = checkpoint.load(path)
    for key in ("adapt_norm_bias", "lr_placement", "preset", "nesterov"):
        del content["config"]["optimizer"][key]
    del content["config"]["schedule"]["warmup_start"]
    older = checkpoint.save(tmp_path / "checkpoints", 1, content, keep=1)
    assert prepare(config(tmp_path / "run", checkpoint__path=str(older))).start_from is not None
    asked = config(tmp_path / "run", mode="evaluate", checkpoint__path=str(older))
    assert session.evaluation_config(asked, ())[0].optimizer.eps == asked.optimizer.eps
    with pytest.raises(ConfigError, match=r"optimizer\.adapt_norm_bias=True"):
        prepare(config(tmp_path / "run", checkpoint__path=str(older), optimizer__adapt_norm_bias=False))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model__name": "resnet20"}, r"the checkpoint is of model small, not resnet20: choose model=small"),
        ({"data__num_classes": 5}, r"another data set: it has 4 classes .* the chosen one 5"),
        ({"data__train_count": 25}, r"file names or labels differ"),
        ({"batch__size": 4}, r"update 1 of a run with 3 updates per epoch, which is no position of this one"),
        ({"optimizer__base": "AdamW"}, r"state of optimizer\.base=SGD.* optimizer\.base=AdamW.* model\.weights"),
        ({"optimizer__decay_norm_bias": False}, r"optimizer\.decay_norm_bias=True.* choose the same"),
        ({"optimizer__adapt_norm_bias": False}, r"optimizer\.adapt_norm_bias=True.* choose the same"),
        ({"optimizer__preset": "mlperf"}, r"optimizer\.lr_placement=outside.* choose the same"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    changes: dict[str, Any], reason: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        prepare(config(tmp_path / "run", checkpoint__path=str(trained), **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_data_have_changed_does_not_go_on(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The config is the same and so is the directory; the files are not.
    monkeypatch.setattr("lars_train.data.synthetic.fingerprint", lambda *given: fingerprint(*given)[::-1])
    prepared = prepare(config(trained, max_updates=2))
    before = contents(trained)
    with pytest.raises(ConfigError, match=r"file names or labels differ.*resume=never"):
        session.train(prepared, Ranks(), Invocation())
    assert contents(trained) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(trained: Path, tmp_path: Path) -> None:
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
        ({"data__root": "/x"}, r"data\.root=/x has no meaning with data=synthetic"),
        ({"batch__size": 10}, r"no multiple of the ghost batch"),
        ({"micro_batch": 6}, r"micro_batch=6 is no multiple"),
        ({"model__ghost_batch": 1, "data__image_size": 4}, r"model\.ghost_batch=1: .* one pixel .* at least 2"),
        ({"model__name": "resnet51"}, r"resnet51"),
        ({"model__weights": "/missing.pth"}, r"model\.weights=/missing\.pth"),
        ({"checkpoint__path": "/missing"}, r"checkpoint\.path=/missing: there is no such file"),
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
