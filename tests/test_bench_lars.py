"""scripts/bench/bench_lars.py: counts of operations and host syncs, contenders from packages, and tables."""

from __future__ import annotations

import gc
import importlib
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SHAPES = [(4, 3), (5,), (2, 3, 3, 3)]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench"))
    return importlib.import_module("bench_lars")


def host_loop(parameters: list[nn.Parameter]) -> Any:
    """Return a step that makes, for each parameter, 5 operations and reads 2 values."""

    @torch.no_grad()
    def step() -> None:
        for p in parameters:
            assert p.grad is not None
            w, g = p.data.norm(), p.grad.norm()
            if w != 0 and g != 0:
                p.add_(p.grad)

    return SimpleNamespace(step=step)


def reader(read: Callable[[nn.Parameter], object]) -> Callable[[list[nn.Parameter]], Any]:
    """Return a function that builds a step which calls `read` on the first parameter."""
    return lambda parameters: SimpleNamespace(step=lambda: read(parameters[0]))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (host_loop, (15, 6)),
        (reader(lambda p: p.sum().item()), (1, 1)),
        (reader(lambda p: p.detach().to("cpu", copy=True).add_(1)), (1, 1)),
        # Views, an allocation, and a value on the host.
        (reader(lambda p: (p.detach().view(-1)[1:], torch.empty_like(p), torch.ones(()).add(1).item())), (0, 0)),
        # Decay, momentum, addition to the momentum, update: each on all tensors.
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4), (4, 0)),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True), (1, 0)),
    ],
)
def test_counts_equal_a_count_by_hand(bench: ModuleType, build: Any, expected: tuple[int, int]) -> None:
    assert bench.count_calls(build, SHAPES) == expected


def test_ours_makes_equally_many_operations_for_any_model(bench: ModuleType) -> None:
    for name in (bench.OURS, bench.TORCH_LARS):
        operations, syncs = bench.count_calls(bench.OPTIMIZERS[name], SHAPES)
        assert 10 < operations <= 25
        assert syncs == 0
        assert bench.count_calls(bench.OPTIMIZERS[name], SHAPES * 10) == (operations, 0)
    # 3 operations for each parameter, and 11 more for a matrix.
    assert bench.count_calls(bench.MocoLars, SHAPES) == (2 * 11 + 3 * 3, 0)


def test_torch_lars_and_the_rewritten_loop_step_like_ours(bench: ModuleType) -> None:
    torch.manual_seed(0)
    weights, grads = ([torch.randn(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(2))

    def steps(build: Callable[[list[nn.Parameter]], Any]) -> list[torch.Tensor]:
        parameters = [nn.Parameter(w.clone()) for w in weights]
        optimizer = build(parameters)
        for _ in range(3):
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
        return [p.detach() for p in parameters]

    torch.testing.assert_close(steps(bench.torch_lars), steps(bench.OPTIMIZERS[bench.OURS]))
    assert sys.modules["torch_lars.fused_sgd"].kernels is None
    torch.testing.assert_close(steps(bench.MocoLars), steps(bench.as_moco_v3))


def test_one_file_of_a_package_is_loaded_alone(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unloadable_bolts-1.0.dist-info").mkdir()
    (tmp_path / "unloadable_bolts-1.0.dist-info" / "METADATA").write_text("Name: unloadable-bolts\nVersion: 1.0\n")
    (tmp_path / "bolts").mkdir()
    (tmp_path / "bolts" / "__init__.py").write_text("raise ImportError\n")
    code = "from pl_bolts.utils.stability import under_review\n\n@under_review()\nclass LARS:\n    number = 7\n"
    (tmp_path / "bolts" / "lars.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert bench.from_file("unloadable-bolts", "bolts/lars.py", "LARS").number == 7
    assert "pl_bolts.utils.stability" not in sys.modules


def test_the_full_page_and_the_short_page_are_written(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["SGD, fused", bench.OURS, "MoCo v3's loop", "missing"]
    monkeypatch.setattr(bench, "SSL", names)
    monkeypatch.setitem(bench.OPTIMIZERS, "missing", lambda p: bench.from_file("no-such-package", "lars.py", "LARS"))
    weights = [torch.randn(shape) for shape in SHAPES]
    given = [bench.Problem("plain", weights, names[:3]), bench.Problem("network", weights, names)]
    monkeypatch.setattr(bench, "problems", lambda device: given)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(bench.shared, "pin_to_cores", threads.append)
    page, short = tmp_path / "page.md", tmp_path / "short.md"
    page.write_text("<!-- bench_lars cpu: begin -->\nold\n<!-- bench_lars cpu: end -->\n")
    short.write_text("<!-- bench_lars short: begin -->\nold\n<!-- bench_lars short: end -->\n")
    bench.main(None, Namespace(device="cpu", threads=[1, 2], rounds=2, write=page, short=[short]))
    assert gc.isenabled()
    assert threads == [1, 1, 2, 2] * 2
    _, plain, network = page.read_text().split("\n**")
    assert short.read_text().split("\n**")[1].splitlines()[:10] == network.splitlines()[:10]
    assert network.splitlines()[0] == "network**: 3 tensors, 71 elements."
    assert "Skipped: missing (not installed)." in network
    for text, columns in ((plain, 7), (network, 9)):
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
        assert [row[0] for row in rows] == ["one step of", *names[:3]]
        assert {len(row) for row in rows} == {columns}
        assert rows[1][2] == rows[1][5] == rows[2][3] == rows[2][6] == "1.00"
    assert [row[7:] for row in rows[1:]] == [["1", "0"], [rows[2][7], "0"], ["31", "0"]]
