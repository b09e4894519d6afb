"""Checkpoints are atomic, verified, and refused if anything about them is damaged."""

from __future__ import annotations

import os
import random
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lars_train.errors import ConfigError
from lars_train.monitoring.noise import NoiseScale
from lars_train.training import checkpoint
from lars_train.training.checkpoint import (
    DamagedCheckpoint,
    RunState,
    find,
    latest,
    listing,
    load,
    remove_later,
    save,
    verify,
)


def content(update: int) -> dict[str, Any]:
    return {
        "update": update,
        "model": {"w": torch.arange(6.0).view(2, 3) + update, "h": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.full((4,), update, dtype=torch.float64)}}},
        "best_top1": 12.5,
        "bad": {"a.jpg": "truncated"},
        "classes": ["cat", "dog"],
        "none": None,
        "config": {"model": {"name": "small"}},
        "plan": {"updates_per_epoch": 4},
        "fingerprint": "0123456789abcdef",
    }


def same(got: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return isinstance(got, torch.Tensor) and got.dtype == expected.dtype and torch.equal(got, expected)
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[k], v) for k, v in expected.items())
    return bool(got == expected)


def written(folder: Path, *updates: int, keep: int = 99) -> list[Path]:
    return [save(folder, update, content(update), keep) for update in updates]


def test_a_checkpoint_loads_as_it_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 120, content(120), keep=3)
    assert path == tmp_path / "checkpoints" / "update-000000120.pt"
    loaded = load(path)
    assert loaded.pop("format") == checkpoint.FORMAT
    assert same(loaded, content(120))
    assert same(torch.load(path, weights_only=True)["model"], content(120)["model"])


def run_state() -> RunState:
    return RunState(50.0, 7, 3.0, {"a.jpg": "torn"}, [{"to_update": 4}], NoiseScale(2, 1.0, 3.0), 0.25)


def test_a_run_state_survives_a_checkpoint(tmp_path: Path) -> None:
    stored = load(save(tmp_path, 1, {**content(1), **run_state().stored()}, keep=1))
    restored = RunState()
    restored.restore(stored)
    assert restored.seconds >= 3.0
    assert replace(restored, seconds=3.0) == run_state()


def test_a_rollback_keeps_time_energy_bad_images_and_rollbacks() -> None:
    state = run_state()
    state.restore(RunState(40.0, 6, 1.0).stored(), rollback=True)
    assert state == replace(run_state(), best_top1=40.0, best_update=6, noise=NoiseScale())


# An older checkpoint has no energy (tests/monitoring/test_energy.py).
@pytest.mark.parametrize("key", [each.name for each in fields(RunState) if each.name != "kwh"])
def test_a_missing_field_of_the_run_state_is_named(key: str) -> None:
    stored = run_state().stored()
    del stored[key]
    with pytest.raises(ConfigError, match=f"the checkpoint has no {key},"):
        RunState().restore(stored)


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "update-9-weights.pth").write_text("mine too")
    paths = written(tmp_path, 9, 10, 100, 1000, keep=2)
    assert listing(tmp_path) == paths[2:]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "notes.txt",
        "update-000000100.pt",
        "update-000001000.pt",
        "update-9-weights.pth",
    ]


def test_saving_an_update_again_replaces_it(tmp_path: Path) -> None:
    written(tmp_path, 5)
    save(tmp_path, 5, {**content(5), "best_top1": 99.0}, keep=3)
    assert len(listing(tmp_path)) == 1
    assert load(listing(tmp_path)[0])["best_top1"] == 99.0


def test_remove_later_keeps_earlier_checkpoints(tmp_path: Path) -> None:
    paths = written(tmp_path, 5, 10, 15)
    remove_later(tmp_path, 10)
    assert listing(tmp_path) == paths[:2]
    remove_later(tmp_path / "missing", 10)


def test_remove_later_drops_partial_files_not_newer_formats(tmp_path: Path) -> None:
    one, two, three = written(tmp_path, 1, 2, 3)
    torch.save({"format": 99}, two)
    (tmp_path / "update-000000009.partial").write_bytes(b"half")
    remove_later(tmp_path, 1)
    assert sorted(tmp_path.iterdir()) == [one, two]
    assert not three.exists()


def test_if_no_checkpoint_is_usable_each_is_named_with_a_reason(tmp_path: Path) -> None:
    one, two = written(tmp_path, 1, 2)
    one.write_bytes(b"")
    torch.save({"format": 99}, two)
    with pytest.raises(ConfigError) as caught:
        latest(tmp_path, warn=False)
    message = str(caught.value)
    assert "update-000000002.pt: a newer lars-train wrote it (format 99" in message
    assert "update-000000001.pt: it is not a complete archive" in message
    assert "use that newer lars-train, or start over with resume=never" in message


@pytest.mark.parametrize("step", ["fsync", "verify", "replace"])
def test_a_crash_while_saving_leaves_the_previous_checkpoint(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written(tmp_path, 1)

    def crash(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "verify":
            patch.setattr(checkpoint, "verify", crash)
        else:
            patch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[step], crash)
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path, 2)
    assert (tmp_path / "update-000000002.partial").exists()
    assert listing(tmp_path) == before
    found = latest(tmp_path)
    assert found is not None
    assert found[1]["update"] == 1
    # The partial file does not prevent the next attempt.
    written(tmp_path, 2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["update-000000001.pt", "update-000000002.pt"]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(tmp_path, 1, keep=1)

    def short(file: Any) -> None:
        # Only the first bytes reach the disk.
        os.truncate(tmp_path / "update-000000002.partial", 100)

    monkeypatch.setattr(os, "fsync", short)
    with pytest.raises(DamagedCheckpoint):
        written(tmp_path, 2, keep=1)
    # The partial file is removed too: the next checkpoint needs its space.
    assert list(tmp_path.iterdir()) == before


def test_a_flipped_bit_in_any_record_is_found(tmp_path: Path) -> None:
    (path,) = written(tmp_path, 3)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    assert len(records) >= 5
    for record in records:
        if record.file_size == 0:
            continue
        head = record.header_offset
        start = head + 30 + sum(int.from_bytes(whole[head + k : head + k + 2], "little") for k in (26, 28))
        for offset in (0, record.file_size // 2, record.file_size - 1):
            broken = bytearray(whole)
            broken[start + offset] ^= 0x10
            path.write_bytes(broken)
            with pytest.raises(DamagedCheckpoint, match="checksum"):
                verify(path)
            with pytest.raises(DamagedCheckpoint):
                load(path)


def test_a_flipped_bit_anywhere_is_found_or_harmless(tmp_path: Path) -> None:
    path = save(tmp_path, 3, content(3), keep=1)
    whole = path.read_bytes()
    expected = load(path)
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    draw = random.Random(1)
    flips = [(i, 1 << draw.randrange(8)) for i in range(directory, len(whole))]
    flips += [(i, 8) for i in range(directory, len(whole))]  # turns "stored" into "deflated"
    flips += [(draw.randrange(directory), 1 << draw.randrange(8)) for _ in range(150)]
    caught = 0
    for offset, bit in flips:
        broken = bytearray(whole)
        broken[offset] ^= bit
        path.write_bytes(broken)
        try:
            loaded = load(path)
        except DamagedCheckpoint:
            caught += 1
            continue
        assert same(loaded, expected), (offset, bit)
    assert caught > len(flips) // 4


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_damaged(share: float, tmp_path: Path) -> None:
    (path,) = written(tmp_path, 3)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(DamagedCheckpoint, match=r"not a complete archive|no checksum at its end"):
        load(path)


def zipped(path: Path, **records: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name.replace("__", "/").replace("_pkl", ".pkl"), data)


def test_files_that_are_not_checkpoints_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "update-000000001.pt"
    path.write_text("not an archive\n")
    with pytest.raises(DamagedCheckpoint, match="not a complete archive"):
        load(path)
    zipped(path, readme=b"an archive, but not of torch")
    with pytest.raises(DamagedCheckpoint, match="torch cannot read it"):
        load(path)
    zipped(path, a__data_pkl=b"", a__version=b"3\n")
    with pytest.raises(DamagedCheckpoint, match="torch cannot read it"):
        load(path)
    zipped(path)
    with pytest.raises(DamagedCheckpoint):
        load(path)
    for value in (torch.ones(3), [1, 2], {"state_dict": torch.ones(3)}, {"format": "x"}):
        torch.save(value, path)
        with pytest.raises(DamagedCheckpoint, match="not a checkpoint of lars-train"):
            load(path)
    torch.save({"format": checkpoint.FORMAT, "update": 3, "model": {}}, path)
    with pytest.raises(DamagedCheckpoint, match="it lacks classes, config, fingerprint, optimizer, plan"):
        load(path)


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "update-000000001.pt"
    torch.save({"format": checkpoint.FORMAT + 1}, path)
    with pytest.raises(DamagedCheckpoint, match="newer lars-train"):
        load(path)


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trace, path = tmp_path / "ran", tmp_path / "update-000000001.pt"
    torch.save({"format": 1, "update": Hostile(trace)}, path)
    with pytest.raises(DamagedCheckpoint, match="torch cannot read it"):
        load(path)
    with pytest.raises(ConfigError, match="cannot be used"):
        find(str(path))
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the pickle does run code if it is loaded


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = written(tmp_path, 1, 2, 3)
    paths[2].write_bytes(paths[2].read_bytes()[:-40])
    paths[1].write_bytes(b"")
    found = latest(tmp_path)
    assert found is not None
    assert found[0] == paths[0]
    assert found[1]["update"] == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert [str(p) in output.err for p in paths] == [False, True, True]
    assert output.err.count("is damaged") == 2


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(tmp_path: Path) -> None:
    for path in written(tmp_path, 1, 2):
        path.write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"no checkpoint in .* can be used .*update-000000002.pt.*resume=never"):
        latest(tmp_path)


def test_latest_is_none_without_checkpoints(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None
    (tmp_path / "update-000000007.partial").write_bytes(b"PK")
    assert latest(tmp_path) is None


def test_a_path_means_a_file_a_run_directory_or_its_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    first, second = written(folder, 1, 2)
    assert find(str(first))[1]["update"] == 1
    for path in (tmp_path, folder, second):
        found, loaded = find(str(path))
        assert (found, loaded["update"]) == (second, 2)


def test_a_tilde_in_a_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (path,) = written(tmp_path / "run", 4)
    assert find("~/run")[0] == path


def test_a_wrong_path_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.path=.*missing: no such file"):
        find(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        find(str(tmp_path))
    damaged = tmp_path / "x.pt"
    damaged.write_text("text")
    with pytest.raises(ConfigError, match=r"checkpoint.path=.*x.pt: the file cannot be used: "):
        find(str(damaged))
