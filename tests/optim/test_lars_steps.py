"""LARS over every dense optimizer of torch.optim steps by the rule.

bases.py has the reference: the base alone, without weight decay, on gradients rescaled by hand in float64.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from bases import (
    BASES,
    DECAY,
    ONE_GRADIENT,
    OPTIONS,
    UPDATES,
    Base,
    Problem,
    assert_agrees,
    assert_close,
    assert_moved,
    assert_same,
    no_warnings,
    optimizers_of_torch,
    over,
    rescaled,
    run,
)
from torch import nn, optim
from torch.nn import Parameter

from lars_train import LARS

pytestmark = no_warnings


def test_bases_has_every_dense_optimizer_of_torch() -> None:
    assert {base.kind for base in BASES} == optimizers_of_torch() - {optim.SparseAdam}


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "maximize": {"maximize": True},
    "foreach-maximize": {"foreach": True, "maximize": True},
    "fused-maximize": {"fused": True, "maximize": True},
    "tensor-lr": {"lr": torch.tensor(0.25, dtype=torch.float64)},
    "fused-tensor-lr": {"fused": True, "lr": torch.tensor(0.25)},
    # The other kernels support capturable only on accelerators and within torch.compile (test_lars_compiled.py).
    "fused-capturable": {"fused": True, "capturable": True},
}


@pytest.mark.parametrize(
    ("base", "variant"),
    [
        pytest.param(base, variant, id=f"{base.name}-{variant}")
        for base in BASES
        for variant, keywords in VARIANTS.items()
        if base.takes(*keywords)
    ],
)
def test_steps_equal_the_base_on_gradients_rescaled_by_hand(base: Base, variant: str) -> None:
    lars = assert_agrees(base, Problem(base), **VARIANTS[variant])
    assert lars.param_groups[0].get("weight_decay", 0.0) == base.decay


def database() -> list[Any]:
    from torch.testing._internal import common_optimizers

    # Importing it freezes the flags of torch.backends in the whole process. Undo that.
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return list(common_optimizers.optim_db)


def database_inputs(info: Any) -> list[Any]:
    from torch.testing._internal.common_optimizers import _get_optim_inputs_including_global_cliquey_kwargs

    inputs = _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float64, info, skip=("differentiable",))
    return list(inputs)


def test_torchs_optimizer_database_has_every_base() -> None:
    assert {info.optim_cls for info in database()} == optimizers_of_torch()


@pytest.mark.parametrize(
    "kind", sorted(optimizers_of_torch() - {optim.SparseAdam}, key=lambda kind: kind.__name__), ids=lambda k: k.__name__
)
def test_torchs_optimizer_database_matches_and_resumes(kind: type) -> None:
    (info,) = (info for info in database() if info.optim_cls is kind)
    for inputs in database_inputs(info):
        print(inputs.desc)  # shown if it fails
        assert_matches_and_resumes(Base(kind), inputs.kwargs)


def assert_matches_and_resumes(base: Base, database_input: dict[str, Any]) -> None:
    # The length of a rescaled gradient depends only on its weight, so LBFGS with 20 iterations circles the minimum, and
    # rounding errors decide where it ends.
    keywords = database_input | ({"max_iter": 4} if base.calls_closure else {})
    problem = Problem(base)
    decay = keywords.get("weight_decay", inspect.signature(base.kind).parameters.get("weight_decay"))
    decay = getattr(decay, "default", decay) or 0.0
    params, plain = problem.parameters(), problem.parameters()
    run(LARS(base.build(params, **copy.deepcopy(keywords)), **OPTIONS), params, problem, base.updates)
    run(base.alone(plain, **copy.deepcopy(keywords)), plain, problem, base.updates, decays=[decay])
    assert_close(params, plain, base.tolerance)
    assert_moved(params, problem)

    # torch casts a loaded state to its parameter's dtype, so with float64 even a plain base continues differently.
    problem = Problem(base, [torch.float32])
    params = problem.parameters()
    lars = LARS(base.build(params, **copy.deepcopy(keywords)), **OPTIONS)
    run(lars, params, problem, range(3))
    others = [Parameter(p.detach().clone()) for p in params]
    loaded = LARS(base.build(others, **copy.deepcopy(keywords)))
    loaded.load_state_dict(copy.deepcopy(lars.state_dict()))
    run(lars, params, problem, range(3, UPDATES))
    run(loaded, others, problem, range(3, UPDATES))
    assert_same(others, params)


def test_sparse_adam_is_refused_at_its_first_sparse_gradient() -> None:
    layer = nn.Embedding(4, 2, sparse=True)
    before = layer.weight.detach().clone()
    lars = LARS(optim.SparseAdam(layer.parameters()))
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"\(4, 2\).*dense"):
        lars.step()
    assert torch.equal(layer.weight, before)


@over(ONE_GRADIENT)
def test_an_added_group_has_its_own_lr_and_decay(base: Base) -> None:
    problem = Problem(base)
    params, plain = problem.parameters(), problem.parameters()
    lars, alone = base.lars(params[:2]), base.alone(plain[:2])
    own = {"lr": 0.02} | ({"weight_decay": 0.3} if base.takes("weight_decay") else {})
    lars.add_param_group({"params": params[2:], **own})
    alone.add_param_group({"params": plain[2:], "lr": 0.02})
    assert lars.base_optimizer.param_groups[1]["params"][0] is params[2]
    run(lars, params, problem)
    run(alone, plain, problem, decays=[base.decay, own.get("weight_decay", 0.0)])
    assert_close(params, plain, base.tolerance)
    assert_moved(params, problem)


def adamw(weight: Any, grads: Iterable[Any], weight_decay: str) -> Any:
    """Return the weight after LARS over AdamW: with decay in the ratio ("coupled"), or AdamW's own ("base")."""
    lr, (beta1, beta2), small = 0.05, (0.9, 0.999), 1e-8
    mean = square = np.zeros_like(weight)
    for number, raw in enumerate(grads, start=1):
        grad = rescaled(weight, raw, DECAY if weight_decay == "coupled" else 0.0)
        mean = beta1 * mean + (1 - beta1) * grad
        square = beta2 * square + (1 - beta2) * grad**2
        if weight_decay == "base":
            weight = weight - lr * DECAY * weight
        step = (mean / (1 - beta1**number)) / (np.sqrt(square / (1 - beta2**number)) + small)
        weight = weight - lr * step
    return weight


@pytest.mark.parametrize("weight_decay", ["coupled", "base"])
@pytest.mark.parametrize("flag", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
@pytest.mark.parametrize("kind", ["AdamW", "Adam(decoupled_weight_decay)"])
def test_decoupled_decay_is_part_of_the_ratio_or_left_to_adamw(weight_decay: Any, flag: Any, kind: str) -> None:
    draw = np.random.default_rng(3)
    start, grads = draw.normal(size=(4, 3)), draw.normal(size=(UPDATES, 4, 3))
    weight = Parameter(torch.from_numpy(start.copy()))
    keywords = {"lr": 0.05, "weight_decay": DECAY, **flag}
    base = optim.AdamW([weight], **keywords)
    if kind != "AdamW":
        base = optim.Adam([weight], decoupled_weight_decay=True, **keywords)
    lars = LARS(base, **OPTIONS, weight_decay=weight_decay)
    for grad in grads:
        weight.grad = torch.from_numpy(grad.copy())
        lars.step()
    np.testing.assert_allclose(weight.detach().numpy(), adamw(start, grads, weight_decay), rtol=1e-12, atol=1e-12)


@over([base for base in ONE_GRADIENT if base.takes("weight_decay")])
def test_weight_decay_base_leaves_decay_to_every_base(base: Base) -> None:
    problem = Problem(base)
    params, plain = problem.parameters(), problem.parameters()
    lars = LARS(base.build(params, weight_decay=DECAY), **OPTIONS, weight_decay="base")
    run(lars, params, problem)
    run(base.build(plain, weight_decay=DECAY), plain, problem, decays=[0.0])
    assert_close(params, plain, base.tolerance)
    coupled = problem.parameters()
    run(base.lars(coupled), coupled, problem)
    assert any(not torch.allclose(p, q) for p, q in zip(params, coupled, strict=True))
