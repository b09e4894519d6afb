"""Write a report to a folder, and never overwrite other files there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from lars_train.errors import ConfigError
from lars_train.fsutil import discard
from lars_train.messages import utf8
from lars_train.report.compare import Row
from lars_train.report.curves import overview
from lars_train.report.page import page
from lars_train.report.table import csv_text, markdown

MARKER = ".lars-report"
"""File that marks a folder as one that lars-report may write to."""


def write_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the report of `rows` into `folder`, replacing an earlier report. Return the paths of the files.

    Raises `ConfigError` for a folder that cannot be created or written, or that contains other files.
    """
    check_folder(folder)
    contents = {
        "table.md": utf8(markdown(rows)),
        "table.csv": utf8(csv_text(rows, folder)),
        **{f"curves.{kind}": data for kind, data in overview(rows).items()},
        "report.html": utf8(page(rows, folder)),
    }
    partial = {name: folder / f".{name}.partial" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text("lars-report overwrites its files in this folder.\n")
        for name, data in contents.items():
            partial[name].write_bytes(data)
        # Rename last, so that a report is never part new and part old.
        for name, path in partial.items():
            path.replace(folder / name)
    except OSError as error:
        for path in partial.values():
            discard(path)
        raise ConfigError(f"{folder}: cannot write the report ({error}). Choose another --out.") from None
    return [folder / name for name in contents]


def check_folder(folder: Path) -> None:
    """Raise `ConfigError` if `folder` contains files other than a report's. Writes nothing."""
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise ConfigError(f"{folder}: is a file. Choose another --out for the report.")
        if any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise ConfigError(f"{folder}: contains files that are not part of a report. Choose another --out.")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read ({error}). Choose another --out.") from None


def sweep_folder(directories: Sequence[Path]) -> Path:
    """Return the folder for the report of a sweep: beside its runs, with a name derived from their paths."""
    paths = sorted(str(directory.resolve()) for directory in directories)
    digest = hashlib.sha256("\0".join(paths).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    parents = {Path(path).parent for path in paths}
    beside = Path(os.path.commonpath([str(parent) for parent in parents]))
    # Runs on several disks may share only a folder such as /, which the user cannot write to.
    if len(parents) > 1 and len(beside.parts) < 3:
        beside = Path("runs")
    return Path(os.path.relpath(beside)) / f"report-{digest}"
