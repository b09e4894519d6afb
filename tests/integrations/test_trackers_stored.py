"""Weights & Biases and MLflow store every value of metrics.jsonl once, also of a run that was killed and resumed.

Each test skips without its package: scripts/dev/test_with.sh integrations installs them. Both work without the network.
"""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import ALONE, TINY, begin, final, metrics, start

from lars_train.monitoring.fields import TIMING_FIELDS
from lars_train.monitoring.trackers import _POLL_S

# Forty updates. A checkpoint comes after each third, a log line after each second, an evaluation after each tenth.
RUN = [*TINY, "epochs=4", "checkpoint.every_updates=3", "run.dir=run"]
ENVIRONMENT = {"WANDB_MODE": "offline", "MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
LOGS = {"wandb": ["log.wandb=project"], "mlflow": ["log.mlflow=sqlite:///runs.db"]}
Values = dict[tuple[int, str], float]


def expected(folder: Path) -> Values:
    """Return the logged values by update and name. The later one counts if two lines have the same."""
    return {
        (int(line["update"]), name): math.nan if value is None else value
        for line in metrics(folder / "run")
        for name, value in line.items()
    }


def assert_equal(stored: Values, logged: Values) -> None:
    """Compare all but the times of the updates up to the kill, which may be those of the first start."""
    assert len({update for update, _ in logged}) == 20
    pairs = {key: (stored.get(key), logged.get(key)) for key in stored | logged}
    different = [key for key, (one, other) in pairs.items() if one != other and (one == one or other == other)]
    assert all(name in TIMING_FIELDS and update < 30 for update, name in different), different


def killed_and_resumed(folder: Path, tool: str, tracker_too: bool) -> None:
    """Run with a kill after some updates, the last of which no checkpoint has."""
    pytest.importorskip(tool)
    words = [*ALONE, *RUN, *LOGS[tool]]
    program = begin(words, folder, log=folder / "log", **ENVIRONMENT)
    lines = folder / "run" / "metrics.jsonl"
    end = time.monotonic() + 200
    # Pause the run, so that its tracker has time to send something before the kill.
    while not (lines.exists() and lines.read_text().count("\n") >= 9):
        assert program.poll() is None, program.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(program.pid, signal.SIGSTOP)
    while not sent(folder / "run" / "trackers"):
        assert time.monotonic() < end
        time.sleep(0.05)
    if tracker_too:
        for process in trackers_of(folder):
            os.kill(process, signal.SIGKILL)
    os.kill(program.pid, signal.SIGKILL)
    done = start(words, folder, **ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "incomplete" not in done.stdout, done.stdout
    assert "resum" in done.stdout


def sent(folder: Path) -> bool:
    """Return True if the tool has values: MLflow those of an update, W&B what it has not yet written to its file."""
    if any(folder.glob("wandb/offline-run-*")):
        time.sleep(2 * _POLL_S)
        return True
    state = folder / "mlflow.json"
    return state.exists() and json.loads(state.read_text())["update"] >= 3


def trackers_of(folder: Path) -> list[int]:
    """Return the ids of the trackers' processes of the run in `folder`."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command.read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(folder / "run") in words:
            found.append(int(command.parent.name))
    return found


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: a header of 7 bytes, then LevelDB's log format.

    See https://github.com/google/leveldb/blob/main/doc/log_format.md.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield Record.FromString(record)
            record = b""


def by_key(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.parametrize("tracker_too", [False, True])
def test_wandb_stores_a_killed_run_once(tmp_path: Path, tracker_too: bool) -> None:
    killed_and_resumed(tmp_path, "wandb", tracker_too)
    files = sorted((tmp_path / "run" / "trackers" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # the name has the run's id
    stored: Values = {}
    for record in (record for file in files for record in records(file)):
        if record.WhichOneof("record_type") == "history":
            values = by_key(record.history.item)
            step = values.pop("_step")
            own = {(step, name): value for name, value in values.items() if not name.startswith("_")}
            # If its own process is killed, too, W&B may get the same values again.
            repeated = own.keys() & stored.keys()
            same = all(stored[key] == own[key] for key in repeated if key[1] not in TIMING_FIELDS)
            assert not repeated or (tracker_too and same)
            stored |= own
    assert_equal(stored, expected(tmp_path))
    config, summary, codes = {}, {}, []
    for record in records(files[-1]):
        config |= by_key(record.run.config.update) | by_key(record.config.update)
        summary |= by_key(record.summary.update)
        if record.WhichOneof("record_type") == "exit":
            codes.append(record.exit.exit_code)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert {name: config[name] for name in settings} == settings
    result = final(tmp_path / "run")
    assert {name: summary[f"final/{name}"] for name in result} == result
    assert codes == [0]


def test_mlflow_stores_a_killed_run_once(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "mlflow", tracker_too=True)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs.db")
    experiment = client.get_experiment_by_name("lars-train")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    stored: Values = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            assert (point.step, name) not in stored
            stored[point.step, name] = point.value
    numbers = {name: value for (_, name), value in stored.items() if name.startswith("final/")}
    assert_equal({key: value for key, value in stored.items() if key[1] not in numbers}, expected(tmp_path))
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert run.data.params == {name: str(value) for name, value in settings.items()}
    result = {f"final/{name}": value for name, value in final(tmp_path / "run").items() if value is not None}
    assert numbers == {name: value for name, value in result.items() if type(value) in (int, float)}
    tags = {name: str(value) for name, value in result.items() if name not in numbers}
    assert {name: run.data.tags[name] for name in tags} == tags
