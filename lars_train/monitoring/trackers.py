"""Send a run's metrics to Weights & Biases or MLflow, each from a separate process.

That process reads ``metrics.jsonl``, so a slow or failing tool neither ends nor delays training. It sends the values of
an update when the log has a line of a later update. No update is sent twice, even if a restart repeats it: the repeated
values are bit-identical, except times. The process keeps its state and its output in the run's folder ``trackers/``.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lars_train.config.mode_schema import LogConfig
from lars_train.errors import ConfigError
from lars_train.fsutil import write_atomic
from lars_train.messages import first_line

FOLDER = "trackers"
# In seconds: the time between two reads of the metrics, the longest wait at the end of a run, and the longest life of
# the process after that.
_POLL_S, _END_S, _LIFE_S = 2.0, 120.0, 300
# Seconds after which values sent to W&B count as stored. W&B's process writes its file every 15 s; if the process is
# killed, it loses the values since the last write.
_WANDB_S = 60.0
# Updates that go to MLflow in one transaction, which may have 1,000 values.
_ROWS = 10
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from lars_train.monitoring.trackers import main; main()"
)

Row = dict[str, float]
"""The values that a run logged at one update, by name. A value that is not finite is NaN."""


def check_trackers(log: LogConfig) -> None:
    """Raise `ConfigError` if the package of a tracker in the config is not installed."""
    for name, target in _chosen(log):
        found = importlib.util.find_spec(name)
        # wandb creates a folder "wandb" in the working directory. `find_spec` finds it as a package without an origin.
        if found is None or found.origin is None:
            raise ConfigError(f"log.{name}={target}: {name} is not installed: pip install {name}.")


def start_trackers(log: LogConfig, directory: Path) -> list[Tracker]:
    """Start the trackers in the config for the run in `directory`, which must have its ``run.json``."""
    return [Tracker(name, target, directory) for name, target in _chosen(log)]


def _chosen(log: LogConfig) -> list[tuple[str, str]]:
    return [(name, target) for name, target in (("wandb", log.wandb), ("mlflow", log.mlflow)) if target is not None]


class Tracker:
    """The process that sends a run's metrics to the tool `name`. No method raises an error of the tool.

    Attributes:
        target: W&B's project, or MLflow's URI.
        reason: the error that ended the process; empty if there was none.
    """

    def __init__(self, name: str, target: str, directory: Path) -> None:
        self.name, self.target, self._reason = name, target, ""
        self._process: subprocess.Popen[bytes] | None = None
        try:
            folder = directory / FOLDER
            folder.mkdir(exist_ok=True)
            with (folder / f"{name}.log").open("ab") as output:
                # In a new session, so that Ctrl-C in a terminal does not end it before it has sent the last values.
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START, name, target, str(directory.absolute()), json.dumps(sys.path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    start_new_session=True,
                    bufsize=0,
                )
        except OSError as error:
            self._reason = f"{name}: cannot be started ({error})"

    @property
    def reason(self) -> str:
        """The error that ended the process; empty if there was none."""
        if not self._reason and self._process is not None and self._process.poll():
            assert self._process.stdout is not None
            with self._process.stdout as output:
                # Do not read to the end: a process that the tool has left behind may hold the pipe open.
                text = os.read(output.fileno(), 4096).decode(errors="replace").strip().rstrip(".")
            self._reason = f"{self.name}: {text or f'ended with exit code {self._process.returncode}'}"
        return self._reason

    def finish(self, final: dict[str, Any]) -> None:
        """Send all values and the content of ``final.json``; `wait` waits for that."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.write(json.dumps(final).encode() + b"\n")
        self.close()

    def wait(self, until: float) -> str:
        """Wait at most until this time of `time.monotonic`. Return the reason why values are missing; empty if none."""
        if self._process is not None and not self._reason:
            try:
                self._process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                return f"{self.name} has not accepted all values after {_END_S:.0f} s"
            if self._process.returncode == 0 and self._process.stdout is not None:
                self._process.stdout.close()
        return self.reason

    def close(self) -> None:
        """Let the process send what is complete, and end. Does not wait."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()


def finish_trackers(trackers: list[Tracker], final: dict[str, Any]) -> list[str]:
    """Send the content of ``final.json``, wait for the trackers, and return the reasons for missing values."""
    until = time.monotonic() + _END_S
    for tracker in trackers:
        tracker.finish(final)
    return [reason for tracker in trackers if (reason := tracker.wait(until))]


class CompleteRows:
    """The rows of a growing ``metrics.jsonl`` after `update`: one per update, in order, each once.

    All lines of an update, such as that of a log point and that of an evaluation, form one row. A row is complete once
    the file has a line of a later update. If two lines have a value of the same name, the later value counts.
    """

    def __init__(self, directory: Path, update: int) -> None:
        self.update, self._path = update, directory / "metrics.jsonl"
        self._offset, self._file = 0, -1
        self._waiting: dict[int, Row] = {}

    def take(self, *, ended: bool = False) -> list[tuple[int, Row]]:
        """Return the new complete rows, with their updates. `ended`: the last row is complete, too."""
        self._read()
        newest = max(self._waiting, default=0)
        ready = [update for update in sorted(self._waiting) if ended or update < newest]
        self.update = max(ready, default=self.update)
        return [(update, self._waiting.pop(update)) for update in ready]

    def _read(self) -> None:
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            if (number := os.fstat(file.fileno()).st_ino) != self._file:
                # A rollback or a restart has replaced the file by one without its last lines.
                self._offset, self._file = 0, number
                self._waiting.clear()
            file.seek(self._offset)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        for line in data.splitlines():
            values = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
            if (update := int(values["update"])) > self.update:
                self._waiting.setdefault(update, {}).update(values)


class WandbSink:
    """A run of Weights & Biases in `project`, which may be ENTITY/PROJECT. Methods raise whatever wandb raises.

    Attributes:
        id: W&B's id of the run, new or that of an earlier start.
        update: the last update whose values are stored; 0 if unknown.
    """

    def __init__(self, project: str, id: str, directory: Path, settings: dict[str, Any]) -> None:
        import wandb

        self.id, self.update, self._sent = id, 0, list[tuple[float, int]]()
        entity, _, name = project.rpartition("/")
        self._run = wandb.init(
            project=name,
            entity=entity or None,
            id=self.id,
            resume="allow",
            name=directory.name,
            dir=str(directory / FOLDER),
            settings=wandb.Settings(console="off"),
        )
        self._run.config.update(settings, allow_val_change=True)

    def send(self, rows: list[tuple[int, Row]]) -> None:
        """Log each row with its update as the step."""
        for update, row in rows:
            self._run.log(row, step=update, commit=True)
            self._sent.append((time.monotonic(), update))
        self._note_stored(time.monotonic() - _WANDB_S)

    def end(self, final: dict[str, Any] | None) -> None:
        """Put ``final.json`` into the summary, and end the run: as failed if it has not finished."""
        self._run.summary.update({f"final/{name}": value for name, value in (final or {}).items()})
        self._run.finish(exit_code=0 if final is not None else 1)
        self._note_stored(time.monotonic())

    def _note_stored(self, until: float) -> None:
        while self._sent and self._sent[0][0] <= until:
            _, self.update = self._sent.pop(0)


class MlflowSink:
    """A run of MLflow at `uri`, in the experiment MLFLOW_EXPERIMENT_NAME or ``lars-train``. Used like `WandbSink`.

    For a new run, `id` is an empty string.
    """

    def __init__(self, uri: str, id: str, directory: Path, settings: dict[str, Any]) -> None:
        import mlflow
        from mlflow import entities

        self._entities, self._client = entities, mlflow.MlflowClient(tracking_uri=uri)
        if id:
            self.id = id
            self._client.update_run(id, "RUNNING")
        else:
            self.id = self._client.create_run(self._experiment(), run_name=directory.name).info.run_id
        data = self._client.get_run(self.id).data
        self.update = int(data.metrics.get("update", 0))
        # MLflow keeps the first value of a setting, and limits the length of its text.
        new = [entities.Param(name, str(value)[:6000]) for name, value in settings.items() if name not in data.params]
        for start in range(0, len(new), 100):
            self._client.log_batch(self.id, params=new[start : start + 100])

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "lars-train")
        if (found := self._client.get_experiment_by_name(name)) is None:
            with suppress(Exception):  # another job of a sweep may have created it
                self._client.create_experiment(name)
            found = self._client.get_experiment_by_name(name)
        assert found is not None, f"experiment {name} cannot be created"
        return str(found.experiment_id)

    def send(self, rows: list[tuple[int, Row]]) -> None:
        """Log each row with its update as the step, several in one transaction."""
        for start in range(0, len(rows), _ROWS):
            some = rows[start : start + _ROWS]
            self._log({(name, update): value for update, row in some for name, value in row.items()})
            self.update = some[-1][0]

    def end(self, final: dict[str, Any] | None) -> None:
        """Log the numbers of ``final.json`` as metrics and the rest as tags, and end the run.

        Without a ``final.json``, the run ends as killed.
        """
        final = {f"final/{name}": value for name, value in (final or {}).items() if value is not None}
        numbers = {name: value for name, value in final.items() if type(value) in (int, float)}
        if final:
            self._log({(name, int(final["final/updates"])): value for name, value in numbers.items()})
            tags = [self._entities.RunTag(key, str(final[key])[:5000]) for key in final.keys() - numbers.keys()]
            self._client.log_batch(self.id, tags=tags)
        self._client.set_terminated(self.id, "FINISHED" if final else "KILLED")

    def _log(self, values: dict[tuple[str, int], float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, value, now, step) for (name, step), value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)


SINKS: dict[str, type[WandbSink] | type[MlflowSink]] = {"wandb": WandbSink, "mlflow": MlflowSink}


def main() -> None:
    """Run a tracker's process: send rows until standard input ends. Its only line, if any, is ``final.json``'s content.

    An error ends it with exit code 1 and one line on standard output. What the tool prints goes to standard error.
    """
    reason = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Training has priority.
    os.nice(10)
    try:
        track(*sys.argv[1:])
    except BaseException as error:
        traceback.print_exc()
        print(first_line(error) or type(error).__name__, file=reason, flush=True)
        sys.exit(1)


def track(name: str, target: str, place: str) -> None:
    """Send the metrics of the run in the folder `place` to `target` of the tool `name`; see `main`."""
    directory = Path(place)
    folder = directory / FOLDER
    with (folder / f"{name}.lock").open("w") as lock:
        # The tracker of an earlier start may still be sending.
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / f"{name}.json"
        state = json.loads(path.read_text()) if path.exists() else {}

        def save(**values: Any) -> None:
            state.update(values)
            write_atomic(path, [json.dumps(state).encode()])

        if state.get("target") != target:
            # MLflow chooses its own id. Save W&B's id before W&B starts, so that a killed start leaves no second run.
            save(target=target, id=uuid.uuid4().hex[:8] if name == "wandb" else "", update=0)
        settings = json.loads((directory / "run.json").read_text())["settings"]
        sink = SINKS[name](target, state["id"], directory, settings)
        sink.update = max(state["update"], sink.update)
        save(id=sink.id)
        rows, final = CompleteRows(directory, sink.update), None
        for line in _lines_of_standard_input():
            if line:
                final = json.loads(line)
            sink.send(rows.take())
            if sink.update != state["update"]:
                save(update=sink.update)
        signal.alarm(_LIFE_S)
        sink.send(rows.take(ended=final is not None))
        sink.end(final)
        save(update=sink.update)


def _lines_of_standard_input() -> Iterator[bytes]:
    """Yield each line, and an empty one at the start and every `_POLL_S`, until the input ends."""
    read = b""
    yield b""
    while True:
        if not select.select([0], [], [], _POLL_S)[0]:
            yield b""
        elif data := os.read(0, 1 << 16):
            *lines, read = (read + data).split(b"\n")
            yield from lines
        else:
            return
