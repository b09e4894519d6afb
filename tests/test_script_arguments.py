"""What the scripts that measure take: bad input is refused beforehand, and what was given stands in the results."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from program import environment

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("page")


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("arguments")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], ""),
        (["--write", "docs/page.md"], ""),
        (["--write=docs/page.md"], ""),
        (["--wri", "docs/page.md"], ""),
        (["--rounds", "3", "--write", "page.md", "model=a b"], " --rounds 3 'model=a b'"),
        (["--world", "3", "--warmup=2"], " --world 3 --warmup=2"),
    ],
)
def test_the_command_is_told_with_its_options_but_without_the_page(
    page: ModuleType, monkeypatch: pytest.MonkeyPatch, given: list[str], told: str
) -> None:
    assert page.command_line(f"{SCRIPTS}/bench/bench.py", given) == f"python scripts/bench/bench.py{told}"
    monkeypatch.setattr(sys, "argv", ["bench.py", *given])
    assert page.command_line(f"{SCRIPTS}/bench/bench.py") == f"python scripts/bench/bench.py{told}"


def test_a_flag_that_writes_takes_no_word_with_it(page: ModuleType) -> None:
    told = page.command_line(f"{SCRIPTS}/bench.py", ["--write", "seed=1"], takes_page=False)
    assert told == "python scripts/bench.py seed=1"


def test_a_page_that_cannot_be_written_or_has_no_markers_is_refused(page: ModuleType, tmp_path: Path) -> None:
    whole, other, odd = tmp_path / "whole.md", tmp_path / "other.md", tmp_path / "odd.md"
    text = "<!-- a: begin -->\nfound\n<!-- a: end -->\n<!-- b: begin -->\n<!-- b: end -->\n"
    whole.write_text(text)
    other.write_text("<!-- a: end -->\n<!-- a: begin -->\n")
    odd.write_bytes(b"\xff\xfe\xff")
    assert page.writable_page("a", "b")(str(whole)) == whole
    page.check_page(whole, "a")
    assert whole.read_text() == text
    for path, names, why in (
        (whole, ("a", "c"), "<!-- c: begin --> and <!-- c: end --> are not there"),
        (other, ("a",), "are not there"),
        (odd, (), "utf-8"),
        (tmp_path, (), "Is a directory"),
        (tmp_path / "none.md", (), "No such file"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=why) as refused:
            page.writable_page(*names)(str(path))
        assert str(refused.value).startswith(f"{path}: ")


def test_counts_and_seconds_are_what_their_names_say(arguments: ModuleType) -> None:
    assert (arguments.count("1"), arguments.seconds("0"), arguments.seconds("2.5")) == (1, 0.0, 2.5)
    for text in ("0", "-1", "1.5", "nan", "many", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
            arguments.count(text)
    for text in ("-0.1", "nan", "inf", "long", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="0 or more"):
            arguments.seconds(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("bench/bench_reduction.py --images 0", "argument --images: 0"),
        ("bench/bench_reduction.py --seconds nan", "argument --seconds: nan"),
        ("bench/bench_startup.py --model nope", "argument --model: invalid choice: 'nope'"),
        ("bench/bench_startup.py --write README.md", "argument --write: README.md: <!-- bench_startup: begin -->"),
        ("bench/bench_trainer.py sede=1", "there is no key or group 'sede'. Did you mean 'seed'?"),
        ("bench/bench_monitoring.py model=resnet51", "model=resnet51: no such choice"),
        ("bench/bench_monitoring.py batch.size=7", "micro_batch=16 is no multiple of the ghost batch"),
        ("bench/count_launches.py --model nope", "argument --model: invalid choice: 'nope'"),
        ("bench/profile_step.py --threads 0", "argument --threads: 0"),
        ("bench/profile_step.py --write nowhere/page.md", "argument --write: nowhere/page.md: No such file"),
        ("verify/chaos.py --write README.md", "argument --write: README.md: <!-- chaos: begin -->"),
        ("verify/measure_float32_bound.py --write README.md", "<!-- measure_float32_bound: begin -->"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command: str, told: str) -> None:
    name, *rest = command.split()
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / name), *rest],
        cwd=SCRIPTS.parent,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert told in done.stderr.splitlines()[-1]
