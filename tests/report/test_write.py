from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lars_train.errors import ConfigError
from lars_train.report import write
from lars_train.report.compare import Row, make_rows
from lars_train.report.read import read_run
from lars_train.report.write import sweep_folder, write_report

MakeRun = Callable[..., Path]
FILES = ["curves.png", "curves.svg", "report.html", "table.csv", "table.md"]


@pytest.fixture
def rows(make_run: MakeRun) -> list[Row]:
    return make_rows([read_run(make_run("a"))])


@pytest.fixture(autouse=True)
def stub_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the slow contents, which other tests cover."""
    monkeypatch.setattr(write, "overview", lambda rows: {"png": b"p", "svg": b"s"})
    monkeypatch.setattr(write, "page", lambda rows, folder: "page")


def test_a_report_is_five_files_and_replaces_an_earlier_one(rows: list[Row], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report"
    for _ in range(2):
        assert sorted(path.name for path in write_report(rows, out)) == FILES
        assert sorted(path.name for path in out.iterdir()) == [write.MARKER, *FILES]
        (out / "table.md").write_text("old")
        (out / "notes.txt").write_text("the user's own")
        write_report(rows, out)
        assert "# Results" in (out / "table.md").read_text()
        assert (out / "notes.txt").read_text() == "the user's own"
        (out / "notes.txt").unlink()


def test_a_folder_with_other_files_is_unchanged(rows: list[Row], tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    (others / "table.md").write_text("mine")
    with pytest.raises(ConfigError, match="contains files that are not part of a report"):
        write_report(rows, others)
    with pytest.raises(ConfigError, match="is a file"):
        write_report(rows, others / "table.md")
    with pytest.raises(ConfigError, match="not part of a report"):
        write_report(rows, rows[0].first.directory)
    assert [(p.name, p.read_text()) for p in others.iterdir()] == [("table.md", "mine")]


def test_an_empty_folder_is_accepted(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert write_report(rows, tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_folder_is_an_error(rows: list[Row], tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="cannot write the report"):
        write_report(rows, closed / "report")


def test_a_full_disk_keeps_the_earlier_report(rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        if "curves" in path.name:
            whole(path, data[:10])
            raise OSError(28, "No space left on device")
        return whole(path, data)

    write_report(rows, tmp_path / "out")
    before, whole = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}, Path.write_bytes
    monkeypatch.setattr(write, "csv_text", lambda *arguments: "another")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match=r"cannot write the report \(.*No space left"):
        write_report(rows, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_file_in_place_of_a_folder_is_an_error(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write the report"):
        write_report(rows, tmp_path / "file" / "report")


def test_the_report_of_a_sweep_is_beside_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = sweep_folder([Path("runs/a"), Path("runs/b")])
    assert one == sweep_folder([tmp_path / "runs/b", Path("runs/a")])
    assert one.parent == Path("runs")
    assert one != sweep_folder([Path("runs/a")])
    assert sweep_folder([Path("runs/x/a"), Path("runs/y/b")]).parent == Path("runs")
    assert sweep_folder([Path("/big/a"), Path("/small/b")]).parent == Path("runs")
