"""scripts/long_haul.py, a short one: what a run holds does not grow with its updates and evaluations."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
# MiB over some 1,000 updates, where 0.3 is usual. A long run's limit, MOST_MEMORY, is of a hundred times as many.
MOST_GROWTH = 6.0


@pytest.fixture
def long_haul(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("long_haul")


@pytest.mark.slow
def test_memory_and_open_files_do_not_grow_over_1000_updates_and_20_evaluations(
    long_haul: ModuleType, tmp_path: Path
) -> None:
    # The first tenth is not looked at: 1,200 updates, 24 evaluations.
    moments = long_haul.watched(long_haul.settings_of(24, 50, 10), 24 * 50, tmp_path)
    assert moments[-1].update >= 1150
    found = long_haul.early_and_late(moments)
    (before, after), (files, files_after) = found["memory"], found["open files"]
    assert after - before < MOST_GROWTH
    assert files_after <= files + long_haul.MOST_FILES


def test_what_grows_is_told(long_haul: ModuleType) -> None:
    flat = [long_haul.Moment(update, update / 10, update / 100, 500.0, 7, 100 * update) for update in range(1, 101)]
    lines, still = long_haul.told(flat, [], 1000)
    assert still
    assert not [line for line in lines if "not met" in line]
    for grown in (
        {"memory": [500 + update for update in range(1, 101)]},
        {"files": [7 + update // 20 for update in range(1, 101)]},
        {"cpu": [update / 100 * (1 + update / 500) for update in range(1, 101)]},
    ):
        ((name, values),) = grown.items()
        told_as = {"memory": "memory", "files": "open files", "cpu": "an update"}[name]
        moments = [long_haul.Moment(**{**vars(one), name: value}) for one, value in zip(flat, values, strict=True)]
        lines, still = long_haul.told(moments, [], 1000)
        assert not still
        (only,) = (line for line in lines if "not met" in line)
        assert only.startswith(f"- over a long run: {told_as} ")
