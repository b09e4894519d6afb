"""scripts/verify/long_haul.py: memory and open files of a short run do not grow, and growth is reported."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny import ran

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "verify" / "long_haul.py"


@pytest.fixture
def long_haul(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("long_haul")


@pytest.mark.slow
def test_memory_and_open_files_do_not_grow_in_500_updates(long_haul: ModuleType, tmp_path: Path) -> None:
    # The run has 600 updates and 24 evaluations. The script ignores its first tenth.
    settings = [*long_haul.SETTINGS, f"data.train_count={25 * long_haul.BATCH}", "epochs=24"]
    moments = long_haul.watch(settings, 24 * 25, tmp_path)
    assert moments[-1].update >= 575
    text = "\n".join(long_haul.report(moments, settings)[0])
    # The limit is in MiB over about 500 updates; 0.3 is usual. The script allows 8 over 200 times as many updates.
    memory = re.search(r"\| memory, MiB \| ([\d.]+) \| ([\d.]+) \|", text)
    files = re.search(r"\| open files \| (\d+) \| (\d+) \|", text)
    assert memory is not None
    assert files is not None
    assert float(memory[2]) - float(memory[1]) < 3
    assert int(files[2]) - int(files[1]) <= 2


def test_growth_is_reported(long_haul: ModuleType) -> None:
    def growth(**changes: float) -> list[str]:
        """Report on 100 samples of the process; the second half has `changes` added to each."""
        moments = []
        for update in range(1, 101):
            values = {"cpu": update / 10, "memory": 500.0, "files": 7.0}
            for name, value in changes.items():
                values[name] += value * (max(0, update - 50) if name == "cpu" else update > 50)
            moments.append(long_haul.Moment(update=update, **values))
        found: list[str] = long_haul.report(moments, [])[1]
        return found

    assert growth() == []
    assert growth(memory=9) == ["memory grew by 9.0 MiB; the limit is 8"]
    assert growth(files=3) == ["open files grew by 3; the limit is 2"]
    assert growth(cpu=0.02) == ["an update took 1.20 times as long; the limit is 1.1"]


def test_a_run_that_is_too_short_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="--epochs 19: needs at least 20"):
        ran([sys.executable, str(SCRIPT), "--epochs", "19"], tmp_path)
