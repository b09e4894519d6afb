from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lars_train.report import lars_report, write
from lars_train.report.lars_report import main, report_sweep

MakeRun = Callable[..., Path]


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


def test_a_report_needs_no_torch_or_training_code(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("a", "8k")
    make_run("b", ended=None)
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    code = (
        "import sys\n"
        "from lars_train.report.lars_report import main\n"
        "main(['runs', '--out', 'out'])\n"
        "print('LOADED', *sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'torchvision', 'lars_train')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    loaded = done.stdout.splitlines()[-1].split()
    assert loaded[0] == "LOADED"
    rooms = {".".join(name.split(".")[:2]) for name in loaded[1:]}
    own = "config errors fsutil messages optim report run_plan targets"
    assert rooms == {"lars_train", *(f"lars_train.{name}" for name in own.split())}
    assert "| 8k " in done.stdout
    assert "written to out/" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == [
        "curves.png",
        "curves.svg",
        "report.html",
        "table.csv",
        "table.md",
    ]
    assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before


def test_bad_input_exits_with_2_and_writes_nothing(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run("a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/table.md").write_text("mine")
    for arguments, message in (
        (("nowhere",), "nowhere: no such folder"),
        (("mine",), "mine: no run directory found"),
        (("runs", "--out", "mine"), "mine: contains files that are not part of a report"),
        (("runs", "--out", str(run)), "not part of a report"),
    ):
        assert exit_code(*arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err
        assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "runs"]
    assert (tmp_path / "mine/table.md").read_text() == "mine"


def test_an_empty_path_is_not_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # An unset shell variable gives an empty argument.
    monkeypatch.chdir(tmp_path)
    for arguments in (("",), ("runs", "--out", "")):
        assert exit_code(*arguments) == 2
        assert "is empty. Pass a path" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_default_output_folder_depends_on_the_arguments(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(lars_report, "write_report", lambda rows, folder: written.append(folder) or [])
    monkeypatch.chdir(tmp_path)
    make_run("a")
    make_run("b", seed=1)
    for arguments in (["runs"], ["runs/a"], ["runs/a", "runs/b"], ["runs", "--out", "x"]):
        main(arguments)
    assert [path.as_posix() for path in written] == ["runs/report", "runs/a/report", "report", "x"]


def test_sweep_results_are_printed_if_the_report_fails(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = {make_run("a", "8k"): "batch=8k", make_run("b", ended="failed", reason="Diverged: x"): "batch=32k"}

    def fail(*arguments: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(write, "overview", fail)
    report_sweep(runs)
    out, err = capsys.readouterr()
    assert "| 8k " in out
    assert "(failed): at update 12: Diverged: x" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith(str(tmp_path))] == list(runs.values())
    assert err == "lars-train: cannot write the report: RuntimeError: no fonts\n"
    monkeypatch.setattr(lars_report, "read_rows", fail)
    report_sweep(runs)
    out, err = capsys.readouterr()
    assert [line.split()[-1] for line in out.splitlines()] == list(runs.values())
    assert "no fonts" in err
