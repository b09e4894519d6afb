"""Checkpoints written in the background are complete and in order, and no disk failure ends the run."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lars_train.training import checkpoint
from lars_train.training.checkpoint import listing, load
from lars_train.training.checkpoint_writer import CheckpointWriter, host_copy


def content(update: int) -> dict[str, Any]:
    return {
        "update": update,
        "model": {"w": torch.full((3,), float(update))},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"params": [0], "lr": 0.1}]},
        "config": {},
        "plan": {},
        "classes": ["a"],
        "fingerprint": "f",
    }


def test_a_checkpoint_has_the_values_at_the_time_of_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, save = threading.Event(), checkpoint.save

    def held(*arguments: Any) -> Path:
        assert gate.wait(30)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", held)
    writer = CheckpointWriter(tmp_path, keep=3)
    values = content(1)
    writer.save(1, values)
    # Training continues meanwhile.
    values["model"]["w"].fill_(99.0)
    values["optimizer"]["state"][0]["momentum_buffer"].fill_(99.0)
    values["optimizer"]["param_groups"][0]["lr"] = 99.0
    assert listing(tmp_path) == []
    gate.set()
    writer.close()
    loaded = load(listing(tmp_path)[0])
    assert loaded["model"]["w"].tolist() == [1.0] * 3
    assert loaded["optimizer"]["state"][0]["momentum_buffer"].tolist() == [1.0, 1.0]
    assert loaded["optimizer"]["param_groups"] == [{"params": [0], "lr": 0.1}]


def test_best_pt_is_kept_when_later_checkpoints_are_written(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    for update in (1, 2, 3, 4, 5):
        writer.save(update, content(update))
        if update in (1, 2):
            writer.keep_best(update)
    writer.close()
    assert [load(path)["update"] for path in listing(tmp_path)] == [4, 5]
    assert load(tmp_path / "best.pt")["update"] == 2
    assert not list(tmp_path.glob("*.partial"))


def test_best_pt_is_copied_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*arguments: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    test_best_pt_is_kept_when_later_checkpoints_are_written(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("failed writing")])
def test_a_failed_write_is_counted_and_the_last_checkpoint_stays(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(1, content(1))
    writer.wait()

    def full(*arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        for update in (2, 3):
            writer.save(update, content(update))
            writer.keep_best(update)
        writer.wait()
    assert writer.failures == 2
    assert "the checkpoint of update 3 cannot be written" in writer.reason
    assert [load(path)["update"] for path in listing(tmp_path)] == [1]
    writer.save(4, content(4))
    writer.close()
    assert (writer.failures, writer.reason) == (2, "")
    assert [load(path)["update"] for path in listing(tmp_path)] == [1, 4]


def test_a_host_copy_shares_no_memory() -> None:
    tensor = torch.ones(2)
    value = {"a": [tensor, 1], "b": (tensor, "x"), "c": None}
    copied = host_copy(value)
    tensor.zero_()
    assert copied["a"][0].tolist() == copied["b"][0].tolist() == [1.0, 1.0]
    assert (copied["a"][1], copied["b"][1], copied["c"]) == (1, "x", None)


def test_best_pt_is_retried_after_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = CheckpointWriter(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "keep_best", full)
        writer.save(1, content(1))
        writer.keep_best(1)
        writer.save(2, content(2))
        writer.wait()
        assert writer.reason == "best.pt cannot be written: No space left on device"
        # The best checkpoint stays next to the last one until best.pt can be written.
        assert [load(path)["update"] for path in listing(tmp_path)] == [1, 2]
    writer.save(3, content(3))
    writer.save(4, content(4))
    writer.close()
    assert (writer.reason, writer.best_lost) == ("", None)
    assert load(tmp_path / "best.pt")["update"] == 1
    assert [load(path)["update"] for path in listing(tmp_path)] == [4]


def test_a_rollback_forgets_a_best_pt_that_was_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = CheckpointWriter(tmp_path, keep=3)
    writer.save(1, content(1))
    writer.keep_best(1)
    writer.save(2, content(2))
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "keep_best", full)
        writer.keep_best(2)
        writer.wait()
    writer.roll_back(1, best_update=1)
    assert (writer.reason, writer.best_lost) == ("", None)
    writer.save(2, content(2))
    writer.close()
    assert (writer.reason, writer.best_lost) == ("", None)
    assert load(tmp_path / "best.pt")["update"] == 1
