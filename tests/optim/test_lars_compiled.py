"""torch.compile of LARS makes no more graph breaks than of the base."""

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
    groups_of,
    no_warnings,
    rescale_by_hand,
    run,
    sharded_weights,
)
from torch import Tensor
from torch.nn import Parameter

from lars_train import LARS

pytestmark = no_warnings


def compiled(
    optimizer: Any, params: Sequence[Tensor], grads: Any, decays: Sequence[float] | None = None
) -> tuple[dict[str, int], set[str]]:
    """Make three compiled steps, by hand if `decays` is given. Return graph breaks by reason, and the warnings."""
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    reset()
    counters.clear()
    step = torch.compile(optimizer.step, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for update in range(3):
            for p, grad in zip(params, grads[update], strict=True):
                p.grad = grad.clone()
            if decays is not None:
                rescale_by_hand(optimizer, decays)
            step()
    return dict(counters["graph_break"]), {str(warning.message) for warning in caught}


# With and without momentum, second moments, capturable steps and values that the base reads back.
COMPILED = ("SGD", "Adam", "Adagrad", "RMSprop", "Adafactor", "Muon")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "flag"),
    [
        pytest.param(base, flag, id="-".join((base.name, *flag)))
        for base in ONE_GRADIENT
        if base.name in COMPILED
        # On the CPU bases that are not fused support capturable only within torch.compile.
        for flag in ({"capturable": True} if base.takes("capturable") else {},)
    ],
)
def test_torch_compile_adds_no_graph_breaks_to_those_of_the_base(base: Base, flag: dict[str, bool]) -> None:
    weights, grads = sharded_weights()
    params, plain = ([Parameter(w.clone()) for w in weights] for _ in range(2))
    decays = DECAYS if base.takes("weight_decay") else (0.0,) * len(DECAYS)
    lars = LARS(base.build(groups_of(base, params), **flag), **OPTIONS)
    breaks, seen_warnings = compiled(lars, params, grads)
    alone = base.build(groups_of(base, plain), **flag)
    for group in alone.param_groups:
        group |= {"weight_decay": 0.0} if base.takes("weight_decay") else {}
    # The reference is compiled, too, because torch then computes some bases' bias corrections in float32.
    own, own_warnings = compiled(alone, plain, grads, decays)
    assert seen_warnings <= own_warnings
    assert breaks.keys() <= own.keys()
    # Adafactor reads a value of each tensor. torch counts the last of these breaks also for LARS's step.
    assert sum(breaks.values()) <= sum(own.values()) + (base.name == "Adafactor")
    assert_close(params, plain, base.tolerance)
    assert [g.get("weight_decay", 0.0) for g in lars.param_groups] == list(decays)


def test_lbfgs_under_torch_compile_steps_as_without() -> None:
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
        # torch's compiler reads the .grad of a tensor without one, which warns.
        warnings.simplefilter("ignore")
        torch.compile(lars.step, backend="eager")(closure)
    run(alone, plain, problem, range(1), decays=[0.0])
    assert_close(params, plain, base.tolerance)
    assert_moved(params, problem)


@pytest.mark.slow
def test_a_compiled_step_scales_the_step_of_the_base() -> None:
    base = next(base for base in BASES if base.name == "SGD")  # torch compiles AdamW to float32 arithmetic
    weights, grads = sharded_weights()
    params, plain = ([Parameter(w.clone()) for w in weights] for _ in range(2))
    lars, eager = (LARS(base.build(groups_of(base, p)), ratio_of="step", **OPTIONS) for p in (params, plain))
    breaks, _ = compiled(lars, params, grads)
    assert breaks == {}
    for update in range(3):
        for p, grad in zip(plain, grads[update], strict=True):
            p.grad = grad.clone()
        eager.step()
    assert_close(params, plain, base.tolerance)
