"""bench_step.py, bench_reduction.py and profile_step.py: every contender takes part; the shares are whole."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
from program import environment, start

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench" / "bench_step.py"


@pytest.mark.slow
def test_a_page_gets_a_line_for_each_contender_with_rates_ratios_and_memory(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench_step: begin -->\n<!-- bench_step: end -->\nafter\n")
    names = ["(a) bare, fp32 NCHW", "(d) lars-train"]
    command = f"--case small --images 8 --size 16 --threads 1 --write {page}".split()
    command += "--starts 2 --rounds 2 --seconds 0.01 --only".split()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *command, *names], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| (")]
    assert [line[0] for line in lines] == names
    for _, rates, to_bare, _, _, _, memory in lines:
        assert float(rates.split()[0].replace(",", "")) > 0
        assert float(to_bare) > 0
        assert float(memory.replace(",", "")) > 0


@pytest.mark.slow
def test_a_sweep_has_a_row_for_each_configuration_failed_or_not(tmp_path: Path) -> None:
    command = "--case small --size 16 --threads 1 --ghost 4 --sweep 8 4 --rounds 2 --seconds 0 --only".split()
    names = ["(d) lars-train", "(b) timm", "(c) best bare, eager"]
    done = start([sys.executable, str(SCRIPT), *command, *names], tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| (")]
    ours, timm, bare = names
    wanted = [(ours, "8", "4"), (timm, "8", "-"), (bare, "8", "-"), (ours, "8", "8")]
    wanted += [(ours, "4", "4"), (timm, "4", "-"), (bare, "4", "-")]
    assert [tuple(row[:3]) for row in rows] == wanted
    for name, images, _, took, speed, _ in rows:
        if name == timm:
            assert took == "LookupError: timm has no such network"
        else:
            milliseconds = float(took.split()[0].replace(",", ""))
            assert float(speed.replace(",", "")) == pytest.approx(1000 * int(images) / milliseconds, rel=0.05)


def test_a_signal_leaves_the_whole_rounds_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module("bench_step")
    turns = iter([1.0, 2.0, 3.0, 4.0, 5.0])

    class Process:
        memory, skipped = dict.fromkeys([script.BARE, script.OURS], 1.0), dict[str, str]()

        def turn(self, name: str, seconds: float) -> float:
            found = next(turns, None)
            if found is None:
                raise SystemExit(143)
            return found

    monkeypatch.setattr(script, "served", lambda names, case: nullcontext(Process()))
    args = Namespace(only=None, starts=1, rounds=9, seconds=0.0)
    found: dict[str, list[float]] = {}
    with pytest.raises(SystemExit):
        script.measure(script.CASES_ON_CUDA[0], args, [], found, {})
    assert sorted(value for own in found.values() for value in own) == [1, 2, 3, 4]
    assert [len(own) for own in found.values()] == [2, 2]


@pytest.mark.slow
def test_the_exchange_of_two_processes_is_timed_beside_none(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two cores are wanted")
    page = tmp_path / "page.md"
    page.write_text("<!-- bench_reduction: begin -->\n<!-- bench_reduction: end -->\n")
    script = SCRIPT.with_name("bench_reduction.py")
    command = f"--case small --images 4 --size 16 --accumulation 2 --rounds 2 --seconds 0.01 --write {page}".split()
    done = subprocess.run(
        [sys.executable, str(script), *command], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (row,) = (line for line in page.read_text().splitlines() if line.startswith("| small"))
    _, of_a_rank, together, alone, ratio = (cell.strip() for cell in row.strip("|").split("|"))
    assert of_a_rank == "2 x 4"
    assert 0 < float(together) < 60
    assert 0 < float(alone) < 60
    assert float(ratio.split()[0]) > 0


@pytest.mark.slow
def test_the_kinds_of_operations_account_for_all_of_a_step(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- profile_step: begin -->\n<!-- profile_step: end -->\n")
    script = SCRIPT.with_name("profile_step.py")
    command = f"--case small --images 8 --size 16 --updates 1 --threads 1 --write {page}".split()
    done = start([sys.executable, str(script), *command], tmp_path)
    assert done.returncode == 0, done.stderr
    lines = page.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "% |" in line]
    found = {kind: [float(cell.rstrip("%") or 0) for cell in cells] for kind, *cells in rows}
    assert sum(map(sum, found.values())) == pytest.approx(100, abs=0.1 * len(found))
    assert found["convolutions"][1] > 0


@pytest.mark.parametrize(
    ("name", "callers", "expected"),
    [
        ("aten::mkldnn_convolution", ["aten::_convolution", "aten::conv2d"], ("convolutions", False)),
        ("aten::convolution_backward", ["ConvolutionBackward0"], ("convolutions", True)),
        ("aten::native_batch_norm", [], ("batch norms", False)),
        ("aten::threshold_backward", ["ReluBackward0"], ("ReLUs", True)),
        ("aten::clamp_min_", ["aten::relu_"], ("ReLUs", False)),
        ("aten::copy_", ["aten::_to_copy", "ToCopyBackward0"], ("conversions between precisions and layouts", True)),
        ("aten::add_", ["Optimizer.step#LARS.step"], ("optimizer", False)),
        ("aten::addmm", ["aten::linear"], ("pooling, the last layer, loss", False)),
        ("aten::add_", [], ("sums with the shortcuts, of gradients", False)),
        ("aten::fill_", [], ("other operations", False)),
    ],
)
def test_an_operation_is_of_the_kind_that_its_name_and_its_callers_say(
    monkeypatch: pytest.MonkeyPatch, name: str, callers: list[str], expected: tuple[str, bool]
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    assert importlib.import_module("profile_step").kind_of(name, callers) == expected
