"""Train the runs of a study, one per core at a time, and keep records of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

# float32 on every processor, so that parts of a study can run on different machines.
COMMON = (
    "model=tiny precision=fp32 schedule.scale_warmup=true checkpoint.keep=1 launch.nproc=1 launch.threads=1 "
    "data.workers=0"
).split()
FOLDER = (
    "batch.scaled=true data=folder data.image_size=32 data.augment=pad_crop data.eval_crop=1.0 "
    "data.mean=[0.4914,0.4822,0.4465] data.std=[0.2470,0.2435,0.2616]"
).split()
SETS = ("cifar10", "fashion_mnist")
BAD_INPUT, INTERRUPTED = 2, 75
RECORDS = (
    *("run.json", "final.json", "divergence.jsonl", "config.yaml", "metrics.jsonl", "metrics.fields.json"),
    *("trust_ratios.jsonl", "trust_ratios.fields.json"),
)
SETTINGS = "settings.txt"


def data_settings(data: str) -> tuple[str, ...]:
    """Return the settings for `data`: a folder or .zip of small images, or one of `SETS`."""
    from lars_train.config.arguments import quoted

    return (f"data={data}",) if data in SETS else (*FOLDER, f"data.root={quoted(data)}")


def add_data(parser: ArgumentParser) -> None:
    """Add the option ``--data``; see `data_settings`."""

    def data(text: str) -> str:
        if text not in SETS and not Path(text).exists():
            raise ArgumentTypeError(f"{text}: no such file or folder, and none of {', '.join(SETS)}")
        return text

    parser.add_argument("--data", type=data, required=True, help="folder or .zip of images, or cifar10, fashion_mnist")


def add_write(parser: ArgumentParser, title: str, marker: str, *, required: bool) -> None:
    """Add the option ``--write``: a folder whose README.md has the markers, or is created with `title` and markers."""

    def folder(text: str) -> Path:
        page = Path(text) / "README.md"
        try:
            if not page.exists():
                page.parent.mkdir(parents=True, exist_ok=True)
                page.write_text(f"# {title}\n\n<!-- {marker}: begin -->\n<!-- {marker}: end -->\n")
            shared.check_page(page, marker)
        except (OSError, ValueError) as error:
            raise ArgumentTypeError(f"{error}; choose another folder") from None
        return Path(text)

    what = "folder for page, plots, report and records"
    parser.add_argument("--write", type=folder, metavar="DIR", required=required, help=what)


class Run(Protocol):
    """A run of a study."""

    @property
    def name(self) -> str:
        """The name of the run's folder."""

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings of the run, besides those that all runs of the study share."""


class Study:
    """The runs of a study in a folder, one per core at a time.

    `common`: settings of all runs, besides `COMMON`. `records`: the folder to which the records of a finished run are
    copied at once. A run that has records there is not trained again, even if `folder` is gone.
    """

    def __init__(self, data: str, folder: Path, common: Sequence[str] = (), records: Path | None = None) -> None:
        self.data, self.folder, self.common, self.records = data_settings(data), folder, tuple(common), records
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.stopped = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: self.stop(number))

    def train(self, runs: Sequence[Run]) -> None:
        """Train all unfinished runs. After a failure, finish the others and exit with its code; bad input ends all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for run in runs:
            self._check_record(run)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            codes = [code for code in pool.map(self._train, runs) if code]
        if codes:
            sys.exit(codes[0])

    def place(self, run: Run) -> Path:
        """Return the folder with the run's results."""
        if self.records is not None and (self.records / run.name).exists():
            return self.records / run.name
        return self.folder / run.name

    def outcome(self, run: Run) -> dict[str, Any]:
        """Return the run's ``final.json``, or an empty dict if it diverged or has not finished."""
        path = self.place(run) / "final.json"
        return json.loads(path.read_text()) if path.exists() and not self.diverged(run) else {}

    def diverged(self, run: Run) -> bool:
        """Return True if the run diverged."""
        return (self.place(run) / "divergence.jsonl").exists()

    def stop(self, number: int) -> None:
        """Start no more runs; forward a signal to the running ones, which write a checkpoint."""
        self.stopped.set()
        for process in tuple(self.processes):
            process.send_signal(number)

    def _check_record(self, run: Run) -> None:
        if self.records is None:
            return
        path = self.records / run.name / SETTINGS
        if path.exists() and path.read_text() != _settings_text(self.common, run):
            sys.exit(f"{path.parent}: the record is of a run with other settings; move it away.")

    def _train(self, run: Run) -> int:
        if self.stopped.is_set():
            return INTERRUPTED
        if self.records is not None and (self.records / run.name / SETTINGS).exists():
            return 0
        if not self.diverged(run):
            code = self._start(run)
            if code and not self.diverged(run):
                return code
        if self.records is not None:
            (record,) = write_records([self.folder / run.name], self.records)
            # Written last: a record without it is incomplete.
            (record / SETTINGS).write_text(_settings_text(self.common, run))
        print(f"{run.name}: {self.outcome(run).get('final_top1', 'diverged')}", flush=True)
        return 0

    def _start(self, run: Run) -> int:
        from lars_train.config.arguments import quoted

        place = f"run.dir={quoted(str(self.folder / run.name))}"
        log = self.folder / f"{run.name}.log"
        with log.open("ab") as output:
            # lars-train ends at once if the run has finished, and refuses to resume one that has other settings.
            process = subprocess.Popen(
                [*shared.LARS_TRAIN, *self.data, *COMMON, *self.common, *run.settings, place],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self.processes.add(process)
        code = process.wait()
        self.processes.discard(process)
        if code and not self.diverged(run):
            if code == BAD_INPUT:
                # lars-train would reject the other runs for the same reason.
                self.stopped.set()
            print(f"{run.name}: exit code {code}; {log} ends:\n{log.read_text()[-1000:]}", file=sys.stderr, flush=True)
        return code


def _settings_text(common: Sequence[str], run: Run) -> str:
    return "".join(f"{setting}\n" for setting in (*COMMON, *common, *run.settings))


def write_records(runs: Sequence[Path], folder: Path) -> list[Path]:
    """Copy the RECORDS of runs into `folder`, without host names and paths; return the copies."""
    for run in runs:
        (folder / run.name).mkdir(parents=True, exist_ok=True)
        for name in RECORDS:
            if not (run / name).exists():
                (folder / run.name / name).unlink(missing_ok=True)
                continue
            text = (run / name).read_text()
            if name == "run.json":
                record = json.loads(text)
                for start in record["started"]:
                    for key in ("host", "directory", "executable"):
                        start.pop(key, None)
                text = json.dumps(record, indent=1) + "\n"
            for place in (f"{run.resolve().parent}/", f"{run.parent}/"):
                text = text.replace(place, "")
            (folder / run.name / name).write_text(text)
    return [folder / run.name for run in runs]
