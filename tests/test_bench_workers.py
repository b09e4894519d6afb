"""scripts/bench/bench_workers.py measures every contender, whose batched views are the loader's own."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from program import environment

from lars_train.data.order import batch_uniforms

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_its_philox_draws_the_loaders_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS / "bench")
    uniforms = importlib.import_module("bench_workers").uniforms
    samples = [0, 1, 77, 2**40]
    expected = batch_uniforms(2**62 + 5, 3, samples, 23)[:, 20:]
    np.testing.assert_array_equal(np.transpose(uniforms(2**62 + 5, 3, np.array(samples))), expected)


@pytest.mark.slow
def test_every_contender_has_a_row(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- bench_workers: begin -->\n<!-- bench_workers: end -->\n")
    command = [
        sys.executable,
        str(SCRIPTS / "bench" / "bench_workers.py"),
        *"--workers 1 --rounds 1 --seconds 0.2 --write".split(),
        str(page),
    ]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    rows = re.findall(r"^\| .* \| .* \| 1 \| ([\d,]+) .* \| ([\d,]+) .* \|$", page.read_text(), re.MULTILINE)
    assert len(rows) == 5
    assert all(int(value.replace(",", "")) > 0 for row in rows for value in row)
