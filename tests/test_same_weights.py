"""scripts/verify/same_weights.py reports differences between the results of two checkouts, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import environment

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_checkout_with_other_results_is_reported(tmp_path: Path) -> None:
    for part in ("lars_train", "configs"):
        shutil.copytree(ROOT / part, tmp_path / part)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    mini = tmp_path / "configs/data/mini.yaml"
    text = mini.read_text()
    mini.write_text(text.replace("std: [0.3530", "std: [0.3531"))
    assert mini.read_text() != text
    script = ROOT / "scripts/verify/same_weights.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "--only", "default", "fp64"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("default: DIFFERS: "), done.stdout + done.stderr
    differs, *details, equal = done.stdout.splitlines()
    assert "final.json" in differs
    assert details
    assert equal.startswith("fp64: equal (3 results)")
