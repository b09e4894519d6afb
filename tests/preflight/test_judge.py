"""Each fault in the findings is reported with its place, and nothing else is reported."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lars_train.preflight.findings import (
    Clock,
    Counts,
    Demands,
    Device,
    Exchange,
    Findings,
    Host,
    Input,
    OutputFolder,
    Rank,
    Step,
    TrialRead,
)
from lars_train.preflight.judge import format_verdict, judge
from lars_train.preflight.measure_compute import clock_offsets

GB = 10**9
HOST = Host("alpha", 96, 400 * GB, 65536, 65536, 64 * GB)
DEVICE = Device("cuda", "NVIDIA A100", memory=80 * GB, memory_taken=GB // 2)
STEP = Step(256, 2500.0, "bf16", True, 205_000_000, 102_000_000)
INPUT = Input(4000.0, 600.0, 7, "native", GB)
WHOLE = Counts("imagenet", 1_281_167, 50_000, 1_000, False, "f00d")
RUNS = OutputFolder("checkpoints", "run.dir", "/runs/a", "1", 500 * GB, 2 * GB, 205_000_000, 0.3)
VERSIONS = {"torch": "2.13.0", "config": "0123abcd"}


def rank(number: int, **other: Any) -> Rank:
    """A healthy rank, one of two on each of two machines."""
    host = dataclasses.replace(HOST, name="alpha" if number < 2 else "beta")
    device = dataclasses.replace(DEVICE, identity=f"GPU-{number}")
    made = Rank(number, number % 2, host, VERSIONS, device)
    made = dataclasses.replace(made, counts=WHOLE, step=STEP, input=INPUT, sample=TrialRead(256, 25_000_000, 0.1))
    return dataclasses.replace(made, folders=(RUNS,) if number == 0 else (), **other)


def findings(*changed: Rank, **other: Any) -> Findings:
    ranks = {number: rank(number) for number in range(4)} | {one.rank: one for one in changed}
    made = Findings(
        tuple(ranks[number] for number in range(4)),
        (Clock(0.0, 0.001),) * 4,
        Exchange(102_000_000, 0.02, 0.0001),
        Demands(32_768, 39, 15.0, 100),
    )
    return dataclasses.replace(made, **other)


def problems(found: Findings) -> list[str]:
    return list(map(str, judge(found)))


def assert_only(found: Findings, *words: str) -> None:
    reported = problems(found)
    assert len(reported) == 1, reported
    for word in words:
        assert word in reported[0], reported[0]


def on_host(number: int, **other: Any) -> Rank:
    made = rank(number)
    return dataclasses.replace(made, host=dataclasses.replace(made.host, **other))


def on_device(number: int, **other: Any) -> Rank:
    made = rank(number)
    return dataclasses.replace(made, device=dataclasses.replace(made.device, **other))


def test_healthy_machines_are_ready() -> None:
    found = findings()
    assert problems(found) == []
    assert format_verdict(problems(found)) == ["ready"]
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize(
    ("changed", "seen"),
    [
        ({"val": 49_999}, "49,999"),
        ({"train": 1_281_166}, "1,281,166"),
        ({"classes": 999}, "999 classes"),
        ({"held_out": True}, "50,000 validation"),
    ],
)
def test_wrong_counts_of_imagenet_are_reported(changed: dict[str, Any], seen: str) -> None:
    counts = dataclasses.replace(WHOLE, **changed)
    ranks = [rank(number, counts=counts) for number in range(4)]
    assert_only(findings(*ranks), "alpha, beta", seen, "1,281,167", "50,000")


def test_held_out_images_count_and_other_data_sets_have_any_size() -> None:
    held = dataclasses.replace(WHOLE, train=1_281_167 - 128_117, val=128_117, held_out=True)
    assert problems(findings(*(rank(number, counts=held) for number in range(4)))) == []
    own = dataclasses.replace(WHOLE, data="folder", train=5)
    assert problems(findings(*(rank(number, counts=own) for number in range(4)))) == []


def test_images_that_cannot_be_decoded_are_named() -> None:
    bad = tuple(f"/data/train/n01/{number}.JPEG (broken)" for number in range(6))
    found = findings(rank(3, sample=TrialRead(256, 1, 0.1, bad)))
    assert_only(
        found,
        "beta",
        "6 of 1,024",
        "/data/train/n01/0.JPEG (broken)",
        "and 2 more",
        "a run fails with more than data.max_bad=100",
    )


def test_an_error_is_reported_once_for_all_machines_that_have_it() -> None:
    error = "data.root=/d cannot be opened; give the folder."
    found = findings(*(rank(number, errors=(error,), counts=None, sample=None) for number in range(4)))
    assert_only(found, "alpha, beta", error)


@pytest.mark.parametrize(("limit", "fine"), [(1024, True), (1023, False)])
def test_a_low_limit_on_open_files_is_reported(limit: int, fine: bool) -> None:
    found = findings(on_host(2, open_files=limit))
    if fine:
        assert problems(found) == []
    else:
        assert_only(found, "beta", "1,023 files", "ulimit -n 65536")
    hard = findings(on_host(2, open_files=256, max_open_files=512))
    assert limit == 1024 or "root" in problems(hard)[0]


def test_small_shared_memory_is_reported_where_ranks_share_it() -> None:
    assert_only(findings(on_host(0, shared_memory_free=64 * 2**20)), "alpha", "67.1 MB", "--shm-size")
    alone = dataclasses.replace(findings(), ranks=(on_host(0, shared_memory_free=64 * 2**20),))
    assert problems(dataclasses.replace(alone, exchange=None)) == []
    assert problems(findings(on_host(0, shared_memory_free=None))) == []


def test_buffers_that_fill_the_memory_are_reported() -> None:
    assert_only(findings(on_host(2, memory_free=3 * GB)), "beta", "2 GB of 3 GB")


def test_a_machine_without_the_run_directory_is_reported() -> None:
    assert_only(findings(rank(2, unshared_folder="/home/me/runs")), "beta", "/home/me/runs", "share")


def test_shared_busy_slow_and_wrong_devices_are_reported() -> None:
    assert_only(findings(on_device(1, identity="GPU-0")), "alpha", "2 ranks use the same device")
    assert_only(findings(on_device(3, memory_taken=9 * GB)), "rank 3", "local rank 1 on beta", "9 GB of 80 GB")
    assert_only(findings(rank(1, step=dataclasses.replace(STEP, finite=False))), "rank 1", "not finite")
    assert_only(findings(rank(1, step=dataclasses.replace(STEP, images_per_s=1900.0))), "rank 1", "1,900", "2,500")
    assert problems(findings(rank(1, step=dataclasses.replace(STEP, images_per_s=2100.0)))) == []


def test_differing_versions_configs_and_data_are_reported() -> None:
    beta = [rank(number, versions={**VERSIONS, "torch": "2.12.1"}) for number in (2, 3)]
    assert_only(findings(*beta), "beta", "torch is 2.12.1", "2.13.0 on alpha")
    assert_only(findings(rank(2, versions={**VERSIONS, "NCCL": "2.30"})), "beta", "NCCL is 2.30", "missing on alpha")
    assert_only(findings(rank(2, versions={**VERSIONS, "config": "9"})), "beta", "same settings")
    assert_only(
        findings(*(rank(n, counts=dataclasses.replace(WHOLE, fingerprint="b")) for n in (2, 3))), "beta", "differs"
    )


@given(st.floats(-100, 100), st.floats(0, 3))
def test_only_clocks_certainly_off_by_a_second_are_reported(ahead: float, error: float) -> None:
    found = problems(findings(clocks=(Clock(0.0, 0.0),) * 2 + (Clock(ahead, error),) * 2))
    if abs(ahead) - error > 1:
        assert len(found) == 1
        assert found[0].startswith("beta: the clock is")
        assert ("ahead of" in found[0]) == (ahead > 0)
    else:
        assert found == []


@given(st.lists(st.floats(-3600, 3600), min_size=1, max_size=5), st.floats(1e-6, 0.1), st.randoms())
def test_clock_offsets_are_measured_within_their_error(skews: list[float], jitter: float, random: Any) -> None:
    def reading(start: float, skew: float) -> tuple[float, float]:
        late = random.uniform(0, jitter)  # each rank leaves the barrier a little later than rank 0
        return start + skew + late, jitter

    found = clock_offsets([[reading(1e9 + 5 * turn, skew) for skew in [0.0, *skews]] for turn in range(9)])
    assert len(found) == len(skews) + 1
    for skew, clock in zip([0.0, *skews], found, strict=True):
        assert abs(clock.ahead - skew) <= clock.error + 1e-5


def test_a_full_disk_is_reported_with_every_use() -> None:
    runs = dataclasses.replace(RUNS, free=GB)
    assert_only(findings(dataclasses.replace(rank(0), folders=(runs,))), "alpha", "1 GB")
    cache = OutputFolder("cache", "data.cache_dir", "/runs/cache", "1", 500 * GB, 499 * GB)
    both = dataclasses.replace(rank(0), folders=(RUNS, cache))
    assert_only(findings(both), "alpha", "501 GB", "/runs/a (run.dir)", "/runs/cache (data.cache_dir)")
    elsewhere = dataclasses.replace(rank(0), folders=(RUNS, dataclasses.replace(cache, filesystem="2")))
    assert problems(findings(elsewhere)) == []


def test_a_slow_loader_is_reported_with_the_cores_it_needs() -> None:
    slow = [rank(number, input=dataclasses.replace(INPUT, images_per_s=2000.0)) for number in (2, 3)]
    # 5,000 images/s at 600 per core: 8.3 cores, and the 14 workers had enough.
    assert_only(findings(*slow), "beta", "4,000 images/s", "consume 5,000", "9 cores")
    few = [rank(n, input=dataclasses.replace(INPUT, images_per_s=1200.0, workers=2)) for n in (2, 3)]
    assert_only(findings(*few), "raise data.workers to 5 per rank")
    assert problems(findings(*(rank(n, input=dataclasses.replace(INPUT, images_per_s=2300.0)) for n in (2, 3)))) == []


def test_without_workers_loading_and_computing_take_turns() -> None:
    alone = rank(0, input=dataclasses.replace(INPUT, images_per_s=2500.0, workers=0))
    assert alone.images_per_s == pytest.approx(1250)
    assert rank(0).images_per_s == 2500
    assert problems(findings(alone, rank(1, input=alone.input))) == []
    unknown = rank(0, input=dataclasses.replace(INPUT, images_per_s=0.0, per_core=0.0))
    # As for a data set of one batch.
    assert dataclasses.replace(unknown, input=dataclasses.replace(unknown.input, workers=0)).images_per_s is None
    assert problems(findings(unknown, rank(1, input=unknown.input))) == []
    slow = [rank(n, input=dataclasses.replace(INPUT, images_per_s=600.0, workers=0)) for n in (0, 1)]
    assert_only(findings(*slow), "alpha", "1,200 images/s")


def test_an_all_reduce_longer_than_the_computation_is_reported() -> None:
    # 32,768 images at 4 x 2,500 a second: 3.2768 s of computation.
    share = findings(exchange=Exchange(102_000_000, 1.6384, 0.001)).exchange_share
    assert share == pytest.approx(0.5)
    assert_only(findings(exchange=Exchange(102_000_000, 4.0, 0.001)), "4 s", "3.28 s", "NCCL_SOCKET_IFNAME")


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert Exchange(8 * GB, 2.0, 0.0).bus_bandwidth(4) == pytest.approx(6 * GB)


def test_a_disk_too_slow_for_the_checkpoints_is_reported() -> None:
    # A checkpoint is due after 39 updates of 3.2768 s: 127.8 s.
    slow = dataclasses.replace(RUNS, written=20_500_000, write_s=13.0)
    assert_only(findings(dataclasses.replace(rank(0), folders=(slow,))), "130 s", "128 s", "/runs/a")
    fine = dataclasses.replace(slow, write_s=12.0)
    assert problems(findings(dataclasses.replace(rank(0), folders=(fine,)))) == []


def test_the_verdict_is_numbered_and_printable() -> None:
    assert format_verdict(["one", "two\x1b[2J"]) == ["To fix:", "1. one", "2. two\\x1b[2J"]
