"""Settings that are ``auto`` are resolved for the machine, and a resumed run keeps the resolved values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from lars_train.config import Config, DataConfig, LaunchConfig, PrecisionConfig
from lars_train.data.decode import native
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.models.factory import build_model
from lars_train.run_plan import Plan
from lars_train.training import device as device_module
from lars_train.training import resolve as module
from lars_train.training.distributed import Group
from lars_train.training.resolve import Resolved, resolve_execution

CPU = torch.device("cpu")
GHOST = 4


def plan(batch: int = 40, ghost: int = GHOST) -> Plan:
    return Plan(
        samples=400,
        nominal_batch=batch,
        global_batch=batch,
        ghost_batch=ghost,
        scaled=False,
        raised=False,
        epochs=1,
        updates_per_epoch=10,
        updates=10,
        stop=10,
        warmup_updates=0,
    )


def config(**settings: Any) -> Config:
    return Config(data=DataConfig(image_size=16), **settings)


@pytest.fixture(autouse=True)
def a_known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: 1 << 40)
    monkeypatch.setattr(native, "is_available", lambda: False)
    monkeypatch.setattr(device_module, "available_cores", lambda: 8)
    monkeypatch.setattr(device_module, "_cpu_has", lambda *flags: "bf16" in flags)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return build_model("small", num_classes=4, ghost_batch=GHOST, zero_gamma=False)


@dataclass(frozen=True)
class FakeGroup(Group):
    """A fake group. `least` is the minimum over the other ranks."""

    least: int = 1 << 62

    def all_reduce_min(self, value: int, device: torch.device) -> int:
        return min(value, self.least)


def of_pillow(micro_batch: int, precision: str, threads: int, world: int, device: str) -> Resolved:
    return Resolved(micro_batch, precision, threads, world, device, decoder="pillow", channels_last=True)


def decide(network: nn.Module, c: Config, stored: Resolved | None = None, **how: Any) -> Resolved:
    ranks, least = how.get("ranks", Ranks()), how.get("least", 1 << 62)
    kept = None if stored is None else asdict(stored)
    return resolve_execution(c, how.get("plan", plan()), network, CPU, FakeGroup(ranks, least), kept)


def test_auto_settings_are_resolved_for_this_machine(network: nn.Module) -> None:
    assert decide(network, config()) == of_pillow(40, "bf16", 8, 1, "cpu")
    two = Ranks(1, 2, 1, 2)
    assert decide(network, config(), ranks=two) == of_pillow(20, "bf16", 4, 2, "cpu")


def test_the_micro_batch_is_at_most_a_ranks_samples(network: nn.Module) -> None:
    # Ten ghost batches over three ranks: the busiest one has four.
    assert decide(network, config(), ranks=Ranks(2, 3, 2, 3)).micro_batch == 4 * GHOST
    assert decide(network, config(micro_batch=40), ranks=Ranks(2, 3, 2, 3)).micro_batch == 4 * GHOST
    assert decide(network, config(), plan=plan(4000)).micro_batch == 256


def test_a_configured_micro_batch_is_used_and_checked(network: nn.Module) -> None:
    assert decide(network, config(micro_batch=12)).micro_batch == 12
    with pytest.raises(ConfigError, match=r"micro_batch=10 .* ghost batch of 4 .* 8 and 12"):
        decide(network, config(micro_batch=10))


def test_the_rank_with_the_least_memory_decides(network: nn.Module) -> None:
    assert decide(network, config(), ranks=Ranks(0, 2, 0, 2), least=1).micro_batch == GHOST


def test_without_free_memory_the_micro_batch_is_one_ghost_batch(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: 0)
    assert decide(network, config()).micro_batch == GHOST


def test_a_resumed_run_keeps_its_resolved_settings(network: nn.Module) -> None:
    first = of_pillow(8, "fp32", 3, 1, "cpu")
    assert decide(network, config(), first) == first


def test_the_config_takes_precedence_over_resolved_settings(network: nn.Module) -> None:
    first = of_pillow(8, "bf16", 3, 1, "cpu")
    c = config(micro_batch=16, precision=PrecisionConfig("fp64"), launch=LaunchConfig(threads=2))
    assert decide(network, c, first) == of_pillow(16, "fp64", 2, 1, "cpu")


def test_threads_are_chosen_again_for_another_world_size(network: nn.Module) -> None:
    first = of_pillow(8, "fp32", 3, 1, "cpu")
    assert decide(network, config(), first, ranks=Ranks(0, 2, 0, 2)) == of_pillow(8, "fp32", 4, 2, "cpu")
    assert decide(network, config(), replace(first, device="cuda")).threads == 8


def test_a_stored_micro_batch_that_no_longer_fits_is_replaced(network: nn.Module) -> None:
    # More ranks have fewer samples each. Another run's ghost batch may not divide the stored micro-batch.
    assert decide(network, config(), of_pillow(40, "fp32", 1, 1, "cpu"), ranks=Ranks(0, 5, 0, 5)).micro_batch == 8
    assert decide(network, config(), of_pillow(6, "fp32", 1, 1, "cpu")).micro_batch == 40


def test_a_precision_that_the_device_lacks_is_refused(network: nn.Module) -> None:
    with pytest.raises(ConfigError, match="precision=fp16"):
        decide(network, config(precision=PrecisionConfig("fp16")))


@pytest.mark.parametrize(
    ("room", "kept", "expected"), [(1, None, 1), (7, None, 7), (99, None, 10), (7, 3, 3), (2, 3, 2)]
)
def test_on_a_gpu_the_micro_batch_is_the_largest_that_fits(
    room: int, kept: int | None, expected: int, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def attempt(model: nn.Module, samples: int, *others: Any) -> None:
        assert others[-1] == 1
        tried.append(samples // GHOST)
        if samples > room * GHOST:
            raise torch.OutOfMemoryError("there is no more")

    monkeypatch.setattr(module, "try_micro_batch", attempt)
    stored = None if kept is None else asdict(of_pillow(kept * GHOST, "fp32", 8, 1, "cuda"))
    settings = config(precision=PrecisionConfig(name="fp32"))
    found = resolve_execution(settings, plan(), network, torch.device("cuda"), Group(Ranks()), stored)
    assert found.micro_batch == expected * GHOST
    assert len(tried) == len(set(tried)) <= 5


def test_with_graphs_a_trial_has_the_memory_of_two_passes(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    monkeypatch.setattr(module, "try_micro_batch", lambda *arguments: passes.append(arguments[-1]))
    settings = config(precision=PrecisionConfig(name="fp32"), cuda_graphs=True)
    resolve_execution(settings, plan(), network, torch.device("cuda"), Group(Ranks()), None)
    assert passes == [2]


def test_a_gpu_too_small_for_one_ghost_batch_is_an_error(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("there is none")

    monkeypatch.setattr(module, "try_micro_batch", attempt)
    settings = config(precision=PrecisionConfig(name="fp32"))
    with pytest.raises(ConfigError, match=r"one ghost batch of 4 images .* model\.ghost_batch"):
        resolve_execution(settings, plan(), network, torch.device("cuda"), Group(Ranks()), None)
