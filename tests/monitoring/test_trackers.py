"""A tracker sends each update of metrics.jsonl once, when the log has a later one, and its failure ends no run.

A small module takes the place of wandb. tests/integrations/test_trackers_stored.py reads what the real tools stored.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

from lars_train.config import run_hash
from lars_train.config.mode_schema import LogConfig
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.monitoring import trackers
from lars_train.monitoring.log import RunLog
from lars_train.monitoring.trackers import CompleteRows, Tracker
from lars_train.training import session
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation

# A wandb that appends what it gets to the file sent.jsonl beside it.
FAKE = """
import json, os, time
from pathlib import Path
from types import SimpleNamespace

def put(**values):
    with Path(__file__).with_name("sent.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\\n")

class Settings:
    def __init__(self, **values): pass

def init(**values):
    INIT
    put(init={name: values[name] for name in ("project", "entity", "id", "name")})
    return SimpleNamespace(
        config=SimpleNamespace(update=lambda values, allow_val_change: put(config=values)),
        summary=SimpleNamespace(update=lambda values: put(summary=values)),
        log=lambda row, step, commit: put(step=step, row=row),
        finish=lambda exit_code: put(exit=exit_code),
    )
"""
Install = Callable[[str], Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that installs the small wandb, whose `init` begins with a statement, and gives its file."""

    def write(statement: str = "pass") -> Path:
        folder = tmp_path / "packages"
        folder.mkdir(exist_ok=True)
        (folder / "wandb.py").write_text(FAKE.replace("INIT", statement))
        monkeypatch.syspath_prepend(folder)
        return folder / "sent.jsonl"

    return write


def sent(file: Path, key: str) -> list[Any]:
    return [line[key] for line in map(json.loads, file.read_text().splitlines()) if key in line]


def log(directory: Path, start: int, *updates: int) -> None:
    """Log as a start from update `start` does: a line per update, and one more for an evaluation at even updates."""
    directory.mkdir(exist_ok=True)
    (directory / "run.json").write_text(json.dumps({"settings": {"optimizer.lr": 2.0, "seed": None}}))
    lines = RunLog(directory, start)
    for update in updates:
        lines.write(update, update / 10, {"train/loss": update + start / 100, "run/seconds": 1.0})
        if update % 2 == 0:
            lines.write(update, update / 10, {"val/top1": 50.0 + update, "run/seconds": 2.0})
    lines.close()


def test_rows_are_sent_as_soon_as_the_log_goes_on(tmp_path: Path) -> None:
    rows = CompleteRows(tmp_path, 0)
    assert rows.take() == []
    log(tmp_path, 0, 1, 2, 3)
    first = {"update": 1, "epoch": 0.1, "train/loss": 1.0, "run/seconds": 1.0}
    # An evaluation's values are part of its update's row.
    second = {"update": 2, "epoch": 0.2, "train/loss": 2.0, "val/top1": 52.0, "run/seconds": 2.0}
    assert rows.take() == [(1, first), (2, second)]
    assert rows.take() == []
    assert [update for update, _ in rows.take(ended=True)] == [3]


def test_a_row_waits_for_its_evaluation(tmp_path: Path) -> None:
    rows = CompleteRows(tmp_path, 0)
    log(tmp_path, 0, 1)
    assert rows.take() == []
    log(tmp_path, 1, 2)
    assert [update for update, _ in rows.take()] == [1]


def test_half_a_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"update": 1, "epoch": 0.1}\n{"update": 2, "ep')
    rows = CompleteRows(tmp_path, 0)
    assert rows.take() == []
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('och": 0.2, "train/loss": null}\n')
    (_, first), (_, second) = rows.take(ended=True)
    assert first == {"update": 1, "epoch": 0.1}
    assert math.isnan(second["train/loss"])


def test_a_restart_sends_no_update_twice(tmp_path: Path) -> None:
    rows, taken = CompleteRows(tmp_path, 0), []
    log(tmp_path, 0, 1, 2, 3, 4, 5)
    taken += rows.take()
    log(tmp_path, 3, 4, 5, 6)
    taken += rows.take(ended=True)
    assert [update for update, _ in taken] == [1, 2, 3, 4, 5, 6]
    # The loss shows which start logged a value.
    assert [row["train/loss"] for _, row in taken] == [1.0, 2.0, 3.0, 4.0, 5.03, 6.03]


def test_a_rollback_behind_sent_rows_repeats_no_update(tmp_path: Path) -> None:
    rows = CompleteRows(tmp_path, 0)
    log(tmp_path, 0, 1, 2, 3, 4)
    assert [update for update, _ in rows.take()] == [1, 2, 3]
    log(tmp_path, 1, 2, 3, 4, 5)
    assert [update for update, _ in rows.take(ended=True)] == [4, 5]


def test_a_finished_run_is_sent_whole(tmp_path: Path, install: Install) -> None:
    file = install("pass")
    run = tmp_path / "run"
    log(run, 0, 1, 2)
    tracker = Tracker("wandb", "team/project", run)
    assert trackers.finish_trackers([tracker], {"best_top1": 52.0, "updates": 2}) == []
    (began,) = sent(file, "init")
    assert (began["project"], began["entity"], began["name"]) == ("project", "team", "run")
    assert sent(file, "config") == [{"optimizer.lr": 2.0, "seed": None}]
    assert sent(file, "step") == [1, 2]
    assert sent(file, "row")[1] == {
        "update": 2,
        "epoch": 0.2,
        "train/loss": 2.0,
        "val/top1": 52.0,
        "run/seconds": 2.0,
    }
    assert sent(file, "summary") == [{"final/best_top1": 52.0, "final/updates": 2}]
    assert sent(file, "exit") == [0]


def test_a_later_start_continues_the_same_run(tmp_path: Path, install: Install) -> None:
    file = install("pass")
    run = tmp_path / "run"
    log(run, 0, 1, 2, 3)
    # The end of the input is all that a tracker sees of a killed run.
    stopped = Tracker("wandb", "project", run)
    stopped.close()
    assert stopped.wait(time.monotonic() + 60) == ""
    log(run, 2, 3, 4)
    assert trackers.finish_trackers([Tracker("wandb", "project", run)], {"updates": 4}) == []
    assert len({began["id"] for began in sent(file, "init")}) == 1
    assert sent(file, "step") == [1, 2, 3, 4]
    assert sent(file, "exit") == [1, 0]
    # Another project gets the run from its beginning.
    assert trackers.finish_trackers([Tracker("wandb", "other", run)], {"updates": 4}) == []
    assert sent(file, "step") == [1, 2, 3, 4, 1, 2, 3, 4]
    assert len({began["id"] for began in sent(file, "init")}) == 2


def test_each_run_of_a_sweep_is_a_run_of_the_tool(tmp_path: Path, install: Install) -> None:
    file = install("pass")
    for name in ("a", "b"):
        log(tmp_path / name, 0, 1)
    both = [Tracker("wandb", "project", tmp_path / name) for name in ("a", "b")]
    assert trackers.finish_trackers(both, {"updates": 1}) == []
    assert {began["name"] for began in sent(file, "init")} == {"a", "b"}
    assert len({began["id"] for began in sent(file, "init")}) == 2


def test_a_hanging_tool_does_not_hold_the_run(
    tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("time.sleep(600)")
    run = tmp_path / "run"
    log(run, 0, 1)
    monkeypatch.setattr(trackers, "_END_S", 0.2)
    tracker = Tracker("wandb", "project", run)
    began = time.monotonic()
    assert trackers.finish_trackers([tracker], {}) == ["wandb has not accepted all values after 0 s"]
    assert time.monotonic() - began < 10
    assert tracker._process is not None
    os.kill(tracker._process.pid, signal.SIGKILL)
    assert tracker.wait(time.monotonic() + 60) == "wandb: ended with exit code -9"


def test_a_failing_tool_is_reported_and_the_run_ends(
    tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("raise RuntimeError('no server.\\nTry later.')")
    prepared = prepare(tiny(run__dir=str(tmp_path / "run"), log__wandb="project"))
    final = session.train(prepared, Ranks(), Invocation())
    assert final["updates"] == 6
    ended = json.loads((tmp_path / "run" / "run.json").read_text())["started"][-1]["ended"]
    assert (ended["how"], ended["incomplete"]) == ("finished", ["wandb: no server"])
    assert "WARNING: the run has finished, but is incomplete: wandb: no server." in capsys.readouterr().out
    assert "RuntimeError: no server.\nTry later." in (tmp_path / "run" / "trackers" / "wandb.log").read_text()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_an_error_before_the_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"log\.{name}=x: {name} is not installed: pip install {name}\.$"):
        prepare(tiny(**{f"log__{name}": "x"}))


def test_a_folder_is_not_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="is not installed"):
        trackers.check_trackers(LogConfig(wandb="project"))


def test_trackers_do_not_belong_to_the_experiment() -> None:
    assert run_hash(tiny()) == run_hash(tiny(log__wandb="project", log__mlflow="sqlite:///x.db"))
