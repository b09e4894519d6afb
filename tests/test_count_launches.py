"""scripts/bench/count_launches.py: what it counts, and that ghost batches and LARS do not multiply it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench"))
    return importlib.import_module("count_launches")


def test_what_computes_counts_once_and_views_do_not(script: ModuleType) -> None:
    images, weight = torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3, requires_grad=True)
    with script.Launches() as found:
        made = functional.conv2d(images, weight).flatten(1).transpose(0, 1)[1:]
        loss = found.within(script.FORWARD, torch.relu)(made)
        found.within(script.BACKWARD, torch.autograd.backward)(loss, torch.ones_like(loss))
    assert found.counts[script.REST] == {"convolution": 1, "ones_like": 1}
    assert found.counts[script.FORWARD] == {"relu": 1}
    # Of the slice one that fills zeros and one that copies into them.
    assert found.counts[script.BACKWARD]["convolution_backward"] == 1


def test_neither_ghost_batches_nor_parameters_multiply_the_launches(script: ModuleType) -> None:
    two, four = (script.of_the_trainer(script.Case("small", 8, 16, 10), ghosts) for ghosts in (2, 4))
    assert two == four
    larger = script.of_the_trainer(script.Case("resnet18", 8, 32, 10), 4)
    assert four[script.OPTIMIZER] == larger[script.OPTIMIZER] <= 25
    assert four[script.REST] == larger[script.REST] < 30


def test_an_update_of_one_ghost_batch_adds_three_operations_for_each_batch_norm(script: ModuleType) -> None:
    case = script.Case("resnet18", 8, 32, 10)
    bare, ours = script.bare(case), script.of_the_trainer(case, 1)
    # ResNet-18 has 20. For each: zeros for its statistics, and two sums. torch counts the batches instead; its loss
    # counts to the forward pass here and to the rest there.
    assert ours[script.FORWARD] - bare[script.FORWARD] == 20 * (3 - 1) - 2
    assert abs(ours[script.BACKWARD] - bare[script.BACKWARD]) <= 2
