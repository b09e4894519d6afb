"""A check stays within its time limit on devices, disks and networks of any speed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from resolving import resolved

from lars_train.config import Config
from lars_train.config.mode_schema import CheckConfig
from lars_train.launch import Ranks
from lars_train.networks import make_network
from lars_train.preflight import check, measure_compute, measure_io
from lars_train.preflight.check import MIN_PART, PARTS, TOTAL, Budget
from lars_train.run_plan import Plan
from lars_train.training.distributed import Group
from lars_train.training.prepare import prepare
from lars_train.training.resolve import Resolved, resolve_execution
from lars_train.training.trainer import Trainer

SECONDS = 0.25
SETTINGS = (
    f"mode=check check.seconds={SECONDS} check.samples=256 precision=fp32 launch.threads=1 device=cpu data=synthetic "
    "data.train_count=5000 data.val_count=500 data.image_size=16 data.num_classes=10 "
    "model=tiny batch.size=512 model.ghost_batch=16 micro_batch=64 data.workers=0 optimizer.lr=1"
).split()
CPU = torch.device("cpu")


def config() -> Config:
    return resolved(*SETTINGS)


@pytest.fixture(autouse=True)
def _begins_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lars_train.preflight.check.say", lambda text: None)
    monkeypatch.setattr(check, "_process_start", time.monotonic)


def slow_training(
    monkeypatch: pytest.MonkeyPatch, seconds_per_image: float, sleep: Callable[[float], None] = time.sleep
) -> list[int]:
    """Replace training by a device of this speed. Return a list that receives the images of each update."""
    updates: list[int] = []

    def run_update(trainer: Trainer, batches: Iterator[Any], micro_batches: int, *, measure: bool) -> None:
        updates.append(len(next(batches).labels))
        sleep(seconds_per_image * updates[-1])

    monkeypatch.setattr(measure_compute.Trainer, "run_update", run_update)
    return updates


@pytest.fixture(scope="module")
def decided() -> tuple[Config, Plan, Resolved]:
    whole = config()
    plan = prepare(whole).plan
    return whole, plan, resolve_execution(whole, plan, make_network(whole, 10), CPU, Group(Ranks()), None)


@pytest.mark.parametrize(
    ("seconds_per_image", "samples"), [(1e-4, 64), (0.01, 16), (0.3, 2)], ids=["fast", "slow", "slowest"]
)
def test_a_device_of_any_speed_is_measured_in_time(
    seconds_per_image: float,
    samples: int,
    decided: tuple[Config, Plan, Resolved],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    # Not the real clock: other work on this machine would count on the fast device.
    monkeypatch.setattr(measure_compute, "time", SimpleNamespace(perf_counter=lambda: now))
    slow_training(monkeypatch, seconds_per_image, sleep)
    step = measure_compute.measure_step(*decided, 10, CPU, SECONDS, 1.0)
    # An overrun of one step at most.
    assert now < 1.0 + seconds_per_image * step.samples
    assert step.samples == samples
    assert step.images_per_s == pytest.approx(1 / seconds_per_image)


def test_a_check_of_a_slow_machine_stays_within_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_training(monkeypatch, 0.2)
    read, fsync = measure_io.EvalReader.fill, os.fsync
    monkeypatch.setattr(measure_io.EvalReader, "fill", lambda *given: (time.sleep(0.02), read(*given))[1])
    monkeypatch.setattr(measure_io, "_CHUNK", 1 << 10)
    monkeypatch.setattr(measure_io.os, "fsync", lambda file: (time.sleep(0.1), fsync(file))[1])
    started = time.monotonic()
    found = check.check(config(), Ranks())
    # An overrun of at most one step, and some time for the parts without a limit on a busy machine.
    assert time.monotonic() - started < TOTAL * SECONDS + 2
    (rank,) = found["findings"]["ranks"]
    assert rank["step"]["images_per_s"] == pytest.approx(5, rel=0.3)
    assert 1 <= rank["sample"]["images"] < 256
    notes = [line for line in found["lines"] if line.startswith("time was up")]
    assert any("updates of 2 images" in line for line in notes)
    assert any("of 256 sampled images read" in line for line in notes)
    assert any("of a checkpoint's" in line for line in notes)


def test_a_late_part_shortens_the_parts_after_it() -> None:
    now = time.monotonic()
    in_time, late, too_late = (Budget(5, now - age) for age in (0, 75, 1000))
    for part, share in PARTS.items():
        assert in_time.seconds_for(part) == pytest.approx(5 * share)
        assert too_late.seconds_for(part) == MIN_PART * 5
    assert late.seconds_for("sample") == pytest.approx(15 * PARTS["sample"] / sum(PARTS.values()), rel=0.01)
    # The last part gets all that is left.
    assert late.seconds_for("disk") == pytest.approx(10)
    # The rest of the promised two minutes is for the launcher, the end, and long steps.
    assert TOTAL * CheckConfig().seconds <= 90
    assert sum(PARTS.values()) <= TOTAL


class SlowGroup(Group):
    """Two ranks on a network of 10 MB/s."""

    def all_reduce_sum(self, values: torch.Tensor) -> None:
        time.sleep(values.nbytes * 1e-7)

    def all_reduce_max(self, values: list[int]) -> list[int]:
        return values

    def broadcast_from_rank0(self, value: Any) -> Any:
        return value


@pytest.mark.parametrize(("count", "whole"), [(400_000, True), (100_000_000, False)])
def test_a_slow_network_is_measured_in_time(count: int, whole: bool) -> None:
    started = time.monotonic()
    found = measure_compute.measure_exchange(SlowGroup(Ranks(0, 2, 0, 1)), CPU, count, 0.2, 1.5)
    assert time.monotonic() - started < 2.5
    assert found is not None
    assert (found.sent == found.bytes) == whole
    assert found.bytes == count
    assert found.seconds == pytest.approx(count * 1e-7, rel=0.3)
