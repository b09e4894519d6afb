from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from program import COMPILED
from torch import nn

from lars_train.config import AUTO
from lars_train.errors import ConfigError
from lars_train.models.factory import build_model
from lars_train.training import compiler
from lars_train.training.compiler import WORTH_SECONDS, Trial, decide, longest_time
from lars_train.training.device import choose_precision

LONG = 2 * WORTH_SECONDS
FASTER, SLOWER, WRONG = Trial(2.0, 1.0, 1e-4), Trial(1.0, 2.0, 1e-4), Trial(2.0, 1.0, 0.5)


def never(*_: object) -> Any:
    raise AssertionError("it was tried")


def decided(
    wanted: bool | str,
    kept: bool | None,
    seconds: float,
    attempt: Callable[[], Trial] = never,
    *,
    at_most: float = 100 * WORTH_SECONDS,
    problem: Callable[[], str | None] = lambda: None,
) -> tuple[bool, list[str]]:
    """What comes of it in a run that takes `seconds`, and what was said."""
    told: list[str] = []
    found = decide(
        wanted,
        kept,
        at_most,
        timed=lambda: seconds,
        attempt=attempt,
        problem=problem,
        compute=torch.float32,
        say=told.append,
    )
    return found, told


@pytest.mark.parametrize("kept", [None, False, True])
def test_where_it_is_not_wanted_nothing_is_tried_and_nothing_said(kept: bool | None) -> None:
    assert decided(False, kept, LONG, problem=never) == (False, [])


def test_a_run_of_less_than_an_hour_stays_as_it_is() -> None:
    assert decided(AUTO, None, WORTH_SECONDS / 2, problem=never) == (False, [])


@pytest.mark.parametrize("kept", [None, False])
def test_a_run_that_cannot_take_an_hour_is_not_even_timed(kept: bool | None) -> None:
    told: list[str] = []
    found = decide(
        AUTO,
        kept,
        WORTH_SECONDS - 1,
        timed=never,
        attempt=never,
        problem=never,
        compute=torch.float32,
        say=told.append,
    )
    assert (found, told) == (False, [])


def test_a_long_run_that_began_uncompiled_goes_on_so_and_says_how_to_change_it() -> None:
    # It may have begun as a try of a few updates (max_updates).
    found, (line,) = decided(AUTO, False, LONG)
    assert not found
    assert "off, as in this run so far; compile=true" in line


@pytest.mark.parametrize(
    ("trial", "on", "word"),
    [(FASTER, True, "on: 1 s a micro-batch, 2 s without"), (SLOWER, False, "off: 2 s"), (WRONG, False, "off: what it")],
)
def test_a_long_run_compiles_where_that_is_right_and_faster(trial: Trial, on: bool, word: str) -> None:
    found, (before, after) = decided(AUTO, None, LONG, lambda: trial)
    assert found is on
    assert "trying torch.compile" in before
    assert word in after


def test_outputs_that_are_no_numbers_are_not_taken_for_rounding() -> None:
    found, _ = decided(AUTO, None, LONG, lambda: Trial(2.0, 1.0, float("nan")))
    assert not found


@pytest.mark.parametrize(("wanted", "kept"), [(AUTO, True), (True, None), (True, False)])
def test_asked_for_or_decided_before_it_is_done_without_a_trial_and_said(wanted: bool | str, kept: bool | None) -> None:
    found, told = decided(wanted, kept, 1.0)
    assert found
    assert "on: each size of a micro-batch is compiled when it first comes" in told[0]


def test_where_a_trial_fails_the_run_goes_on_without() -> None:
    def fails() -> Trial:
        raise RuntimeError("no kernel\nwas found")

    found, told = decided(AUTO, None, LONG, fails)
    assert not found
    assert told[-1].endswith("off: torch.compile does not work here (RuntimeError: no kernel)")


def test_where_it_cannot_work_auto_does_without_and_true_is_an_error_that_says_what_to_do() -> None:
    def broken() -> str:
        return "torch.compile wants a C++ compiler, which is not here"

    assert decided(AUTO, None, LONG, problem=broken) == (False, [f"compile        off: {broken()}"])
    with pytest.raises(ConfigError, match=r"compile=true: .*a C\+\+ compiler, which is not here; compile=auto"):
        decided(True, None, LONG, problem=broken)


def test_a_compiled_run_goes_on_without_where_it_cannot_be_compiled_any_more() -> None:
    found, told = decided(AUTO, True, LONG, problem=lambda: "torch.compile wants triton, which is not here")
    assert not found
    assert told[-1].endswith("off: torch.compile wants triton, which is not here; the run was compiled until now")


@pytest.mark.parametrize("what", ["compiler", "cache"])
def test_a_compiler_that_fails_and_a_cache_that_cannot_be_are_told_in_a_line(what: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    # In a process of its own: torch keeps what it has compiled, and where.
    own = {"CXX": "/bin/false"} if what == "compiler" else {}
    cache = tmp_path / "file" / "cache" if what == "cache" else tmp_path / "cache"
    code = (
        "import torch\nfrom lars_train.training.compiler import problem\n"
        "reason = problem(torch.device('cpu'))\nprint(reason)"
    )
    environment = {**os.environ, **own, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith("torch.compile does not work here (")


def test_a_compiler_is_looked_for_where_torch_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler.missing_tool(cpu) == "a C++ compiler"
    (tmp_path / "g++").touch(0o755)
    assert compiler.missing_tool(cpu) is None
    monkeypatch.setenv("CXX", "icpx")
    assert compiler.missing_tool(cpu) == "a C++ compiler"


def test_the_longest_time_is_that_of_the_arithmetic_at_a_fiftieth_of_the_peak() -> None:
    # An epoch of ImageNet, ResNet-50 (24.5 GFLOP an image), on a device with 1,000 TFLOP/s: 26 minutes at most.
    assert longest_time(1_281_167, 24.5e9, 1e15) == pytest.approx(1_281_167 * 24.5e9 / 0.02e15)


def test_a_gpu_is_timed_at_the_size_that_it_trains_with() -> None:
    assert compiler.timed_samples(torch.device("cpu"), 32, 256) == 32
    assert compiler.timed_samples(torch.device("cuda", 0), 32, 256) == 256


def test_the_time_of_an_image_is_that_of_a_pass_and_the_network_stays_as_it_is() -> None:
    network = build_model("tiny", num_classes=3, ghost_batch=4, zero_gamma=False).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    cpu = torch.device("cpu")
    started = time.perf_counter()
    found = compiler.eager_time(network, 8, 32, choose_precision("fp32", cpu), cpu)
    assert 0 < 8 * found < time.perf_counter() - started
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.slow
def test_a_trial_compares_both_ways_and_leaves_the_network_and_the_random_numbers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(COMPILED))
    torch.manual_seed(0)
    network = build_model("tiny", num_classes=3, ghost_batch=4, zero_gamma=False).train()
    network = network.to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    trial = compiler.attempt(network, 8, 32, choose_precision("fp32", torch.device("cpu")), torch.device("cpu"))
    assert 0 < trial.eager < 60
    assert 0 < trial.compiled < 60
    assert trial.apart < 1e-3
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_trial_sees_compiled_code_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: network(images) * 1.5

    monkeypatch.setattr(compiler, "compiled_of", wrong)
    network = build_model("tiny", num_classes=3, ghost_batch=4, zero_gamma=False).train()
    trial = compiler.attempt(network, 4, 32, choose_precision("fp32", torch.device("cpu")), torch.device("cpu"))
    assert trial.apart > 0.4
