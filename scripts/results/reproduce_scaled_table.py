"""Trains the table (256, 8K, 16K, 32K) at reduced scale, with and without LARS, and writes it down.

    python scripts/results/reproduce_scaled_table.py --data cifar10_jpeg.zip                 # one night on two cores
    python scripts/results/reproduce_scaled_table.py --data fashion_mnist --quick            # about ten minutes
    python scripts/results/reproduce_scaled_table.py --data cifar10_jpeg.zip --write docs/results/scaled

The same command goes on after a cut: each run finds its own directory, and with `--write` the record of a run that has
ended stands for it, also on another machine. Runs and records of other settings or other images are never mixed in nor
written over: the script says which they are and ends with 2. `--data`: a folder or .zip of small images with train/ and
test/ (or val/), or one of torchvision's sets, cifar10 or fashion_mnist, which it downloads.

1. Choices, on a tenth of the training images that is held out; the test images are not read. One run for each learning
   rate of three sweeps: SGD at the 256 row, SGD and LARS at the 32K row.
2. The table: all training images, evaluated on the test images. Each cell with several seeds:
   - the rows of the recipe as they are;
   - the 256 row with the best learning rate of its sweep;
   - beside each LARS row plain SGD, its learning rate scaled linearly from 0.1 at 256 (at 32K also from 0.2);
   - at 32K both optimizers with the best learning rates of their sweeps.

All runs have the same network, data, epochs, ghost batch, schedule (warm-up scaled with the epochs) and arithmetic.
Plain SGD keeps the weight decay of the recipe's SGD row; at large batches it has the warm-up of the row that it stands
beside.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from scaled_images import described, fault_of
from scaled_results import (
    RECORDS_FOLDER,
    Point,
    Result,
    copy_record,
    draw_sweeps,
    fault_of_folder,
    hidden_parts,
    publish,
    result_table,
    sweep_table,
)

ROWS = ("256", "8k", "16k", "32k")
SGD_SWEEP_256 = (0.05, 0.1, 0.2)
# As many for one as for the other, a factor of 2 apart, with the recipe's or the linearly scaled value among them.
SGD_SWEEP_32K = (0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
LARS_SWEEP_32K = (3.625, 7.25, 14.5, 29.0, 58.0, 116.0)
LINEAR = {"8k": (3.2,), "16k": (6.4,), "32k": (12.8, 25.6)}
# float32 on any processor, so that the pieces of a study may be made on several.
# SGD: of the recipe's 256 row, which has no LARS.
SGD = ("optimizer=sgd", "optimizer.weight_decay=1e-4")
HELD_OUT = "data.holdout=0.1"
COMMON = (
    "model=tiny precision=fp32 schedule.scale_warmup=true checkpoint.keep=1 launch.nproc=1 launch.threads=1 "
    "data.workers=0"
).split()
FOLDER = (
    "data=folder data.image_size=32 data.augment=pad_crop data.eval_crop=1.0 "
    "data.mean=[0.4914,0.4822,0.4465] data.std=[0.2470,0.2435,0.2616]"
).split()
SETS = ("cifar10", "fashion_mnist")
IMAGES = "images.txt"
"""Of a folder of runs or records: which images they are of."""
# Of a full study and of a quick one. Half as many epochs are too few updates for the 32K row of this network: at lr 29
# it had 72.5 % of the held-out images after 15 epochs and 79.3 % after 30.
LENGTH = {"epochs": (30, 4), "seeds": (3, 1)}
UPDATES_BETWEEN_LINES = {"256": 2000, "8k": 100, "16k": 40, "32k": 20}


@dataclass(frozen=True)
class Cell:
    """A row with an optimizer and a learning rate (None: the recipe's)."""

    row: str
    optimizer: str
    lr: float | None = None

    @property
    def name(self) -> str:
        """As part of a folder's name."""
        return f"{self.row}-{self.optimizer}-{'recipe' if self.lr is None else f'{self.lr:g}'}"

    @property
    def settings(self) -> tuple[str, ...]:
        """What makes it another run than the row's own."""
        own = () if self.lr is None else (f"optimizer.lr={self.lr:g}",)
        # At the 256 row plain SGD is the recipe's own.
        return (f"batch={self.row}", *own, *(SGD if self.optimizer == "sgd" and self.row != "256" else ()))


@dataclass(frozen=True)
class Run:
    """One training: a cell with a seed, for a choice (on held-out images) or for the table."""

    cell: Cell
    seed: int
    choice: bool

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{'choice' if self.choice else 'table'}-{self.cell.name}-seed{self.seed}"


class Study:
    """The runs of one data set, below one folder; a few at a time.

    `records`: where the record of each that has ended goes, with `hidden` parts of paths taken out.
    """

    def __init__(
        self,
        data: Sequence[str],
        folder: Path,
        epochs: int,
        jobs: int,
        records: Path | None = None,
        hidden: Sequence[str] = (),
    ) -> None:
        self.data, self.folder, self.epochs, self.jobs = tuple(data), folder, epochs, jobs
        self.records, self.hidden = records, tuple(hidden)
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.ending = threading.Event()

    def command(self, run: Run) -> list[str]:
        """The command line of a run, without the interpreter."""
        extra = (HELD_OUT,) if run.choice else ()
        length = (f"epochs={self.epochs}", f"log_every={UPDATES_BETWEEN_LINES[run.cell.row]}")
        where = f"run.dir={quoted(str(self.folder / run.name))}"
        return [*self.data, *COMMON, *extra, *run.cell.settings, *length, f"seed={run.seed}", where]

    def make(self, runs: Sequence[Run]) -> None:
        """Train all that is not finished; exits with the first failure's code when the others have ended."""
        wanted = [run for run in runs if self.final(run) is None]
        self.folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.jobs) as pool:
            codes = [code for code in pool.map(self._train, wanted) if code]
        if codes:
            sys.exit(codes[0])

    def claim(self, images: str) -> None:
        """Write down that both folders are of `images`, as scaled_images.py describes them.

        Exits with 2 if one has runs on others, and writes nothing then.
        """
        folders = (self.folder, *([] if self.records is None else [self.records]))
        for folder in folders:
            path = folder / IMAGES
            used = path.exists() and any(other.is_dir() for other in folder.iterdir())
            if used and path.read_text().strip() != images:
                refuse(f"{folder} has runs on other images ({path} says which): choose another folder for these")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / IMAGES).write_text(images + "\n")

    def final(self, run: Run) -> dict[str, Any] | None:
        """The content of ``final.json``, with ``diverged`` instead of one that diverged; None of an unfinished run.

        Exits with 2 if there is such a run, or its record, with other settings.
        """
        found = self._ended(run, self.folder / run.name)
        if self.records is None:
            return found
        record = self._ended(run, self.records / run.name)
        if found is None:
            return record
        copy_record(self.folder / run.name, self.records / run.name, self.hidden)
        return found

    def _ended(self, run: Run, folder: Path) -> dict[str, Any] | None:
        path = folder / "run.json"
        if not path.exists():
            return None
        try:
            _, *settings = shlex.split(json.loads(path.read_text())["started"][0]["command"])
            found = ended(folder)
        except (ValueError, LookupError, TypeError) as error:
            refuse(f"{folder}: run.json or final.json is damaged ({error}): move the folder away to make the run anew")
        there, wanted = (set(without_places(one)) for one in (settings, self.command(run)))
        if there != wanted:
            apart = f"{' '.join(sorted(there - wanted))} there, {' '.join(sorted(wanted - there))} wanted"
            refuse(f"{folder} has a run with other settings ({apart}): choose other folders with --runs and --write")
        return found

    def stop(self, number: int) -> None:
        """Pass a signal on to what runs, which ends with a checkpoint, and start nothing more."""
        self.ending.set()
        for process in tuple(self.processes):
            process.send_signal(number)

    def _train(self, run: Run) -> int:
        if self.ending.is_set():
            return 75
        with (self.folder / f"{run.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lars_train", *self.command(run)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self.processes.add(process)
        code = process.wait()
        self.processes.discard(process)
        final = self.final(run)
        print(f"{run.name}: {f'exit code {code}, see {log.name}' if final is None else told(final)}", flush=True)
        return code if final is None else 0


def refuse(why: str) -> NoReturn:
    """End with 2, bad input."""
    print(why, file=sys.stderr)
    sys.exit(2)


def quoted(value: str) -> str:
    """A value for the command line of Hydra, in quotes where it has more in it than the usual parts of paths."""
    if re.fullmatch(r"[A-Za-z0-9_./+-]+", value):
        return value
    escaped = re.sub(r"\\(?=\\*('|$))", r"\\\\", value).replace("'", "\\'")
    return f"'{escaped}'"


def ended(folder: Path) -> dict[str, Any] | None:
    """How the run in `folder`, or its record, ended; None if it has not.

    Raises `ValueError`, `LookupError` or `TypeError` for a final.json that is damaged.
    """
    if (folder / "divergence.jsonl").exists():
        return {"diverged": True}
    path = folder / "final.json"
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    numbers = {name: float(content[name]) for name in ("final_top1", "best_top1", "lr", "global_batch")}
    if not all(map(math.isfinite, numbers.values())):
        raise ValueError(f"{numbers}")
    return content


def without_places(settings: Sequence[str]) -> list[str]:
    """Settings less those that say where files lie."""
    return [setting for setting in settings if not setting.startswith(("data.root=", "run.dir="))]


def main() -> None:
    """Make the choices, then the table; print both, and write them where asked."""
    args = arguments()
    root = (f"data.root={quoted(args.root)}",) if args.root else ()
    data = (f"data={args.data}", *root) if args.data in SETS else (*FOLDER, f"data.root={quoted(args.data)}")
    places = [args.runs / "run", *(Path(place) for place in (args.root, args.data) if place and place not in SETS)]
    records = None if args.write is None else args.write / RECORDS_FOLDER
    study = Study(data, args.runs, args.epochs, args.jobs, records, list(hidden_parts(*places)))
    study.claim(args.data if args.data in SETS else described(Path(args.data)))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: study.stop(number))
    choices = sweeps(args.quick)
    tried = [Run(cell, 0, choice=True) for sweep in choices for cell in sweep]
    study.make(tried)
    best = [chosen(study, sweep) for sweep in choices]
    print("chosen: " + (", ".join(cell.name for cell in best) or "nothing"), flush=True)
    cells = table_cells(best, args.quick)
    made = [Run(cell, seed, choice=False) for seed in range(args.seeds) for cell in cells]
    study.make(made)
    swept = [(sweep_name(sweep), sweep_points(study, sweep)) for sweep in choices]
    lines = result_table(results(study, cells, args.seeds, as_in_recipe(best[0]) if best else cells[0]))
    for name, points in swept:
        lines += ["", *sweep_table(name, points)]
    print("\n".join(lines))
    if args.write is not None:
        if swept:
            draw_sweeps(swept, args.write / "sweeps")
        shown = Path(args.data).name if args.data not in SETS else args.data
        command = f"python scripts/results/reproduce_scaled_table.py --data {shown}{' --quick' if args.quick else ''}"
        command += f" --write {args.write.name if args.write.is_absolute() else args.write}"
        command += "".join(
            f" --{key} {n}" for key, n in vars(args).items() if key in LENGTH and n != LENGTH[key][args.quick]
        )
        length = f"{args.epochs} epochs, {args.seeds} seed(s) for a cell of the table, one for a point of a sweep."
        panels = {
            title: [[Run(cell, seed, choice=False).name for seed in range(args.seeds)] for cell in drawn]
            for title, drawn in curve_panels(cells).items()
        }
        publish(args.write, [run.name for run in (*tried, *made)], panels, [length, "", *lines], command)


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder or .zip of images, or cifar10, fashion_mnist")
    parser.add_argument("--root", help="where torchvision's copy of the data set lies or goes")
    parser.add_argument("--quick", action="store_true", help="recipe rows and plain SGD at 32K alone, 4 epochs, a seed")
    parser.add_argument("--runs", type=Path, help="folder of the runs (runs/scaled-DATA, with -quick)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each (cores)")
    parser.add_argument("--write", type=Path, metavar="DIR", help="page, pictures, report; records of runs that ended")
    parser.add_argument("--epochs", type=int, help="of each run (30; quick: 4)")
    parser.add_argument("--seeds", type=int, help="of each cell of the table (3; quick: 1)")
    args = parser.parse_args()
    if args.data not in SETS:
        if fault := fault_of(Path(args.data)):
            parser.error(f"--data {args.data}: {fault}, and it is none of {', '.join(SETS)}")
        if args.root:
            parser.error("--root goes with --data cifar10 or fashion_mnist; a folder or .zip is --data itself")
    for key, usual in LENGTH.items():
        if getattr(args, key) is None:
            setattr(args, key, usual[args.quick])
    if min(args.epochs, args.seeds, args.jobs) < 1:
        parser.error("--epochs, --seeds and --jobs: at least 1")
    name = Path(args.data).stem
    args.runs = args.runs or Path("runs") / f"scaled-{name}{'-quick' if args.quick else ''}"
    for key, folder in (("--runs", args.runs), ("--write", args.write)):
        if folder is not None and not next(path for path in (folder, *folder.parents) if path.exists()).is_dir():
            parser.error(f"{key} {folder}: is no folder, or is in none")
    if args.write is not None:
        if fault := fault_of_folder(args.write, IMAGES):
            parser.error(f"--write {args.write}: {fault}; choose another folder")
        if (args.write / RECORDS_FOLDER).resolve() == args.runs.resolve():
            parser.error(f"--write {args.write}: the records go to {args.write / RECORDS_FOLDER}, where the runs are")
    return args


def sweeps(quick: bool) -> list[list[Cell]]:
    """The cells of each sweep; a quick study makes none."""
    if quick:
        return []
    return [
        [Cell("256", "sgd", lr) for lr in SGD_SWEEP_256],
        [Cell("32k", "lars", lr) for lr in LARS_SWEEP_32K],
        [Cell("32k", "sgd", lr) for lr in SGD_SWEEP_32K],
    ]


def chosen(study: Study, sweep: Sequence[Cell]) -> Cell:
    """The cell with the best top-1 on the held-out images at the end of its run."""

    def top1(cell: Cell) -> float:
        final = study.final(Run(cell, 0, choice=True))
        assert final is not None
        return -1.0 if "diverged" in final else float(final["final_top1"])

    return max(sweep, key=top1)


def sweep_name(sweep: Sequence[Cell]) -> str:
    """Its optimizer and row."""
    return f"{'LARS' if sweep[0].optimizer == 'lars' else 'SGD'}, row {sweep[0].row.upper()}"


def table_cells(best: Sequence[Cell], quick: bool) -> list[Cell]:
    """The cells of the table, each once, in its order."""
    recipe = [Cell("256", "sgd"), *(Cell(row, "lars") for row in ROWS[1:])]
    if quick:
        return [*recipe, Cell("32k", "sgd", 12.8)]
    linear = [Cell(row, "sgd", lr) for row in ROWS[1:] for lr in LINEAR[row]]
    cells = [*recipe, *linear, *(as_in_recipe(cell) for cell in best)]
    return sorted(dict.fromkeys(cells), key=lambda cell: (ROWS.index(cell.row), cells.index(cell)))


def curve_panels(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells whose curves are drawn side by side, each with the 256 row before it: SGD's linear rates alone."""
    small = [cell for cell in cells if cell.row == "256"]
    linear = [cell for cell in cells if cell.optimizer == "sgd" and cell.lr in LINEAR.get(cell.row, ())]
    return {
        "LARS, the recipe's learning rates": [*small[-1:], *(Cell(row, "lars") for row in ROWS[1:])],
        "SGD, learning rate scaled linearly": [*small[-1:], *linear],
    }


def as_in_recipe(cell: Cell) -> Cell:
    """A cell of a sweep whose learning rate is the recipe's own is the recipe's."""
    own = {("256", "sgd"): 0.2, ("32k", "lars"): 29.0}.get((cell.row, cell.optimizer))
    return replace(cell, lr=None) if cell.lr == own else cell


def told(final: dict[str, Any]) -> str:
    """The end of a run in a word: top-1 in percent, after the last epoch."""
    return "diverged" if "diverged" in final else f"{final['final_top1']:.2f}"


def sweep_points(study: Study, sweep: Sequence[Cell]) -> list[Point]:
    """A sweep as it was found."""
    finals = [study.final(Run(cell, 0, choice=True)) for cell in sweep]
    return [
        Point(cell.lr or math.nan, final.get("final_top1"), as_in_recipe(cell).lr is None)
        for cell, final in zip(sweep, finals, strict=True)
        if final is not None
    ]


def results(study: Study, cells: Sequence[Cell], seeds: int, baseline: Cell) -> list[Result]:
    """The cells of the table as they were found; all are compared with `baseline`."""
    found = []
    for cell in cells:
        finals = [study.final(Run(cell, seed, choice=False)) for seed in range(seeds)]
        whole = [final for final in finals if final is not None and "diverged" not in final]
        found.append(
            Result(
                row=cell.row,
                batch=whole[0]["global_batch"] if whole else 0,
                optimizer=cell.optimizer,
                lr=whole[0]["lr"] if whole else cell.lr or math.nan,
                recipe=cell.lr is None,
                baseline=cell == baseline,
                final=tuple(final["final_top1"] for final in whole),
                best=tuple(final["best_top1"] for final in whole),
                diverged=len(finals) - len(whole),
            )
        )
    return found


if __name__ == "__main__":
    main()
