"""scripts/verify/long_haul.py, a short one: what a run holds does not grow with its updates and evaluations."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
# MiB over some 1,000 updates, where 0.3 is usual. A long run's limit, MOST_MEMORY, is of a hundred times as many.
MOST_GROWTH = 6.0


@pytest.fixture
def long_haul(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS / "verify"))
    return importlib.import_module("long_haul")


@pytest.mark.slow
def test_memory_and_open_files_do_not_grow_over_1000_updates_and_20_evaluations(
    long_haul: ModuleType, tmp_path: Path
) -> None:
    # The first tenth is not looked at: 1,200 updates, 24 evaluations.
    moments = long_haul.watched(long_haul.settings_of(24, 50, 10), 24 * 50, tmp_path)
    assert moments[-1].update >= 1150
    early, late = long_haul.early_and_late(moments, 50)
    assert late.memory - early.memory < MOST_GROWTH
    assert late.files <= early.files + long_haul.MOST_FILES
    assert early.time > 0
    assert late.time > 0


def test_the_time_of_an_update_is_what_undisturbed_looks_say(long_haul: ModuleType) -> None:
    def run(*, slower: float = 1.0, disturbed: int = 0) -> list[Any]:
        """400 looks of 10 updates of 6 ms, `slower` times as long in the last tenth; some looks of it, and of none
        other, take twice that: what neighbours do.
        """
        cpu, moments = 0.0, []
        for look in range(1, 401):
            of_last = look - 360
            cpu += 0.06 * (slower if of_last > 0 else 1) * (2 if 0 < of_last <= disturbed else 1)
            moments.append(long_haul.Moment(10 * look, cpu, cpu, 500.0, 7, 0, 1))
        return moments

    for moments, expected in (
        (run(), 1.0),
        (run(disturbed=20), 1.0),
        (run(slower=1.1), 1.1),
        (run(slower=1.1, disturbed=20), 1.1),
    ):
        early, late = long_haul.early_and_late(moments, 20)
        assert early.time == pytest.approx(6)
        assert late.time / early.time == pytest.approx(expected)


def test_a_run_over_too_soon_is_told_so(long_haul: ModuleType) -> None:
    few = [long_haul.Moment(update, update / 10, update / 100, 500.0, 7, 0, 1) for update in range(1, 20)]
    with pytest.raises(ValueError, match="the second tenth of the run was over after 1 looks"):
        long_haul.early_and_late(few, 1)
    with pytest.raises(ValueError, match="more --epochs or more --updates"):
        long_haul.early_and_late([], 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--epochs 2 --updates 20 --log-every 100", "--epochs 2: at least 20 are wanted"),
        ("--epochs 20 --updates 5", "--epochs times --updates is 100: at least 1,000"),
        ("--epochs 20 --updates 50 --log-every 20", "1,000 updates have 50 lines of the log, and at least 100"),
        ("--epochs 0", "--epochs: 0: a whole number of at least 1 is wanted"),
    ],
)
def test_a_run_too_short_to_be_judged_is_refused_beforehand(
    long_haul: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    told: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["verify/long_haul.py", *options.split()])
    with pytest.raises(SystemExit) as ended:
        long_haul.main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_what_grows_is_told(long_haul: ModuleType) -> None:
    flat = [long_haul.Moment(update, update / 10, update / 100, 500.0, 7, 100 * update, 1) for update in range(1, 101)]
    _, growth = long_haul.told(flat, [], 1000, 2)
    assert not growth
    for grown in (
        {"memory": [500 + update for update in range(1, 101)]},
        {"files": [7 + update // 20 for update in range(1, 101)]},
        {"cpu": [update / 100 * (1 + update / 500) for update in range(1, 101)]},
    ):
        ((name, values),) = grown.items()
        told_as = {"memory": "memory", "files": "open files", "cpu": "an update"}[name]
        moments = [long_haul.Moment(**{**vars(one), name: value}) for one, value in zip(flat, values, strict=True)]
        lines, (only,) = long_haul.told(moments, [], 1000, 2)
        assert only.startswith(f"{told_as} ")
        assert f"- over a long run: {only.partition(';')[0]}" in lines
