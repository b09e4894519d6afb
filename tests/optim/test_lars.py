"""LARS as an optimizer: the objects it shares with its base, the tensors it changes, the settings it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from bases import DECAY, OPTIONS, rescaled, wide
from torch.nn import Parameter

from lars_train.optim.lars import LARS


def parameters() -> list[Parameter]:
    """Two weights with gradients, the second of them zero, and one without a gradient."""
    draw = np.random.default_rng(3)
    params = [Parameter(torch.from_numpy(draw.normal(size=(4, 3)))) for _ in range(3)]
    for p in params[:2]:
        p.grad = torch.from_numpy(draw.normal(size=(4, 3)))
    params[1].data.zero_()
    return params


def simple() -> LARS:
    return LARS(torch.optim.SGD([Parameter(torch.ones(2))], lr=1.0, momentum=0.9, weight_decay=DECAY))


def test_gradients_are_rescaled_in_place() -> None:
    params = parameters()
    held = [p.grad for p in params]
    expected = [rescaled(wide(p), wide(p.grad), DECAY) for p in params if p.grad is not None]
    LARS(torch.optim.RMSprop(params, lr=1.0, weight_decay=DECAY), **OPTIONS).step()
    assert all(p.grad is grad for p, grad in zip(params, held, strict=True))
    for p, grad in zip(params[:2], expected, strict=True):
        assert p.grad is not None
        np.testing.assert_allclose(p.grad.numpy(), grad, rtol=1e-12)


def test_sgd_on_the_cpu_leaves_gradients_unchanged() -> None:
    params = parameters()
    held = [(p.grad, None if p.grad is None else p.grad.clone()) for p in params]
    LARS(torch.optim.SGD(params, lr=1.0, momentum=0.9, weight_decay=DECAY)).step()
    for p, (grad, values) in zip(params, held, strict=True):
        assert p.grad is grad
        assert grad is None or (values is not None and torch.equal(grad, values))


def test_a_base_without_weight_decay_gets_no_such_key() -> None:
    lars = LARS(torch.optim.Rprop(parameters(), lr=0.01))
    lars.step()
    assert "weight_decay" not in lars.param_groups[0]


def test_weight_decay_is_restored_if_the_step_raises() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            assert [g["weight_decay"] for g in self.param_groups] == [0.0, 0.0]
            raise FloatingPointError("broken")

    params = parameters()
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.2}]
    lars = LARS(Broken(groups, lr=1.0))
    with pytest.raises(FloatingPointError):
        lars.step()
    assert [g["weight_decay"] for g in lars.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_have_norms_in_float32(dtype: torch.dtype) -> None:
    # Squares of 300 sum to 9e8, far beyond float16; the ratio is 1e-3 * 3e4 / 3e1.
    params = [Parameter(torch.full((10_000,), 300.0, dtype=dtype))]
    params[0].grad = torch.full((10_000,), 0.3, dtype=dtype)
    grad = float(params[0].grad[0])
    LARS(torch.optim.SGD(params, lr=1.0), eps=0.0).step()
    ratio = 0.001 * 300.0 / grad
    expected = torch.tensor(ratio * grad, dtype=torch.float64).to(dtype)
    assert params[0].grad is not None
    assert params[0].grad.dtype is dtype
    assert torch.equal(params[0].grad, expected.expand(10_000))


def test_lars_shares_the_objects_of_its_base() -> None:
    lars = simple()
    base = lars.base_optimizer
    assert isinstance(lars, torch.optim.Optimizer)
    assert lars.param_groups is base.param_groups
    assert lars.state is base.state
    assert lars.defaults is base.defaults
    lars.load_state_dict(lars.state_dict())
    assert lars.param_groups is base.param_groups
    assert lars.state is base.state
    extra = Parameter(torch.ones(2))
    lars.add_param_group({"params": [extra], "lr": 7.0})
    assert base.param_groups[1]["params"][0] is extra


@pytest.mark.parametrize("entry", [{"eps": -1.0}, {"trust_coef": 0.0}, {"clip": 1.0}, {"clap": 1.0}])
def test_invalid_options_in_a_state_dict_are_refused_unloaded(entry: dict[str, float]) -> None:
    lars = simple()
    state = {**lars.state_dict(), "lars": entry}
    state["param_groups"][0]["lr"] = 5.0
    with pytest.raises(ValueError, match=next(iter(entry))):
        lars.load_state_dict(state)
    assert lars.param_groups[0]["lr"] == 1.0
    assert (lars.eps, lars.trust_coef) == (1e-8, 0.001)


def test_invalid_bases_and_settings_are_refused() -> None:
    params = parameters()
    sgd = torch.optim.SGD(params, lr=1.0)
    with pytest.raises(ValueError, match="differentiable"):
        LARS(torch.optim.SGD(params, lr=1.0, differentiable=True))
    for settings in ({"eps": -1e-9}, {"eps": math.nan}, {"trust_coef": 0.0}, {"trust_coef": math.inf}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            LARS(sgd, **settings)


def test_repr_shows_the_base_and_the_options() -> None:
    lars = simple()
    assert repr(lars).startswith("LARS(SGD (")
    assert repr(lars).endswith("eps=1e-08, trust_coef=0.001)")
