"""The command ``lars-report``: write a report from run directories. ``lars-train -m`` reports its sweep, too."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lars_train.errors import ConfigError
from lars_train.messages import complain, ignore_closed_output, not_empty, open_standard_streams, say
from lars_train.report.compare import Row, make_rows
from lars_train.report.files import relative_path
from lars_train.report.read import find_runs, read_run
from lars_train.report.table import terminal
from lars_train.report.write import check_folder, sweep_folder, write_report

BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lars-report``. Exit codes: 0 for success; 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="lars-report",
        description="Write a table, curves and an HTML page from run directories. The directories are not modified.",
    )
    parser.add_argument(
        "directory", nargs="+", type=not_empty, help="a run directory, or a folder that contains run directories"
    )
    parser.add_argument(
        "--out",
        type=not_empty,
        help="output folder (default: report/ in the given directory, or in the current one if several are given)",
    )
    open_standard_streams()
    args = parser.parse_args(arguments)
    given = list(map(Path, args.directory))
    out = Path(args.out) if args.out else (given[0] if len(given) == 1 else Path()) / "report"
    try:
        directories = find_runs(given)
        check_folder(out)
        rows = read_rows(directories)
        files = write_report(rows, out)
    except ConfigError as error:
        with ignore_closed_output():
            print(f"lars-report: {error}", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)
    say(f"{terminal(rows)}\n\n{' '.join(path.name for path in files)}\nwritten to {out}/")


def read_rows(directories: Sequence[Path]) -> list[Row]:
    """Return the table rows of the runs in `directories`."""
    return make_rows([read_run(directory) for directory in directories])


def report_sweep(runs: Mapping[Path, str]) -> None:
    """Print the table of a sweep's runs, and write their report beside them. `runs`: label by run directory.

    Errors are only printed, because the runs themselves are done.
    """
    rows: list[Row] = []
    with _errors_printed("cannot make the table"):
        rows = read_rows(list(runs))
        say(terminal(rows))
    for directory, label in runs.items():
        say(f"{directory}  {label}")
    with _errors_printed("cannot write the report"):
        folder = sweep_folder(list(runs))
        write_report(rows, folder)
        say(f"report         {relative_path(folder / 'report.html', Path())}")


@contextlib.contextmanager
def _errors_printed(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        complain(f"{what}: {type(error).__name__}: {error}")
