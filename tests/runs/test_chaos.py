from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "verify" / "chaos.py"


@pytest.mark.slow
def test_a_run_killed_at_a_random_instant_ends_bit_for_bit() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "1"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kills" in done.stdout
    assert "0 differ from the undisturbed run" in done.stdout
