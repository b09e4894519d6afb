"""The script that measures what logging costs; what it finds is in docs/monitoring.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_script_compares_updates_with_and_without_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    import bench_monitoring

    settings = "model=tiny data.image_size=16 batch.size=8 micro_batch=4 model.ghost_batch=4".split()
    bench_monitoring.main(["--every", "2", "--pairs", "2", *settings])
    told = capsys.readouterr().out
    ratio = re.search(r"over updates without: (\d+\.\d+) ", told)
    line = re.search(r"measuring for a line and writing it: (\d+\.\d+) ms", told)
    assert ratio is not None
    assert line is not None
    assert float(ratio.group(1)) > 0.5
    assert 0 < float(line.group(1)) < 1000


def test_the_page_tells_a_cost_within_the_bound_of_one_percent() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    share = re.search(r"measuring for a line and writing it: [\d.]+ ms, ([\d.]+) % of the updates' time", page)
    assert share is not None
    assert float(share.group(1)) <= 1
