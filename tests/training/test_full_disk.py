"""If any write of a run fails, its error and its directory report that, and the run can resume."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from lars_train.errors import ConfigError, DataError
from lars_train.launch import Ranks
from lars_train.monitoring.fields import TIMING_FIELDS
from lars_train.report.read import read_run
from lars_train.training import checkpoint, session
from lars_train.training.prepare import prepare
from lars_train.training.run import Run
from lars_train.training.run_directory import Invocation

# Two updates, with a checkpoint and an evaluation after each.
SETTINGS: dict[str, Any] = {
    "log_every": 1,
    "data": {"train_count": 8, "num_classes": 2},
    "model": {"ghost_batch": 8},
    "schedule": {"warmup_epochs": 0},
}


class Disk:
    """Observes each write below `folder`: files opened for writing, renamed, linked, created or synced."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.watch(None)

    def watch(self, folder: Path | None, fails_at: str = "", how: str = "full") -> None:
        """Let the write `fails_at` fail, or its Nth occurrence with ``#N``. `how` selects which later writes fail, too.

        ``full``: all until the run removes its reserve file; ``dying``: all; ``once``: none.
        """
        self.folder, self.how, self.fails, self.seen = folder, how, False, list[str]()
        self.fails_at, _, count = fails_at.partition(" #")
        self.count = int(count or 1)
        self.number = errno.ENOSPC if how == "full" else errno.EIO

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | Path):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.write("open", arguments[0])
        elif event in ("os.rename", "os.link"):
            self.write(event[3:], arguments[1])
        elif event == "os.mkdir":
            self.write("mkdir", arguments[0])
        elif event == "os.remove" and self.how == "full":
            name = Path(os.fsdecode(arguments[0])).name
            self.fails = self.fails and not name.startswith((".reserve", ".final.json", ".run.json"))

    def write(self, what: str, place: str | bytes | Path) -> None:
        path = Path(os.fsdecode(place))
        if self.folder is None or not path.is_relative_to(self.folder):
            return
        name = re.sub(r"tfevents.*", "tfevents", re.sub("[0-9]+", "N", str(path.relative_to(self.folder))))
        self.seen.append(f"{what} {name}")
        now = self.seen[-1] == self.fails_at and self.seen.count(self.fails_at) == self.count
        self.fails = self.fails or (now and self.how != "once")
        if now or self.fails:
            # Like the error of the system, which has no file name for a sync.
            raise OSError(self.number, os.strerror(self.number), *(() if what == "fsync" else (str(path),)))


DISK = Disk()
FSYNC = os.fsync


def fsync(handle: int) -> None:
    DISK.write("fsync", Path(f"/proc/self/fd/{handle}").readlink())
    FSYNC(handle)


@pytest.fixture(scope="module", autouse=True)
def audit_hook() -> Iterator[None]:
    sys.addaudithook(DISK.hook)
    threads = torch.get_num_threads()
    yield
    DISK.watch(None)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fsync)


def train(directory: Path) -> dict[str, Any]:
    config = tiny(SETTINGS, {"run": {"dir": str(directory)}})
    return session.train(prepare(config), Ranks(), Invocation(("lars-train",)))


def logged(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / name).read_text().splitlines()]
    left_out = {*TIMING_FIELDS, "train/checkpoint_failures"}
    return [{k: v for k, v in line.items() if k not in left_out} for line in found]


def checked(directory: Path, fails_at: str, how: str) -> Exception | None:
    """Train on a failing disk, assert that the directory agrees with the error, and return the error."""
    DISK.watch(directory, fails_at, how)
    raised: Exception | None = None
    try:
        final = train(directory)
    except (ConfigError, DataError) as error:
        raised = error
    finally:
        DISK.folder = None
    assert DISK.seen.count(DISK.fails_at) >= DISK.count, f"the run has no write {fails_at}: {DISK.seen}"
    if not (directory / "run.json").exists():
        assert raised is not None
        assert not (directory / "final.json").exists()
        return raised
    run = read_run(directory)
    if raised is None:
        ended = json.loads((directory / "run.json").read_text())["started"][-1]["ended"]
        assert (run.state, run.problems) == ("finished", tuple(ended.get("incomplete", ())))
        assert final == json.loads((directory / "final.json").read_text())
        return None
    assert not (directory / "final.json").exists()
    assert os.strerror(DISK.number) in str(raised), raised
    # A dying disk cannot record the end of the run either.
    assert run.state == "failed" or (how == "dying" and (run.state, run.reason) == ("unfinished", UNKNOWN))
    if run.state == "failed":
        assert os.strerror(DISK.number) in run.reason
    return raised


UNKNOWN = "killed or still running"
BEFORE = """mkdir . | open .lock | open ..reserve.N | fsync ..reserve.N | rename .reserve | fsync . | open .run.json.N |
rename run.json | mkdir .hydra | open .hydra/.config.yaml.N | fsync .hydra/.hydra.yaml.N |
rename .hydra/overrides.yaml | fsync .hydra | open .config.yaml.N | rename config.yaml | open .shared"""


@pytest.mark.parametrize("how", ["full", "dying"])
def test_a_start_that_cannot_write_releases_its_lock(how: str, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    for point in BEFORE.replace("\n", " ").split(" | "):
        raised = checked(directory, point.strip(), how)
        assert isinstance(raised, ConfigError), point
        assert f"run directory {directory} cannot be written" in str(raised)
    assert train(directory)["updates"] == 2
    assert not (directory / ".reserve").exists()


FULL = """open .run.json.N #2 | open metrics.jsonl | fsync .metrics.fields.json.N | mkdir tensorboard |
open tensorboard/events.out.tfevents | open .trust_ratios.fields.json.N | fsync metrics.jsonl | mkdir checkpoints |
open checkpoints/update-N.partial | fsync checkpoints/update-N.partial #2 | open .final.json.N | rename final.json |
open .run.json.N #3"""
DYING = """rename metrics.fields.json | open trust_ratios.jsonl | fsync trust_ratios.jsonl | fsync checkpoints |
rename checkpoints/update-N.pt | open .saved | rename checkpoints/best.pt | fsync .final.json.N | rename run.json #3"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unbroken") / "run"
    train(directory)
    return directory


def assert_whole(directory: Path, unbroken: Path) -> None:
    ours, theirs = (json.loads((d / "final.json").read_text()) for d in (directory, unbroken))
    for timed in ("seconds", "directory"):
        del ours[timed], theirs[timed]
    assert ours == theirs
    for name in ("metrics.jsonl", "trust_ratios.jsonl"):
        assert logged(directory, name) == logged(unbroken, name)
    best = [checkpoint.load(d / "checkpoints/best.pt")["update"] for d in (directory, unbroken)]
    assert best[0] == best[1]
    names = [sorted(p.name for p in (d / "checkpoints").iterdir()) for d in (directory, unbroken)]
    assert names[0] == names[1]


@pytest.mark.parametrize(("how", "points"), [("full", FULL), ("dying", DYING)], ids=["full", "dying"])
def test_a_run_whose_disk_fails_reports_it_and_can_finish(
    how: str, points: str, unbroken: Path, tmp_path: Path
) -> None:
    for number, point in enumerate(points.replace("\n", " ").split(" | ")):
        directory = tmp_path / str(number)
        raised = checked(directory, point.strip(), how)
        assert isinstance(raised, DataError), point
        assert "inline_container" not in str(raised)
        assert "run the same command again" in str(raised), point
        train(directory)
        assert read_run(directory).state == "finished"
        assert_whole(directory, unbroken)


ONCE = """fsync metrics.jsonl | fsync checkpoints/update-N.partial | rename checkpoints/best.pt |
open .trust_ratios.fields.json.N | open tensorboard/events.out.tfevents"""


def test_after_one_failed_write_a_run_is_complete_or_says_so(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, point in enumerate(ONCE.replace("\n", " ").split(" | ")):
        directory = tmp_path / str(number)
        assert checked(directory, point.strip(), "once") is None
        ended = json.loads((directory / "run.json").read_text())["started"][-1]["ended"]
        output = capsys.readouterr().out
        if "tfevents" in point:
            assert os.strerror(errno.EIO) in ended["incomplete"][0]
            assert "WARNING: the run has finished, but is incomplete: TensorBoard" in output
        else:
            # The weights of update 1 never reached the disk.
            lost = {"fsync metrics.jsonl", "fsync checkpoints/update-N.partial"}
            expected = (
                ["best.pt is not the best checkpoint, which was that of update 1"] if point.strip() in lost else None
            )
            assert ended.get("incomplete") == expected, point
            if expected is None:
                assert_whole(directory, unbroken)


@contextlib.contextmanager
def full_soon(place: Path, kib: int) -> Iterator[Callable[[int], None]]:
    """Mount a tmpfs at `place`, and yield a function that changes its size, which is in KiB."""
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", place], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", place], check=True)  # type: ignore
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="only root may mount a tmpfs")
def test_a_run_on_a_small_disk_reports_it_and_can_finish(unbroken: Path, tmp_path: Path) -> None:
    needed = sum(-(-p.stat().st_size // 4096) * 4 for p in unbroken.rglob("*") if p.is_file() and p.name != "best.pt")
    outcomes = []
    for number, share in enumerate((0.05, 0.2, 0.5, 0.8, 0.9, 0.95, 1.0, 1.6)):
        with full_soon(tmp_path / str(number), int(needed * share)) as resize:
            directory = tmp_path / str(number) / "run"
            raised = None
            try:
                train(directory)
            except (ConfigError, DataError) as error:
                raised = str(error)
            state = read_run(directory).state if (directory / "run.json").exists() else "none"
            if raised is None:
                assert state == "finished"
            else:
                assert os.strerror(errno.ENOSPC) in raised, share
                assert "inline_container" not in raised
                assert state in ("failed", "none"), share
                assert not (directory / "final.json").exists()
                resize(10 * needed)
                train(directory)
            assert read_run(directory).state == "finished"
            assert_whole(directory, unbroken)
            outcomes.append(state)
    assert {"failed", "finished"} <= set(outcomes), outcomes


@pytest.mark.parametrize("again", [False, True], ids=["removed", "replaced"])
def test_a_run_whose_directory_is_removed_ends_without_writing(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, whole = tmp_path / "run", Run._evaluate

    def removes(run: Run) -> Any:
        run.writer.wait()
        if not (tmp_path / "aside").exists():
            directory.rename(tmp_path / "aside")
            if again:  # another start of the same command
                directory.mkdir()
        return whole(run)

    monkeypatch.setattr(Run, "_evaluate", removes)
    with pytest.raises(DataError, match=r"run directory was removed or replaced|was removed while the run used it"):
        train(directory)
    assert not directory.exists() or not any(directory.iterdir())
