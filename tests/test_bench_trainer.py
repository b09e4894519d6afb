"""scripts/bench/bench_trainer.py: what is done around a step counts, and nothing of the step."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lars_train.training.guard import Guard
from lars_train.training.trainer import Trainer

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SMALL = (
    "data.image_size=16 data.num_classes=10 model=tiny model.ghost_batch=4 batch.size=8 log_every=5 precision=fp32 "
    "launch.threads=1"
).split()
PAUSE = 0.02


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench"))
    return importlib.import_module("bench_trainer")


def later(function: Callable[..., Any]) -> Callable[..., Any]:
    def pausing(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(PAUSE)
        return function(*arguments, **keywords)

    return pausing


def around(script: ModuleType) -> float:
    """Seconds an update, the least of some."""
    run, found = script.measured(SMALL, 3)
    assert run.trainer.update == 20
    assert run.config.log_every == 5
    assert all(waited > 0 for _, _, waited in found)
    return min(whole - steps - waited for whole, steps, waited in found) / 5


def test_what_is_done_around_a_step_counts_and_what_the_step_does_does_not(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "watch", later(Guard.watch))
        assert around(script) > PAUSE
    init = Trainer.__init__

    def slow(trainer: Trainer, *arguments: Any, **keywords: Any) -> None:
        init(trainer, *arguments, **keywords)
        trainer.forward, trainer.normalize = later(trainer.forward), later(trainer.normalize)

    monkeypatch.setattr(Trainer, "__init__", slow)
    assert around(script) < PAUSE


@pytest.mark.slow
def test_the_page_gets_a_row(script: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- bench_trainer: begin -->\n<!-- bench_trainer: end -->\n")
    script.main(["--case", "small", "--intervals", "1", "--write", str(page), *SMALL])
    lines = page.read_text().splitlines()
    (row,) = (line for line in lines if line.startswith("| small, 8 x 16 x 16, fp32, a log line each 5 updates |"))
    _, update, _, ours, share = (cell.strip() for cell in row.strip("|").split("|"))
    assert 0 < float(ours) < float(update)
    assert float(share.split("%")[0]) == pytest.approx(100 * float(ours) / float(update), abs=0.5)
