"""Logging costs nothing between log lines; docs/benchmarks.md states the measured cost of a log line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lars_train.optim import fused_sgd, rescale
from lars_train.training.trainer import Trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


SETTINGS = "model=tiny data.image_size=16 batch.size=8 micro_batch=4 model.ghost_batch=4".split()
# Methods that copy a tensor's values to the host, which waits until the device has computed them.
READS = {"tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__"}


class Operators(TorchDispatchMode):
    """Counts the operators, copies included, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name().partition("::")[2].partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts the calls that copy values to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Update:
    """The cost of one update: operators, values that the host read, and bytes of log lines."""

    operators: Counter[str]
    reads: int
    written: int


def updates(folder: Path, log_every: int, count: int) -> list[Update]:
    """Return the costs of the first `count` updates of a run."""
    import bench_monitoring

    run = bench_monitoring.make_run(folder, log_every, count, SETTINGS)
    assert run.logger.log is not None
    found, lines = [], folder / "metrics.jsonl"
    with closing(run._batches()) as batches:
        run.begin()
        for _ in range(count):
            before = lines.stat().st_size
            with Operators() as operators, Reads() as reads:
                run._one_update(batches)
            found.append(Update(operators.calls, reads.count, lines.stat().st_size - before))
    run.close()
    return found


def test_monitoring_costs_nothing_between_log_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on an accelerator. On the CPU LARS reads norms, which costs no wait there.
    monkeypatch.setattr(fused_sgd, "applies_to", lambda base, rule: False)
    monkeypatch.setattr(rescale, "is_host_tensor", lambda tensor: False)
    every, never = 3, 10**9
    with_lines = updates(tmp_path / "logs", every, 7)
    run_update = Trainer.run_update
    monkeypatch.setattr(Trainer, "run_update", lambda *given, measure: run_update(*given, measure=False))
    without = updates(tmp_path / "silent", never, 7)
    # The first update of a run copies its images, once.
    for update in range(2, 8):
        logged, alone = with_lines[update - 1], without[update - 1]
        assert alone.operators["convolution_backward"] > 0
        assert alone.reads == alone.written == 0
        if update % every:
            assert logged == alone, update
        else:  # the counters count
            assert logged.operators.total() > alone.operators.total()
            assert logged.reads > 0
            assert logged.written > 0


@pytest.mark.slow
def test_the_script_times_log_lines() -> None:
    import bench_monitoring

    output = "\n".join(bench_monitoring.measure(2, 2, SETTINGS))
    line = re.search(r"measuring for a line and writing it: (\d+\.\d+) ms, (\d+\.\d+) % of the updates' time", output)
    assert line is not None
    assert 0 < float(line.group(1)) < 1000
    assert float(line.group(2)) > 0


def test_the_page_states_a_cost_below_one_percent() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    share = re.search(r"measuring for a line and writing it: [\d.]+ ms, ([\d.]+) % of the updates' time", page)
    assert share is not None
    assert float(share.group(1)) <= 1
