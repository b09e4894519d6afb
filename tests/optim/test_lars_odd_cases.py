"""Regression tests of rare cases: shared or lazy memory, autograd's version counters, hooks, default devices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lars_train.optim.lars import LARS


def parameter(*shape: int, value: float = 1.0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    p = nn.Parameter(torch.full(shape, value, dtype=dtype))
    p.grad = torch.ones_like(p)
    return p


def test_autograd_detects_that_a_step_changed_the_weights() -> None:
    a, b, x = parameter(3, 3), parameter(3, 3), torch.randn(3, 3, dtype=torch.float64)
    lars = LARS(torch.optim.SGD([a, b], lr=0.5))
    loss = ((x @ a) @ b).sum()
    loss.backward(retain_graph=True)
    lars.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("sgd", [{"nesterov": True}, {}], ids=str)
def test_a_tensor_weight_decay_stays_unchanged(sgd: dict[str, Any]) -> None:
    p, q = parameter(3, 4), parameter(3, 4)
    decay = torch.tensor(0.05)
    lars = LARS(torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=decay, **sgd), trust_coef=1e-5)
    other = LARS(torch.optim.SGD([q], lr=0.1, momentum=0.9, weight_decay=float(decay), **sgd), trust_coef=1e-5)
    for _ in range(3):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        lars.step()
        other.step()
    assert lars.param_groups[0]["weight_decay"] is decay
    assert decay == torch.tensor(0.05)
    torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("lazy", ["expanded", "negated"])
def test_expanded_and_lazy_gradients_count_with_their_values(base: Any, lazy: str) -> None:
    params = [parameter(4, 5, value=2.0) for _ in range(2)]
    if lazy == "expanded":
        params[0].grad = torch.tensor(0.5, dtype=torch.float64).expand(4, 5)
        params[1].grad = torch.full((4, 5), 0.5, dtype=torch.float64)
    else:
        params[0].grad = torch._neg_view(torch.full((4, 5), 0.5, dtype=torch.float64))
        params[1].grad = torch.full((4, 5), -0.5, dtype=torch.float64)
    for p in params:
        LARS(base([p], lr=0.1, weight_decay=0.1)).step()
    assert not torch.equal(params[0], torch.full_like(params[0], 2.0))
    torch.testing.assert_close(*params, rtol=1e-12, atol=0)


def test_clamping_a_complex_gradient_fails_and_changes_nothing() -> None:
    p, q = parameter(2), nn.Parameter(torch.ones(2, dtype=torch.complex128))
    q.grad = torch.ones_like(q)
    with pytest.raises(RuntimeError, match="clamp"):
        LARS(torch.optim.SGD([p, q], lr=1.0, weight_decay=0.1), clamp=0.5).step()
    assert torch.equal(p, torch.ones_like(p))
    assert p.grad is not None
    assert torch.equal(p.grad, torch.ones_like(p))


def test_default_device_and_dtype_have_no_effect() -> None:
    p = parameter(100, 100, value=300.0, dtype=torch.float32)
    lars = LARS(torch.optim.AdamW([p], lr=0.1, weight_decay=0.1), record=True)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            lars.step()
            layers = lars.layers()
    finally:
        torch.set_default_dtype(before)
    assert layers is not None
    assert layers.values[0].tolist() == pytest.approx([30000.0], rel=1e-6)


def test_a_replaced_step_of_the_base_is_used() -> None:
    p = parameter(3)
    base = torch.optim.SGD([p], lr=1.0)
    seen: list[Tensor | None] = []
    base.step = lambda closure=None: seen.append(p.grad)
    LARS(base, eps=0.0).step()
    assert torch.equal(p, torch.ones_like(p))
    assert seen[0] is not None
    torch.testing.assert_close(seen[0], torch.full_like(p, 0.001))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_settings_changed_by_a_hook_of_the_base_persist(base: Any) -> None:
    optimizer = base([parameter(3)], lr=0.1, weight_decay=0.1)
    optimizer.register_step_post_hook(lambda o, *_: o.param_groups[0].update(weight_decay=0.5))
    lars = LARS(optimizer)
    lars.step()
    assert lars.param_groups[0]["weight_decay"] == 0.5


def test_an_infinite_weight_with_lr_0_does_not_crash() -> None:
    p = nn.Parameter(torch.tensor([math.inf, 1.0]))
    p.grad = torch.ones(2)
    LARS(torch.optim.SGD([p], lr=0.0, weight_decay=0.1), clip="lr").step()
    assert not torch.isfinite(p).all()


def test_options_that_need_an_lr_refuse_a_base_without_one() -> None:
    class Plain(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:
            pass

    LARS(Plain([parameter(2)])).step()
    for options in ({"clip": "lr"}, {"lr_placement": "inside"}):
        with pytest.raises(ValueError, match="an lr"):
            LARS(Plain([parameter(2)]), **options)


def test_an_added_differentiable_group_is_refused() -> None:
    lars = LARS(torch.optim.SGD([parameter(2)], lr=0.1))
    with pytest.raises(ValueError, match="differentiable"):
        lars.add_param_group({"params": [parameter(2)], "differentiable": True})
    assert len(lars.param_groups) == 1


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_compiled_step_records_layers(base: Any) -> None:
    torch._dynamo.reset()
    p = parameter(3, 3)
    lars = LARS(base([p], lr=0.1), record=True)
    step = torch.compile(lars.step, backend="eager")
    for size in (1.0, 5.0):
        p.grad = torch.full((3, 3), size, dtype=torch.float64)
        step()
        layers = lars.layers()
        assert layers is not None
        assert layers.values[1].tolist() == [3 * size]


@pytest.mark.parametrize(
    "options", [{"eps": "1"}, {"trust_coef": torch.tensor(0.1)}, {"clip": ("a", "b")}, {"clamp": []}]
)
def test_options_that_are_not_numbers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LARS(torch.optim.SGD([torch.ones(2)], lr=0.1), **options)


def test_a_state_dict_without_a_dict_of_options_is_refused() -> None:
    lars = LARS(torch.optim.SGD([torch.ones(2)], lr=0.1))
    with pytest.raises(ValueError, match="'lars' entry"):
        lars.load_state_dict({**lars.state_dict(), "lars": None})
