"""Writes a report into a folder of its own, and over nothing that is not its own."""

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

MARK = ".lars-report"
"""The file that tells a folder of reports from a folder of other files."""


def write_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the report of `rows` into `folder`; the files. One that was written there before is replaced.

    Raises `ConfigError` for a folder that cannot be made or written to, or that holds other files.
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
        (folder / MARK).write_text("lars-report writes here, over its own files.\n")
        for name, data in contents.items():
            partial[name].write_bytes(data)
        # Only now, so that no report is new in one file and old in another.
        for name, path in partial.items():
            path.replace(folder / name)
    except OSError as error:
        for path in partial.values():
            discard(path)
        raise ConfigError(f"{folder}: the report cannot be written there ({error}); choose another --out.") from None
    return [folder / name for name in contents]


def check_folder(folder: Path) -> None:
    """Raise `ConfigError` for a folder that holds files of others. Writes nothing."""
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise ConfigError(f"{folder}: it is a file; choose another --out for the report.")
        if any(folder.iterdir()) and not (folder / MARK).is_file():
            raise ConfigError(f"{folder}: it holds files that are no report's; choose another --out.")
    except OSError as error:
        raise ConfigError(f"{folder}: it cannot be read ({error}); choose another --out.") from None


def sweep_folder(directories: Sequence[Path]) -> Path:
    """Where the report of a sweep goes: beside its runs, by a name that the same runs give again."""
    whole = sorted(str(directory.resolve()) for directory in directories)
    digest = hashlib.sha256("\0".join(whole).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    parents = {Path(path).parent for path in whole}
    beside = Path(os.path.commonpath([str(parent) for parent in parents]))
    # Runs that are spread over the disks have no folder in common but one that is nobody's.
    if len(parents) > 1 and len(beside.parts) < 3:
        beside = Path("runs")
    return Path(os.path.relpath(beside)) / f"report-{digest}"
