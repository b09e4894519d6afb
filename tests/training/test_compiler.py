from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from program import COMPILED
from torch import nn

from lars_train.config import AUTO
from lars_train.errors import ConfigError
from lars_train.models.factory import build_model
from lars_train.training import compiler
from lars_train.training.compiler import WORTH_SECONDS, Trial, decide, shortest_time
from lars_train.training.device import choose_precision

LONG = 2 * WORTH_SECONDS
FASTER, SLOWER, WRONG = Trial(2.0, 1.0, 1e-4), Trial(1.0, 2.0, 1e-4), Trial(2.0, 1.0, 0.5)


def decided(
    wanted: bool | str,
    kept: bool | None,
    seconds: float,
    attempt: Callable[[], Trial] | None = None,
    missing: str | None = None,
) -> tuple[bool, list[str]]:
    told: list[str] = []

    def never() -> Trial:
        raise AssertionError("it was tried")

    found = decide(wanted, kept, seconds, attempt or never, missing=missing, compute=torch.float32, say=told.append)
    return found, told


@pytest.mark.parametrize(
    ("wanted", "kept", "seconds"),
    [(False, None, LONG), (False, True, LONG), (AUTO, None, WORTH_SECONDS / 2), (AUTO, False, LONG)],
)
def test_without_a_trial_the_network_stays_as_it_is_and_nothing_is_said(
    wanted: bool | str, kept: bool | None, seconds: float
) -> None:
    assert decided(wanted, kept, seconds) == (False, [])


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


def test_without_a_tool_auto_does_without_and_true_is_an_error_that_says_what_to_do() -> None:
    assert decided(AUTO, None, LONG, missing="a C++ compiler") == (False, [])
    with pytest.raises(ConfigError, match=r"compile=true: .*a C\+\+ compiler, which is not here; compile=auto"):
        decided(True, None, LONG, missing="a C++ compiler")


def test_a_compiler_is_looked_for_where_torch_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler.missing_tool(cpu) == "a C++ compiler"
    (tmp_path / "g++").touch(0o755)
    assert compiler.missing_tool(cpu) is None
    monkeypatch.setenv("CXX", "icpx")
    assert compiler.missing_tool(cpu) == "a C++ compiler"


def test_the_shortest_time_is_that_of_the_arithmetic_at_half_of_the_peak() -> None:
    # 90 epochs of ImageNet, ResNet-50 (24.5 GFLOP an image) on a device with 1,000 TFLOP/s: 1.6 hours at least.
    assert shortest_time(90 * 1_281_167, 24.5e9, 1e15) == pytest.approx(90 * 1_281_167 * 24.5e9 / 0.5e15)


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
