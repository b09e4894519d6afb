"""scripts/shared.py: arguments of scripts, and the parts of pages that scripts write."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny import start

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("shared")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ""),
        (["--write", "docs/page.md"], ""),
        (["--write=docs/page.md"], ""),
        (["--rounds", "3", "--write", "page.md", "model=a b"], " --rounds 3 'model=a b'"),
        (["--world", "3", "--warmup=2"], " --world 3 --warmup=2"),
    ],
)
def test_the_command_on_a_page_omits_the_write_option(shared: ModuleType, given: list[str], expected: str) -> None:
    assert shared.command_line(f"{SCRIPTS}/verify/chaos.py", given) == f"python scripts/verify/chaos.py{expected}"


def test_a_page_without_markers_or_write_access_is_rejected(shared: ModuleType, tmp_path: Path) -> None:
    whole, other, odd = tmp_path / "whole.md", tmp_path / "other.md", tmp_path / "odd.md"
    text = "<!-- a: begin -->\nfound\n<!-- a: end -->\n<!-- b: begin -->\n<!-- b: end -->\n"
    whole.write_text(text)
    other.write_text("<!-- a: end -->\n<!-- a: begin -->\n")
    odd.write_bytes(b"\xff\xfe\xff")
    assert shared.check_page(whole, "a", "b") == whole
    assert whole.read_text() == text
    for path, names, why in (
        (whole, ("a", "c"), "<!-- c: begin --> and <!-- c: end --> are missing"),
        (other, ("a",), "are missing"),
        (odd, (), "utf-8"),
        (tmp_path, (), "Is a directory"),
        (tmp_path / "none.md", (), "No such file"),
    ):
        with pytest.raises(ValueError, match=why) as rejected:
            shared.check_page(path, *names)
        assert str(rejected.value).startswith(f"{path}: ")


def test_results_replace_only_the_text_between_markers(shared: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a: begin -->\nold\n<!-- a: end -->\nafter\n")
    shared.publish(["new", "lines"], page, "a")
    assert page.read_text() == "before\n<!-- a: begin -->\n\nnew\nlines\n\n<!-- a: end -->\nafter\n"


def test_a_count_is_a_whole_number_of_at_least_1(shared: ModuleType) -> None:
    assert shared.positive_int("1") == 1
    for text in ("0", "-1", "1.5", "nan", "many", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
            shared.positive_int(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bench/bench_step.py --images 0", "argument --images: 0"),
        ("bench/bench_monitoring.py batch.size=7", "micro_batch=16 is not a multiple of the ghost batch"),
        ("bench/bench_step.py --only nope", "--only 'nope': no such contender"),
        ("bench/bench_startup.py --write nowhere/page.md", "argument --write: nowhere/page.md: No such file"),
        ("bench/input/bench_input.py nowhere", "nowhere: has fewer than two JPEGs"),
        ("verify/chaos.py --write README.md", "argument --write: README.md: <!-- chaos: begin -->"),
        ("verify/measure_float32_bound.py --world 8", "--world: 7 ghost batches"),
        ("results/reproduce_scaled_table.py --data nowhere.zip", "--data: nowhere.zip: no such file or folder"),
    ],
)
def test_bad_input_prints_one_line_and_exits_with_2(command: str, message: str) -> None:
    name, *rest = command.split()
    done = start([sys.executable, str(SCRIPTS / name), *rest], SCRIPTS.parent)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
