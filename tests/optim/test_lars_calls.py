"""Hooks, the profiler, closures, zero_grad and errors work as with a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import (
    BASES,
    DECAY,
    ONE_GRADIENT,
    UPDATES,
    Base,
    Problem,
    assert_close,
    assert_moved,
    each_way,
    every_base,
    no_warnings,
    over,
    rescale_by_hand,
    run,
)
from torch import Tensor, optim
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lars_train import LARS

pytestmark = no_warnings


@every_base
def test_step_hooks_run_in_order_and_see_rescaled_gradients(base: Base) -> None:
    problem = Problem(base)
    params, plain = problem.parameters(), problem.parameters()
    lars, alone = base.lars(params), base.alone(plain)
    seen: list[str] = []
    at_base: list[Tensor] = []

    def record(what: str) -> Callable[..., None]:
        return lambda optimizer, *_: seen.append(f"{what} {type(optimizer).__name__}")

    def record_gradients(optimizer: Optimizer, *_: Any) -> None:
        at_base.extend(p.grad.clone() for p in params[:4] if p.grad is not None)

    lars.register_step_pre_hook(record("own pre"))
    lars.register_step_post_hook(record("own post"))
    lars.base_optimizer.register_step_pre_hook(record("own pre"))
    lars.base_optimizer.register_step_post_hook(record("own post"))
    if not base.calls_closure:
        lars.base_optimizer.register_step_pre_hook(record_gradients)
    global_hooks = [
        register_optimizer_step_pre_hook(record("global pre")),
        register_optimizer_step_post_hook(record("global post")),
    ]
    try:
        run(lars, params, problem, range(1))
    finally:
        for handle in global_hooks:
            handle.remove()
    before, after = ("global pre", "own pre"), ("own post", "global post")
    order = [(before, "LARS"), (before, base.name), (after, base.name), (after, "LARS")]
    assert seen == [f"{what} {name}" for both, name in order for what in both]
    run(alone, plain, problem, range(1), decays=[base.decay])
    assert_close(params, plain, base.tolerance)
    if not base.calls_closure:
        assert_close(at_base, [p.grad for p in plain[:4] if p.grad is not None], base.tolerance)


@every_base
def test_a_pre_hook_may_replace_the_closure(base: Base) -> None:
    problem = Problem(base)
    params = problem.parameters()
    lars = base.lars(params)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        return 2.5

    handle = lars.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, closure), {}))
    assert lars.step(lambda: 0.0) == 2.5
    assert calls[0] is True
    handle.remove()
    calls.clear()
    lars.step(lambda: 0.0)
    assert calls == []


@every_base
def test_state_dict_hooks_run_in_torchs_order_and_may_change_it(base: Base) -> None:
    params = Problem(base).parameters()
    lars = base.lars(params)
    seen: list[str] = []
    lars.register_state_dict_pre_hook(lambda o: seen.append(f"save {type(o).__name__}"))
    lars.register_state_dict_post_hook(lambda o, state: {**state, "mark": 1})
    lars.register_load_state_dict_pre_hook(lambda o, state: {**state, "lars": {"eps": 0.25}})
    lars.register_load_state_dict_post_hook(lambda o: seen.append(f"loaded {type(o).__name__}"))
    lars.base_optimizer.register_state_dict_post_hook(lambda o, state: seen.append(f"saved {type(o).__name__}"))
    state = lars.state_dict()
    assert state["mark"] == 1
    lars.load_state_dict(state)
    assert lars.eps == 0.25
    assert seen == ["save LARS", f"saved {base.name}", "loaded LARS"]


@every_base
def test_the_profiler_names_lars_for_step_and_zero_grad(base: Base) -> None:
    problem = Problem(base)
    params = problem.parameters()
    lars = base.lars(params)
    with torch.autograd.profiler.profile() as seen:
        run(lars, params, problem, range(1))
        lars.zero_grad()
    names = {event.name for event in seen.function_events}
    assert {"Optimizer.step#LARS.step", "Optimizer.zero_grad#LARS.zero_grad"} <= names
    # LARS itself makes SGD's update on the CPU.
    assert (f"Optimizer.step#{base.name}.step" in names) == (base.name != "SGD")


@each_way(BASES)
def test_zero_grad_zeroes_or_drops_the_gradients(base: Base, flag: dict[str, bool]) -> None:
    problem = Problem(base)
    params = problem.parameters()
    lars = base.lars(params, **flag)
    run(lars, params, problem, range(1))
    held = [p.grad for p in params[:4]]
    lars.zero_grad(set_to_none=False)
    for p, grad in zip(params[:4], held, strict=False):
        assert p.grad is grad
        assert grad is not None
        assert not grad.any()
    assert params[4].grad is None
    lars.zero_grad(set_to_none=True)
    assert [p.grad for p in params] == [None] * 5


@over(ONE_GRADIENT)
def test_a_closure_runs_once_with_gradients_before_the_ratios(base: Base) -> None:
    problem = Problem(base)
    params, plain = problem.parameters(), problem.parameters()
    lars, alone = base.lars(params), base.alone(plain)
    calls = []
    for update in range(UPDATES):

        def closure(update: int = update) -> Tensor:
            calls.append((update, torch.is_grad_enabled()))
            lars.zero_grad()
            loss = problem.loss(params, update)
            loss.backward()
            return loss

        expected = problem.loss(params, update).detach()
        with torch.no_grad():
            assert torch.equal(lars.step(closure), expected)
    assert calls == [(update, True) for update in range(UPDATES)]
    run(alone, plain, problem, decays=[base.decay])
    assert_close(params, plain, base.tolerance)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_gets_rescaled_gradients_from_every_closure_call(line_search: str | None) -> None:
    base = Base(optim.LBFGS, {"lr": 0.1, "max_iter": 3, "line_search_fn": line_search})
    problem = Problem(base)
    params, plain = problem.parameters(), problem.parameters()
    lars, alone = base.lars(params), base.alone(plain)
    for update in range(UPDATES):
        evaluations = {"lars": 0, "alone": 0}

        def closure(
            name: str,
            optimizer: Any,
            own_params: list[Parameter],
            update: int = update,
            evaluations: Any = evaluations,
        ) -> Tensor:
            evaluations[name] += 1
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = problem.loss(own_params, update)
            loss.backward()
            if name == "alone":
                rescale_by_hand(optimizer, [0.0])
            return loss

        lars.step(lambda closure=closure: closure("lars", lars, params))
        alone.step(lambda closure=closure: closure("alone", alone, plain))
        assert evaluations["lars"] == evaluations["alone"] > 1
    assert_close(params, plain, base.tolerance)
    assert_moved(params, problem)


def test_lbfgs_without_a_closure_is_a_type_error() -> None:
    lars = LARS(optim.LBFGS([Parameter(torch.ones(2))]))
    with pytest.raises(TypeError, match=r"LBFGS.*closure"):
        lars.step()


@every_base
@pytest.mark.parametrize("lr_placement", ["outside", "inside"])
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
def test_settings_and_gradients_are_restored_if_the_base_raises(base: Base, lr_placement: Any, tensor_lr: bool) -> None:
    problem = Problem(base)
    params = problem.parameters()
    lr: Any = torch.tensor(0.25, dtype=torch.float64) if tensor_lr else 0.25
    inner = base.build(params, lr=lr, **({"weight_decay": DECAY} if base.takes("weight_decay") else {}))
    if lr_placement == "inside" and not base.follows_the_gradient:
        with pytest.raises(ValueError, match="lr_placement='inside'"):
            LARS(inner, lr_placement=lr_placement)
        return
    lars = LARS(inner, lr_placement=lr_placement)
    during_step: list[Any] = []

    def broken(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        group = optimizer.param_groups[0]
        during_step.append((group.get("weight_decay", 0.0), float(group["lr"])))
        raise FloatingPointError("broken")

    inner.register_step_pre_hook(broken)
    with pytest.raises(FloatingPointError):
        run(lars, params, problem, range(1))
    assert during_step == [(0.0, 1.0 if lr_placement == "inside" else 0.25)]
    assert lars.param_groups[0].get("weight_decay", 0.0) == base.decay
    assert lars.param_groups[0]["lr"] is lr
    assert float(lr) == 0.25
    if not base.calls_closure:
        assert [p.grad is None for p in params] == [False] * 4 + [True]


def test_settings_are_restored_if_the_closure_of_lbfgs_raises() -> None:
    lars = LARS(optim.LBFGS([{"params": [Parameter(torch.ones(2))], "weight_decay": DECAY}], lr=0.25))

    def closure() -> float:
        assert lars.param_groups[0]["weight_decay"] == 0.0
        raise FloatingPointError("broken")

    with pytest.raises(FloatingPointError):
        lars.step(closure)
    assert lars.param_groups[0]["weight_decay"] == DECAY
