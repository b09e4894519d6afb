"""Train the table (256, 8K, 16K, 32K) at reduced scale, with and without LARS, and write a report.

    python scripts/results/reproduce_scaled_table.py --data cifar10_jpeg.zip
    python scripts/results/reproduce_scaled_table.py --data fashion_mnist --quick
    python scripts/results/reproduce_scaled_table.py --data cifar10_jpeg.zip --write docs/results/scaled

`--data`: a folder or .zip of small images with train/ and test/ (or val/), or a set that torchvision downloads, cifar10
or fashion_mnist. The same command resumes after an interruption, unless settings or images have changed.

1. Choices: three sweeps of the learning rate (SGD at the 256 row, SGD and LARS at the 32K row), with one run for each
   value. They are evaluated on a held-out tenth of the training images; the test images are not read.
2. The table: runs on all training images, evaluated on the test images, with several seeds for each cell:
   - the unchanged rows of the recipe;
   - the 256 row with the best learning rate of its sweep;
   - for each LARS row plain SGD, with the learning rate scaled linearly from 0.1 at 256 (at 32K also from 0.2);
   - at 32K both optimizers with the best learning rates of their sweeps.

All runs share network, data, epochs, ghost batch, schedule (warm-up scaled with the epochs) and precision. Plain SGD
keeps the weight decay of the recipe's SGD row; at large batches it has the warm-up of the corresponding LARS row.

Takes a night on two cores, with --quick ten minutes. Figures: docs/results.md.
"""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from scaled_report import (
    MARKER,
    Point,
    Result,
    draw_curves,
    draw_sweeps,
    result_table,
    sweep_table,
)
from study_runs import Study, add_data, add_write, write_records

ROWS = ("256", "8k", "16k", "32k")
SGD_SWEEP_256 = (0.05, 0.1, 0.2)
# Equally many values for both, a factor of 2 apart, including the recipe's or the linearly scaled value.
SGD_SWEEP_32K = (0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
LARS_SWEEP_32K = (3.625, 7.25, 14.5, 29.0, 58.0, 116.0)
LINEAR = {"8k": (3.2,), "16k": (6.4,), "32k": (12.8, 25.6)}
RECIPE = {("256", "sgd"): 0.2, ("32k", "lars"): 29.0}
# The recipe's 256 row, which has no LARS.
SGD = ("optimizer=sgd", "optimizer.weight_decay=1e-4")
# Epochs and seeds of a full study and of a quick one. 15 epochs are too few updates for the 32K row of this network:
# at lr 29 it reached 72.5 % on the held-out images, and 79.3 % after 30 epochs.
EPOCHS, SEEDS = (30, 4), (3, 1)
LOG_EVERY = {"256": 2000, "8k": 100, "16k": 40, "32k": 20}


@dataclass(frozen=True)
class Cell:
    """A row with an optimizer and a learning rate (None: the value of the recipe)."""

    row: str
    optimizer: str
    lr: float | None = None

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings of the cell's runs."""
        lr = () if self.lr is None else (f"optimizer.lr={self.lr:g}",)
        # At the 256 row plain SGD is the recipe's own.
        return (f"batch={self.row}", *lr, *(SGD if self.optimizer == "sgd" and self.row != "256" else ()))


@dataclass(frozen=True)
class Run:
    """One run of a cell, for a choice (on held-out images) or for the table."""

    cell: Cell
    seed: int
    choice: bool

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        lr = "recipe" if self.cell.lr is None else f"{self.cell.lr:g}"
        return f"{'choice' if self.choice else 'table'}-{self.cell.row}-{self.cell.optimizer}-{lr}-seed{self.seed}"

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings of the run, besides those that all runs of the study share."""
        holdout = ("data.holdout=0.1",) if self.choice else ()
        return (*holdout, *self.cell.settings, f"log_every={LOG_EVERY[self.cell.row]}", f"seed={self.seed}")


def sweep_cells(quick: bool) -> dict[str, list[Cell]]:
    """Return the cells of each sweep; a quick study has none."""
    if quick:
        return {}
    return {
        "SGD, row 256": [Cell("256", "sgd", lr) for lr in SGD_SWEEP_256],
        "LARS, row 32K": [Cell("32k", "lars", lr) for lr in LARS_SWEEP_32K],
        "SGD, row 32K": [Cell("32k", "sgd", lr) for lr in SGD_SWEEP_32K],
    }


def table_cells(best: Sequence[Cell], quick: bool) -> list[Cell]:
    """Return the distinct cells of the table, in order."""
    recipe = [Cell("256", "sgd"), *(Cell(row, "lars") for row in ROWS[1:])]
    if quick:
        return [*recipe, Cell("32k", "sgd", 12.8)]
    linear = [Cell(row, "sgd", lr) for row in ROWS[1:] for lr in LINEAR[row]]
    cells = [*recipe, *linear, *map(as_in_recipe, best)]
    return sorted(dict.fromkeys(cells), key=lambda cell: (ROWS.index(cell.row), cells.index(cell)))


def as_in_recipe(cell: Cell) -> Cell:
    """Return the cell, with lr None if it is the recipe's."""
    return replace(cell, lr=None) if cell.lr == RECIPE.get((cell.row, cell.optimizer)) else cell


def result(study: Study, cell: Cell, seeds: int, baseline: Cell) -> Result:
    """Return the results of a cell of the table."""
    finals = [final for seed in range(seeds) if (final := study.outcome(Run(cell, seed, choice=False)))]
    return Result(cell.row, cell.optimizer, cell.lr, cell == baseline, finals, diverged=seeds - len(finals))


def write(args: Namespace, study: Study, sweeps: dict[str, list[Point]], cells: list[Cell], lines: list[str]) -> None:
    """Write records, a report by lars-report, plots, and the page with `lines` into `args.write`."""
    from lars_train.report.lars_report import read_rows
    from lars_train.report.write import write_report

    def runs_of(cell: Cell) -> list[Path]:
        return [study.folder / Run(cell, seed, choice=False).name for seed in range(args.seeds)]

    folder = args.write
    choices = [study.folder / Run(c, 0, choice=True).name for own in sweep_cells(args.quick).values() for c in own]
    write_records(choices, folder / "runs")
    records = {cell: write_records(runs_of(cell), folder / "runs") for cell in cells}
    write_report(read_rows([record for own in records.values() for record in own]), folder / "report")
    if sweeps:
        draw_sweeps(sweeps, folder / "sweeps")
    small = [cell for cell in cells if cell.row == "256"][-1]
    linear = [cell for cell in cells if cell.optimizer == "sgd" and cell.lr in LINEAR.get(cell.row, ())]
    panels = {
        "LARS, the recipe's learning rates": [small, *(Cell(row, "lars") for row in ROWS[1:])],
        "SGD, learning rate scaled linearly": [small, *linear],
    }
    draw_curves({title: [records[cell] for cell in own] for title, own in panels.items()}, folder / "curves")
    what = [f"`{shared.command_line(__file__)} --write {folder}` on {shared.cpu_name()}, {shared.software()}.", ""]
    shared.write_page([*what, *lines], folder / "README.md", MARKER)


def parse_arguments(parser: ArgumentParser) -> Namespace:
    """Return the command line, checked and completed."""
    add_data(parser)
    add_write(parser, "The table at reduced scale", MARKER, required=False)
    parser.add_argument("--quick", action="store_true", help="recipe rows and SGD at 32K, 4 epochs, one seed")
    parser.add_argument("--epochs", type=shared.positive_int, help="per run (30; quick: 4)")
    args = parser.parse_args()
    args.epochs, args.seeds = args.epochs or EPOCHS[args.quick], SEEDS[args.quick]
    args.runs = Path("runs") / f"scaled-{Path(args.data).stem}{'-quick' if args.quick else ''}"
    return args


def main() -> None:
    """Make the choices, then the table; print both, and write them."""
    args = parse_arguments(shared.make_parser(__doc__))
    study = Study(args.data, args.runs, [f"epochs={args.epochs}"])
    sweeps = {name: [Run(cell, 0, choice=True) for cell in own] for name, own in sweep_cells(args.quick).items()}
    study.train([run for own in sweeps.values() for run in own])
    best = [max(own, key=lambda run: study.outcome(run).get("final_top1", -1.0)).cell for own in sweeps.values()]
    cells = table_cells(best, args.quick)
    study.train([Run(cell, seed, choice=False) for seed in range(args.seeds) for cell in cells])
    points = {
        name: [
            Point(run.cell.lr or math.nan, study.outcome(run).get("final_top1"), as_in_recipe(run.cell).lr is None)
            for run in own
        ]
        for name, own in sweeps.items()
    }
    baseline = as_in_recipe(best[0]) if best else cells[0]
    lines = [f"{args.epochs} epochs, {args.seeds} seed(s) for a cell of the table, one for a point of a sweep.", ""]
    lines += result_table([result(study, cell, args.seeds, baseline) for cell in cells])
    for name, own in points.items():
        lines += ["", *sweep_table(name, own)]
    print("\n".join(lines))
    if args.write:
        write(args, study, points, cells, lines)


if __name__ == "__main__":
    main()
