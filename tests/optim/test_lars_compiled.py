"""torch.compile of LARS over every dense optimizer: no more graph breaks than the base has."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from bases import (
    BASES,
    DECAYS,
    ONE_GRADIENT,
    OPTIONS,
    Base,
    Problem,
    assert_close,
    assert_moved,
    by_hand,
    groups_of,
    run,
    sharded_weights,
)
from torch import Tensor
from torch.nn import Parameter

from lars_train import LARS

# No step of ours may warn, about a deprecation or anything else.
# (Whether an earlier test closed its files shows in whichever test is running when they are collected.)
pytestmark = pytest.mark.filterwarnings(
    "error", "default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"
)


def compiled(
    optimizer: Any, params: Sequence[Tensor], grads: Any, decays: Sequence[float] | None = None
) -> tuple[dict[str, int], set[str]]:
    """Three steps through torch.compile, by hand if `decays` are given: graph breaks by their reasons, and warnings."""
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    reset()
    counters.clear()
    step = torch.compile(optimizer.step, backend="eager")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for update in range(3):
            for p, grad in zip(params, grads[update], strict=True):
                p.grad = grad.clone()
            if decays is not None:
                by_hand(optimizer, decays)
            step()
    return dict(counters["graph_break"]), {str(warning.message) for warning in told}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "flag"),
    [
        pytest.param(base, flag, id="-".join((base.name, *flag)))
        for base in ONE_GRADIENT
        # On the CPU a base takes capturable within torch.compile only, but for fused ones.
        for flag in ({"capturable": True} if base.takes("capturable") else {},)
    ],
)
def test_torch_compiles_the_step_without_more_graph_breaks_than_the_bases_own(
    base: Base, flag: dict[str, bool]
) -> None:
    weights, grads = sharded_weights()
    params, plain = ([Parameter(w.clone()) for w in weights] for _ in range(2))
    decays = DECAYS if base.takes("weight_decay") else (0.0,) * len(DECAYS)
    lars = LARS(base.build(groups_of(base, params), **flag), **OPTIONS)
    breaks, told = compiled(lars, params, grads)
    alone = base.build(groups_of(base, plain), **flag)
    for group in alone.param_groups:
        group |= {"weight_decay": 0.0} if base.takes("weight_decay") else {}
    # Compiled too: torch then computes some bases' bias corrections in float32.
    own, own_told = compiled(alone, plain, grads, decays)
    assert told <= own_told
    assert breaks.keys() <= own.keys()
    # Adafactor reads a value of each tensor; torch counts the last of these breaks for LARS's step, too.
    assert sum(breaks.values()) <= sum(own.values()) + (base.name == "Adafactor")
    assert_close(params, plain, base.tolerance)
    assert [g.get("weight_decay", 0.0) for g in lars.param_groups] == list(decays)


def test_lbfgs_whose_step_torch_does_not_compile_steps_as_without_torch_compile() -> None:
    base = next(base for base in BASES if base.calls_closure)
    problem = Problem(base)
    params, plain = problem.parameters(), problem.parameters()
    lars, alone = base.lars(params), base.alone(plain)

    def closure() -> Tensor:
        lars.zero_grad()
        loss = problem.loss(params, 0)
        loss.backward()
        return loss

    torch._dynamo.reset()
    with warnings.catch_warnings():
        # torch's compiler looks at the .grad of a tensor that has none.
        warnings.simplefilter("ignore")
        torch.compile(lars.step, backend="eager")(closure)
    run(alone, plain, problem, range(1), decays=[0.0])
    assert_close(params, plain, base.tolerance)
    assert_moved(params, problem)
