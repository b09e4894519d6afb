"""Parameters of every dtype and layout, empty or without gradients, under LARS over every dense optimizer.

bases.py has the reference: the base alone, without weight decay, on gradients rescaled by hand in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bases import (
    BASES,
    MUON,
    Base,
    Problem,
    assert_agrees,
    assert_close,
    assert_same,
    each_way,
    every_base,
    no_warnings,
    rescale_by_hand,
    run,
)
from torch import Tensor, nn, optim
from torch.nn import Parameter

pytestmark = no_warnings


HALF = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
# Muon needs matrices; LBFGS flattens gradients without a copy, which fails for channels_last.
FOUR_DIMENSIONAL = [base for base in BASES if base.kind not in (MUON, optim.LBFGS)]


@each_way(BASES)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16,),
        (torch.float16,),
        (torch.float32,),
        (torch.float64,),
        (torch.complex64,),
        (torch.float32, torch.float64, torch.bfloat16),
    ],
    ids=lambda dtypes: "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
)
def test_dtypes_alone_and_mixed_match_the_rule(
    base: Base, flag: dict[str, bool], dtypes: tuple[torch.dtype, ...]
) -> None:
    problem = Problem(base, dtypes)
    if dtypes[0].is_complex and (flag == {"fused": True} or base.kind in (optim.Adafactor, MUON)):
        params = problem.parameters()
        lars = base.lars(params, **flag)
        with pytest.raises(RuntimeError, match="complex"):
            run(lars, params, problem)
        assert lars.param_groups[0].get("weight_decay", 0.0) == base.decay
        assert_same(params, problem.weights)
        return
    # The usual 1e-8 is zero in float16, and a zero gradient divided by it is NaN, also with a plain base.
    single = 1e-3 if base.calls_closure else 2e-5
    eps = {"eps": 1e-3} if base.takes("eps") and base.kind is not optim.Adafactor else {}
    tolerance = max(HALF.get(dtype, base.tolerance if dtype is torch.float64 else single) for dtype in dtypes)
    assert_agrees(base, problem, tolerance=tolerance, **flag, **eps)


@each_way(BASES)
def test_empty_parameters_and_those_without_gradient_are_skipped(base: Base, flag: dict[str, bool]) -> None:
    full, without = Parameter(torch.ones(2, 3)), Parameter(torch.ones(3, 2))
    # Muon and Adafactor divide by the length of a side.
    empty = Parameter(torch.zeros(0, 3) if base.kind not in (MUON, optim.Adafactor) else torch.ones(1, 1))
    lars = base.lars([without, empty, full], **flag)

    def closure() -> Tensor:
        lars.zero_grad()
        loss = full.square().sum() + empty.sum()
        loss.backward()
        return loss

    for _ in range(2):
        lars.step(closure)
    assert torch.equal(without, torch.ones(3, 2))
    assert lars.state.get(without, {}).get("step", 0) == 0
    assert without.grad is None
    assert torch.isfinite(full).all()
    assert not torch.equal(full, torch.ones(2, 3))


@every_base
def test_a_step_without_any_gradient_changes_nothing(base: Base) -> None:
    problem = Problem(base)
    params = problem.parameters()
    lars = base.lars(params)
    lars.step(lambda: torch.tensor(1.0))
    assert_same(params, problem.weights)
    assert lars.param_groups[0].get("weight_decay", 0.0) == base.decay


@each_way(FOUR_DIMENSIONAL)
@pytest.mark.parametrize("grad_layout", [torch.channels_last, torch.contiguous_format], ids=["alike", "apart"])
def test_channels_last_weights_keep_their_layout(
    base: Base, flag: dict[str, bool], grad_layout: torch.memory_format
) -> None:
    draw = np.random.default_rng(2)
    start, grads = torch.from_numpy(draw.normal(size=(4, 3, 2, 2))), torch.from_numpy(draw.normal(size=(3, 4, 3, 2, 2)))
    weight, plain = (Parameter(start.clone(memory_format=torch.channels_last)) for _ in range(2))
    lars, alone = base.lars([weight], **flag), base.alone([plain], **flag)

    def step(optimizer: Any, param: Parameter, grad: Tensor, decays: Any) -> None:
        def closure() -> Tensor:
            param.grad = grad.clone(memory_format=grad_layout)
            if decays:
                rescale_by_hand(optimizer, decays)
            return torch.tensor(1.0)

        optimizer.step(closure)

    for grad in grads:
        step(lars, weight, grad, None)
        step(alone, plain, grad, [base.decay])
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert_close([weight], [plain], base.tolerance)


@every_base
def test_a_sparse_gradient_is_refused_before_anything_changes(base: Base) -> None:
    layer = nn.Embedding(4, 2, sparse=True)
    dense = Parameter(torch.ones(2, 2))
    before = layer.weight.detach().clone()
    lars = base.lars([dense, layer.weight])

    def closure() -> Tensor:
        lars.zero_grad()
        loss = layer(torch.tensor([1])).sum() + dense.sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"\(4, 2\).*sparse.*dense"):
        lars.step(closure)
    assert torch.equal(layer.weight, before)
    assert torch.equal(dense, torch.ones(2, 2))
    assert dense.grad is not None
    assert torch.equal(dense.grad, torch.ones(2, 2))
    assert lars.param_groups[0].get("weight_decay", 0.0) == base.decay
