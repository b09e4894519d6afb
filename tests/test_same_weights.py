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
    device = tmp_path / "lars_train/training/device.py"
    text = device.read_text()
    device.write_text(text.replace('"bf16", torch.float32, torch.bfloat16', '"bf16", torch.float32, torch.float32'))
    assert device.read_text() != text
    script = ROOT / "scripts/verify/same_weights.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "--only", "bf16", "fp64"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("bf16: DIFFERS: "), done.stdout + done.stderr
    differs, *details, equal = done.stdout.splitlines()
    assert "final.json" in differs
    assert details
    assert equal.startswith("fp64: equal (3 results)")
