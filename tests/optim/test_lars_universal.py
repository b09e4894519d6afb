"""LARS is an optimizer like any other: over every dense optimizer of torch.optim, with all that torch does to one.

The reference throughout is the base alone, without weight decay, on gradients that are rescaled by hand in
float64. The tests at the end start this file as the program of two processes.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lars_train import LARS

# No step of ours may warn, about a deprecation or anything else.
# (Whether an earlier test closed its files shows in whichever test is running when they are collected.)
pytestmark = pytest.mark.filterwarnings(
    "error", "default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"
)

UPDATES = 5
DECAY = 0.1
EPS = 1e-3
TRUST = 0.05
OPTIONS = {"eps": EPS, "trust_coef": TRUST}


@dataclass(frozen=True)
class Base:
    """A class of torch.optim and the keywords that it is tested with."""

    kind: Any
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.kind.__name__)

    def takes(self, *keywords: str) -> bool:
        return set(keywords) <= set(inspect.signature(self.kind).parameters)

    @property
    def decay(self) -> float:
        return DECAY if self.takes("weight_decay") else 0.0

    @property
    def tolerance(self) -> float:
        return 1e-6 if self.calls_closure else 1e-11

    @property
    def updates(self) -> range:
        # LBFGS divides by differences of gradients: rounding errors grow thousandfold with each update.
        return range(2 if self.calls_closure else UPDATES)

    @property
    def calls_closure(self) -> bool:
        return self.kind is optim.LBFGS

    def build(self, params: Any, **changes: Any) -> Optimizer:
        built: Optimizer = self.kind(params, **(self.keywords | changes))
        return built

    def lars(self, params: Any, **changes: Any) -> LARS:
        """LARS over this, with weight decay where it has one."""
        decay = {"weight_decay": DECAY} if self.takes("weight_decay") else {}
        return LARS(self.build(params, **(decay | changes)), **OPTIONS)

    def alone(self, params: Any, **changes: Any) -> Optimizer:
        """This alone, without weight decay."""
        decay = {"weight_decay": 0.0} if self.takes("weight_decay") else {}
        return self.build(params, **(changes | decay))


# torch before 2.9 has none.
MUON: Any = getattr(optim, "Muon", None)
BASES = [
    Base(optim.SGD, {"lr": 0.5, "momentum": 0.9}),
    Base(optim.Adam, {"lr": 0.05}),
    Base(optim.AdamW, {"lr": 0.05}),
    Base(optim.NAdam, {"lr": 0.05}),
    Base(optim.RAdam, {"lr": 0.05}),
    Base(optim.Adamax, {"lr": 0.05}),
    Base(optim.Adadelta, {"lr": 1.0}),
    Base(optim.Adagrad, {"lr": 0.05, "lr_decay": 0.1}),
    Base(optim.ASGD, {"lr": 0.5, "t0": 2}),
    Base(optim.RMSprop, {"lr": 0.05, "momentum": 0.9}),
    Base(optim.Rprop, {"lr": 0.05}),
    Base(optim.Adafactor, {"lr": 0.05}),
    Base(optim.LBFGS, {"lr": 0.1, "max_iter": 3}),
    *([Base(MUON, {"lr": 0.05})] if MUON else []),
]
# A closure that the base calls by itself has no place in a GradScaler or next to a second parameter group.
ONE_GRADIENT = [base for base in BASES if not base.calls_closure]


def over(bases: Iterable[Base]) -> Any:
    return pytest.mark.parametrize("base", bases, ids=lambda base: base.name)


every_base = over(BASES)
FLAGS: list[dict[str, bool]] = [{}, {"foreach": True}, {"fused": True}]


def each_way(bases: Iterable[Base]) -> Any:
    return pytest.mark.parametrize(
        ("base", "flag"),
        [
            pytest.param(base, flag, id="-".join((base.name, *flag)))
            for base in bases
            for flag in FLAGS
            if base.takes(*flag)
        ],
    )


class Problem:
    """A quadratic loss whose scale changes from update to update.

    The third weight starts at zero, the fourth has a zero gradient in every other update, the fifth has none.
    """

    def __init__(self, base: Base, dtypes: Sequence[torch.dtype] = (torch.float64,), seed: int = 0) -> None:
        matrices = base.kind is MUON
        shapes = [(4, 3), (5, 2), (3, 2), (2, 4), (6, 1)] if matrices else [(4, 3), (5,), (3,), (2, 2, 2), (6,)]
        draw = np.random.default_rng(seed)
        kinds = [dtypes[i % len(dtypes)] for i in range(len(shapes))]
        self.weights = [self._drawn(draw, shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
        self.targets = [self._drawn(draw, shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
        self.weights[2].zero_()

    @staticmethod
    def _drawn(draw: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = torch.from_numpy(draw.normal(size=shape))
        return (torch.complex(values, values.flip(0)) if dtype.is_complex else values).to(dtype)

    def parameters(self) -> list[Parameter]:
        return [Parameter(w.clone()) for w in self.weights]

    def loss(self, params: Sequence[Tensor], update: int) -> Tensor:
        terms = []
        for i, (p, target) in enumerate(zip(params[:4], self.targets, strict=False)):
            scale = 0.0 if i == 3 and update % 2 else (0.3 + 0.2 * i) * (1 + 0.3 * update)
            distance = torch.view_as_real(p - target) if p.is_complex() else p - target
            terms.append(scale * distance.square().sum().double())
        return torch.stack(terms).sum()


def wide(tensor: Tensor) -> Any:
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().to(dtype, copy=True).numpy()


def rescaled(weight: Any, grad: Any, decay: float, maximize: bool = False) -> Any:
    """The rule, as the LARS docstring states it."""
    weight_norm, grad_norm = np.linalg.norm(weight.ravel()), np.linalg.norm(grad.ravel())
    ratio = 1.0
    if weight_norm > 0 and grad_norm > 0:
        ratio = TRUST * weight_norm / (grad_norm + decay * weight_norm + EPS)
    return ratio * (grad - decay * weight if maximize else grad + decay * weight)


def by_hand(optimizer: Optimizer, decays: Sequence[float]) -> None:
    """Rescale the gradients of a base that stands alone; `decays` of its groups."""
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        for p in group["params"]:
            if p.grad is not None:
                p.grad.copy_(torch.from_numpy(rescaled(wide(p), wide(p.grad), decay, group.get("maximize", False))))


def run(
    optimizer: Any,
    params: Sequence[Tensor],
    problem: Problem,
    updates: Iterable[int] = range(UPDATES),
    decays: Sequence[float] | None = None,
    after: Callable[[], Any] = lambda: None,
) -> None:
    """Updates with the gradients of `problem`, which are rescaled by hand if `decays` are given."""
    inner = getattr(optimizer, "base_optimizer", optimizer)
    for update in updates:

        def closure(update: int = update) -> Tensor:
            for p in params:
                p.grad = None
            loss = problem.loss(params, update)
            loss.backward()
            if decays is not None:
                by_hand(optimizer, decays)
            return loss

        if isinstance(inner, optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        after()


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype is e.dtype
        np.testing.assert_allclose(wide(a), wide(e), rtol=tolerance, atol=tolerance)


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def assert_moved(params: Sequence[Tensor], problem: Problem) -> None:
    """Every weight with a gradient has changed, so that an agreement means something."""
    for p, start in zip(params[:4], problem.weights, strict=False):
        assert not torch.equal(p, start)


def assert_agrees(base: Base, problem: Problem, *, tolerance: float | None = None, **changes: Any) -> LARS:
    params, plain = problem.parameters(), problem.parameters()
    lars, alone = base.lars(params, **copy.deepcopy(changes)), base.alone(plain, **copy.deepcopy(changes))
    run(lars, params, problem, base.updates)
    decay = lars.param_groups[0].get("weight_decay", 0.0)
    run(alone, plain, problem, base.updates, decays=[decay])
    assert_close(params, plain, tolerance or base.tolerance)
    assert_moved(params, problem)
    return lars


def optimizers_of_torch() -> set[type]:
    found = {v for v in vars(optim).values() if isinstance(v, type) and issubclass(v, Optimizer)}
    return found - {Optimizer}


def test_the_list_of_bases_has_every_dense_optimizer_of_torch() -> None:
    assert {base.kind for base in BASES} == optimizers_of_torch() - {optim.SparseAdam}


# 1. Steps.

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
    # The other kernels take capturable on accelerators and within torch.compile, as at the end of this file.
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
def test_steps_equal_the_bases_own_on_gradients_rescaled_by_hand(base: Base, variant: str) -> None:
    lars = assert_agrees(base, Problem(base), **VARIANTS[variant])
    assert lars.param_groups[0].get("weight_decay", 0.0) == base.decay


# 2. PyTorch's own optimizer database.


def database() -> list[Any]:
    from torch.testing._internal import common_optimizers

    # Its import forbids, for the whole process, to set torch.backends' flags.
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return list(common_optimizers.optim_db)


def database_inputs(info: Any) -> list[Any]:
    from torch.testing._internal.common_optimizers import _get_optim_inputs_including_global_cliquey_kwargs

    inputs = _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float64, info, skip=("differentiable",))
    return list(inputs)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # At collection, for only then is the database there; two processes start this file without it.
    if "database_input" in metafunc.fixturenames:
        metafunc.parametrize(
            ("base", "database_input"),
            [
                pytest.param(Base(info.optim_cls), inputs.kwargs, id=f"{info.name}-{inputs.desc}")
                for info in database()
                if not info.only_supports_sparse_grads
                for inputs in database_inputs(info)
            ],
        )


def test_the_database_of_torch_has_every_base() -> None:
    assert {info.optim_cls for info in database()} == optimizers_of_torch()


def test_whatever_the_database_of_torch_holds_steps_as_by_hand_and_goes_on_after_loading(
    base: Base, database_input: dict[str, Any]
) -> None:
    # As every gradient has the length that its weight gives it, LBFGS with its 20 iterations circles the minimum, and
    # where it is by then is up to rounding errors.
    keywords = database_input | ({"max_iter": 4} if base.calls_closure else {})
    problem = Problem(base)
    decay = keywords.get("weight_decay", inspect.signature(base.kind).parameters.get("weight_decay"))
    decay = getattr(decay, "default", decay) or 0.0
    params, plain = problem.parameters(), problem.parameters()
    run(LARS(base.build(params, **copy.deepcopy(keywords)), **OPTIONS), params, problem, base.updates)
    run(base.alone(plain, **copy.deepcopy(keywords)), plain, problem, base.updates, decays=[decay])
    assert_close(params, plain, base.tolerance)
    assert_moved(params, problem)

    # torch casts a loaded state to its parameter's dtype: with float64 a plain base too goes on a little differently.
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


def test_what_takes_sparse_gradients_only_is_refused_at_the_first_of_them() -> None:
    layer = nn.Embedding(4, 2, sparse=True)
    before = layer.weight.detach().clone()
    lars = LARS(optim.SparseAdam(layer.parameters()))
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"\(4, 2\).*dense"):
        lars.step()
    assert torch.equal(layer.weight, before)


# 3. Schedulers.

SCHEDULERS: dict[type, Callable[[Any], Any]] = {
    lr_scheduler.LambdaLR: lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    lr_scheduler.MultiplicativeLR: lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    lr_scheduler.StepLR: lambda o: lr_scheduler.StepLR(o, 2),
    lr_scheduler.MultiStepLR: lambda o: lr_scheduler.MultiStepLR(o, [1, 4]),
    lr_scheduler.ConstantLR: lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    lr_scheduler.LinearLR: lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=4),
    lr_scheduler.ExponentialLR: lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    lr_scheduler.PolynomialLR: lambda o: lr_scheduler.PolynomialLR(o, 7, 2.0),
    lr_scheduler.CosineAnnealingLR: lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    lr_scheduler.CosineAnnealingWarmRestarts: lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    lr_scheduler.SequentialLR: lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    lr_scheduler.ChainedScheduler: lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    lr_scheduler.ReduceLROnPlateau: lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    lr_scheduler.CyclicLR: lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.2, step_size_up=3, cycle_momentum=bool({"momentum", "betas"} & set(o.defaults))
    ),
    lr_scheduler.OneCycleLR: lambda o: lr_scheduler.OneCycleLR(
        o, 0.2, total_steps=10, cycle_momentum=bool({"momentum", "betas"} & set(o.defaults))
    ),
    swa_utils.SWALR: lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=4),
}


def test_the_list_of_schedulers_has_every_one_of_torch() -> None:
    kinds = (v for module in (lr_scheduler, swa_utils) for v in vars(module).values() if isinstance(v, type))
    found = {kind for kind in kinds if issubclass(kind, lr_scheduler.LRScheduler)}
    assert set(SCHEDULERS) == found - {lr_scheduler.LRScheduler, lr_scheduler._LRScheduler}


def scheduled(base: Base, schedule: Callable[[Any], Any], where: str) -> tuple[list[Any], list[Parameter]]:
    """What a schedule sets in eight updates, and the weights after them; `where` it is built."""
    problem = Problem(base)
    params = problem.parameters()
    optimizer: Any = base.alone(params)
    if where == "on LARS":
        optimizer = LARS(optimizer, **OPTIONS)
    inner = getattr(optimizer, "base_optimizer", optimizer)
    scheduler = schedule(optimizer)
    if where == "on the base":
        optimizer = LARS(optimizer, **OPTIONS)
    seen = []

    def after() -> None:
        seen.append([(g["lr"], g.get("momentum"), g.get("betas")) for g in inner.param_groups])
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        assert scheduler.get_last_lr() == [g["lr"] for g in optimizer.param_groups]

    run(optimizer, params, problem, range(8), [0.0] if where == "on the base alone" else None, after)
    return seen, params


@every_base
@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_every_scheduler_sets_what_it_sets_on_a_plain_base_and_does_not_warn(base: Base, kind: type) -> None:
    expected, plain = scheduled(base, SCHEDULERS[kind], "on the base alone")
    assert len({str(values) for values in expected}) > 1
    for where in ("on the base", "on LARS"):
        seen, params = scheduled(base, SCHEDULERS[kind], where)
        assert seen == expected
        assert_close(params, plain, base.tolerance)


@every_base
def test_a_scheduler_changes_a_tensor_lr_in_place(base: Base) -> None:
    problem = Problem(base)
    params = problem.parameters()
    lr = torch.tensor(0.25, dtype=torch.float64)
    lars = base.lars(params, lr=lr)
    scheduler = lr_scheduler.ExponentialLR(lars, 0.5)
    run(lars, params, problem, range(2), after=scheduler.step)
    assert lars.base_optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == 0.0625


# 4. Hooks and the profiler.


@every_base
def test_hooks_of_both_and_global_ones_run_in_torchs_order_and_the_bases_see_rescaled_gradients(base: Base) -> None:
    problem = Problem(base)
    params, plain = problem.parameters(), problem.parameters()
    lars, alone = base.lars(params), base.alone(plain)
    seen: list[str] = []
    at_base: list[Tensor] = []

    def told(what: str) -> Callable[..., None]:
        return lambda optimizer, *_: seen.append(f"{what} {type(optimizer).__name__}")

    def look(optimizer: Optimizer, *_: Any) -> None:
        at_base.extend(p.grad.clone() for p in params[:4] if p.grad is not None)

    lars.register_step_pre_hook(told("own pre"))
    lars.register_step_post_hook(told("own post"))
    lars.base_optimizer.register_step_pre_hook(told("own pre"))
    lars.base_optimizer.register_step_post_hook(told("own post"))
    if not base.calls_closure:
        lars.base_optimizer.register_step_pre_hook(look)
    everywhere = [
        register_optimizer_step_pre_hook(told("global pre")),
        register_optimizer_step_post_hook(told("global post")),
    ]
    try:
        run(lars, params, problem, range(1))
    finally:
        for handle in everywhere:
            handle.remove()
    before, after = ("global pre", "own pre"), ("own post", "global post")
    order = [(before, "LARS"), (before, base.name), (after, base.name), (after, "LARS")]
    assert seen == [f"{what} {name}" for both, name in order for what in both]
    run(alone, plain, problem, range(1), decays=[base.decay])
    assert_close(params, plain, base.tolerance)
    if not base.calls_closure:
        assert_close(at_base, [p.grad for p in plain[:4] if p.grad is not None], base.tolerance)


@every_base
def test_a_pre_hook_may_give_the_step_another_closure(base: Base) -> None:
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
def test_state_dict_hooks_run_in_torchs_order_and_may_change_the_state_dict(base: Base) -> None:
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
def test_the_profiler_has_a_range_for_the_step_and_for_zero_grad_that_names_lars(base: Base) -> None:
    problem = Problem(base)
    params = problem.parameters()
    lars = base.lars(params)
    with torch.autograd.profiler.profile() as seen:
        run(lars, params, problem, range(1))
        lars.zero_grad()
    names = {event.name for event in seen.function_events}
    assert {"Optimizer.step#LARS.step", "Optimizer.zero_grad#LARS.zero_grad"} <= names
    # SGD's update on the CPU is made in LARS's own step.
    assert (f"Optimizer.step#{base.name}.step" in names) == (base.name != "SGD")


# 5. zero_grad.


@each_way(BASES)
def test_zero_grad_fills_with_zeros_or_drops_the_gradients(base: Base, flag: dict[str, bool]) -> None:
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


# 6. Closures.


@over(ONE_GRADIENT)
def test_a_closure_is_evaluated_once_under_grad_before_the_ratios(base: Base) -> None:
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
def test_each_evaluation_of_a_closure_by_lbfgs_is_rescaled(line_search: str | None) -> None:
    base = Base(optim.LBFGS, {"lr": 0.1, "max_iter": 3, "line_search_fn": line_search})
    problem = Problem(base)
    params, plain = problem.parameters(), problem.parameters()
    lars, alone = base.lars(params), base.alone(plain)
    for update in range(UPDATES):
        evaluations = {"lars": 0, "alone": 0}

        def closure(
            who: str, optimizer: Any, mine: list[Parameter], update: int = update, evaluations: Any = evaluations
        ) -> Tensor:
            evaluations[who] += 1
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = problem.loss(mine, update)
            loss.backward()
            if who == "alone":
                by_hand(optimizer, [0.0])
            return loss

        lars.step(lambda closure=closure: closure("lars", lars, params))
        alone.step(lambda closure=closure: closure("alone", alone, plain))
        assert evaluations["lars"] == evaluations["alone"] > 1
    assert_close(params, plain, base.tolerance)
    assert_moved(params, problem)


def test_lbfgs_without_a_closure_is_a_type_error_that_says_so() -> None:
    lars = LARS(optim.LBFGS([Parameter(torch.ones(2))]))
    with pytest.raises(TypeError, match=r"LBFGS.*closure"):
        lars.step()


# 7. GradScaler.


@pytest.mark.parametrize(
    ("base", "fused"),
    [
        pytest.param(base, fused, id=f"{base.name}{'-fused' if fused else ''}")
        for base in ONE_GRADIENT
        for fused in (False, True)
        if base.takes("fused") or not fused
    ],
)
@pytest.mark.parametrize("clipped", [False, True], ids=["scaled", "clipped"])
def test_under_a_grad_scaler_ratios_are_of_unscaled_gradients_and_infinite_ones_are_skipped(
    base: Base, fused: bool, clipped: bool
) -> None:
    problem = Problem(base, [torch.float32])
    params, plain = problem.parameters(), problem.parameters()
    flags = {"fused": True} if fused else {}
    lars, alone = base.lars(params, **flags), base.alone(plain, **flags)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for update in range(UPDATES):
        lars.zero_grad()
        scaler.scale(problem.loss(params, update)).backward()
        if clipped:
            scaler.unscale_(lars)
            nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(lars)
        scaler.update()

        alone.zero_grad()
        problem.loss(plain, update).backward()
        if clipped:
            nn.utils.clip_grad_norm_(plain, 0.5)
        by_hand(alone, [base.decay])
        alone.step()
    assert scaler.get_scale() == 2.0**12
    assert_close(params, plain, 2e-5)
    assert_moved(params, problem)

    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(lars.state_dict()["state"])
    for bad in (math.inf, math.nan):
        lars.zero_grad()
        scaler.scale(problem.loss(params, 0)).backward()
        assert params[0].grad is not None
        params[0].grad[1, 1] = bad
        if clipped:
            scaler.unscale_(lars)
            nn.utils.clip_grad_norm_(params, 0.5)
        assert scaler.step(lars) is None
        scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert_same(params, before)
    torch.testing.assert_close(lars.state_dict()["state"], state, rtol=0, atol=0)


# 8. add_param_group.


@over(ONE_GRADIENT)
def test_an_added_group_has_its_own_lr_and_decay_and_is_rescaled(base: Base) -> None:
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


# 9. Copies.


def saved_whole(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "save": saved_whole,
}


@over(ONE_GRADIENT)
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("with_schedule", [False, True], ids=["plain", "scheduled"])
def test_a_copy_goes_on_like_the_original_and_apart_from_it(base: Base, how: str, with_schedule: bool) -> None:
    problem = Problem(base)
    params = problem.parameters()
    lars = base.lars(params)
    if with_schedule:
        # It replaces the step of the instance by a closure, which cannot be pickled.
        lr_scheduler.ExponentialLR(lars, 0.9)
        lr_scheduler.ExponentialLR(lars.base_optimizer, 0.9)
    run(lars, params, problem, range(2))
    before = [p.detach().clone() for p in params]
    params2, lars2 = COPIES[how]((params, lars))
    run(lars2, params2, problem, range(2, UPDATES))
    assert_same(params, before)
    run(lars, params, problem, range(2, UPDATES))
    assert_same(params2, params)
    assert lars2.rule == lars.rule


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_lbfgs_which_torch_makes_unusable_is_so_over_lars_too(how: str) -> None:
    for wrap in (lambda base: base, LARS):
        optimizer = COPIES[how](wrap(optim.LBFGS([Parameter(torch.ones(2))])))
        with pytest.raises(AttributeError, match="_params"):
            optimizer.step(lambda: torch.tensor(1.0))


@every_base
def test_a_shallow_copy_shares_the_base(base: Base) -> None:
    lars = base.lars(Problem(base).parameters())
    twin = copy.copy(lars)
    assert twin.base_optimizer is lars.base_optimizer
    assert twin.param_groups is lars.param_groups
    twin.eps = 0.25
    assert (twin.eps, lars.eps) == (0.25, EPS)


# 10. State dicts.

UNUSUAL = {
    "eps": 0.5,
    "trust_coef": 0.25,
    "denominator": "combined",
    "clip": (0.0, 50.0),
    "zero_norm": "skip",
    "zero_decay": "skip",
    "clamp": 5.0,
}


@every_base
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_saved_state_dict_brings_settings_and_state_into_a_fresh_lars(base: Base, weights_only: bool) -> None:
    problem = Problem(base, [torch.float32])
    params = problem.parameters()
    lars = LARS(base.build(params), **UNUSUAL)
    run(lars, params, problem, range(2))
    file = io.BytesIO()
    torch.save(lars.state_dict(), file)
    file.seek(0)
    params2 = [Parameter(p.detach().clone()) for p in params]
    lars2 = LARS(base.build(params2, lr=0.125))
    lars2.load_state_dict(torch.load(file, weights_only=weights_only))
    assert {key: getattr(lars2.rule, key) for key in UNUSUAL} == UNUSUAL
    assert lars2.param_groups[0]["lr"] == base.keywords["lr"]
    run(lars, params, problem, range(2, UPDATES))
    run(lars2, params2, problem, range(2, UPDATES))
    assert_same(params2, params)


@over(ONE_GRADIENT)
def test_the_bases_own_state_dict_loads_and_settings_and_exclude_stay(base: Base) -> None:
    problem = Problem(base)
    params, plain = problem.parameters(), problem.parameters()
    decay = {"weight_decay": DECAY} if base.takes("weight_decay") else {}
    alone = base.build([{"params": plain[:1]}, {"params": plain[1:]}], **decay)
    run(alone, plain, problem, range(2))

    groups = [{"params": params[:1]}, {"params": params[1:], "exclude": True}]
    lars = base.lars(groups, lr=0.125)
    for p, q in zip(params, plain, strict=True):
        p.data.copy_(q)
    lars.load_state_dict(copy.deepcopy(alone.state_dict()))
    assert (lars.eps, lars.trust_coef) == (EPS, TRUST)
    assert [g.get("exclude") for g in lars.param_groups] == [None, True]
    assert [g["lr"] for g in lars.param_groups] == [base.keywords["lr"]] * 2

    # Excluded parameters are the base's own, weight decay included. Loading casts some states, here as there.
    alone.load_state_dict(copy.deepcopy(alone.state_dict()))
    alone.param_groups[0] |= {"weight_decay": 0.0} if decay else {}
    run(lars, params, problem, range(2, UPDATES))
    for update in range(2, UPDATES):
        alone.zero_grad()
        problem.loss(plain, update).backward()
        assert plain[0].grad is not None
        plain[0].grad.copy_(torch.from_numpy(rescaled(wide(plain[0]), wide(plain[0].grad), base.decay)))
        alone.step()
    assert_close(params, plain, base.tolerance)


@every_base
def test_a_state_dict_of_lars_loads_into_the_base_alone(base: Base) -> None:
    problem = Problem(base, [torch.float32])
    params, plain = problem.parameters(), problem.parameters()
    lars = base.lars(params)
    run(lars, params, problem, range(2))
    alone = base.build(plain, lr=0.125)
    alone.load_state_dict(copy.deepcopy(lars.state_dict()))
    assert alone.state_dict()["param_groups"] == lars.base_optimizer.state_dict()["param_groups"]
    torch.testing.assert_close(alone.state_dict()["state"], lars.base_optimizer.state_dict()["state"], rtol=0, atol=0)


# 11. torch.distributed.checkpoint.


class Matrices(nn.Module):
    """Two weights, 2-D so that every base takes them."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        draw = np.random.default_rng(1)
        self.first = Parameter(torch.from_numpy(draw.normal(size=(4, 3))).to(dtype))
        self.second = Parameter(torch.from_numpy(draw.normal(size=(2, 4))).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first.T).tanh() @ self.second.T


def train(model: nn.Module, optimizer: Optimizer, updates: Iterable[int]) -> None:
    for update in updates:
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 15).view(5, 3) * (1 + update)).square().sum().backward()
        optimizer.step()


@over(ONE_GRADIENT)
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoints_optimizer_state_dict_is_had_and_set(base: Base, flatten: bool) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, other = Matrices(torch.float32), Matrices(torch.float32)
    lars = base.lars([{"params": [model.first]}, {"params": [model.second], "exclude": True}])
    train(model, lars, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, lars, options=options))

    other.load_state_dict(model.state_dict())
    loaded = base.lars([{"params": [other.first]}, {"params": [other.second], "exclude": True}], lr=0.125)
    set_optimizer_state_dict(other, loaded, saved, options=options)
    # torch fills an empty state by a step with zero gradients and lr 0; that must not move a weight.
    assert_same(list(other.parameters()), list(model.parameters()))
    assert [g["lr"] for g in loaded.param_groups] == [base.keywords["lr"]] * 2
    train(model, lars, range(2, UPDATES))
    train(other, loaded, range(2, UPDATES))
    assert_same(list(other.parameters()), list(model.parameters()))


def test_distributed_checkpoint_refuses_a_fresh_lbfgs_alone_as_it_does_over_lars() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for wrap in (lambda base: base, LARS):
        model = Matrices()
        with pytest.raises(TypeError):
            get_optimizer_state_dict(model, wrap(optim.LBFGS(model.parameters())))


# 12. A schedule after loading.


@every_base
@pytest.mark.parametrize("where", ["LARS", "base"])
def test_a_schedule_still_acts_after_loading(base: Base, where: str) -> None:
    # https://github.com/NVIDIA/apex/issues/766
    problem = Problem(base)
    params, plain = problem.parameters(), problem.parameters()
    lars, alone = base.lars(params), base.alone(plain)
    scheduler = lr_scheduler.ExponentialLR(lars if where == "LARS" else lars.base_optimizer, 0.5)
    reference = lr_scheduler.ExponentialLR(alone, 0.5)

    def after() -> None:
        lars.load_state_dict(copy.deepcopy(lars.state_dict()))
        scheduler.step()

    run(lars, params, problem, after=after)

    def after_reference() -> None:
        # Loading casts some states to the dtype of their parameter.
        alone.load_state_dict(copy.deepcopy(alone.state_dict()))
        reference.step()

    run(alone, plain, problem, decays=[base.decay], after=after_reference)
    assert lars.param_groups[0]["lr"] == lars.base_optimizer.param_groups[0]["lr"] == base.keywords["lr"] * 0.5**UPDATES
    assert_close(params, plain, base.tolerance)


# 13. Parameters of all kinds.

HALF = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
# Muon wants matrices; LBFGS flattens its gradients without a copy, which channels_last forbids.
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
def test_dtypes_alone_and_mixed_step_as_by_hand(
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
    # The usual 1e-8 is zero in float16, and a zero gradient divided by it NaN with a plain base too.
    single = 1e-3 if base.calls_closure else 2e-5
    eps = {"eps": 1e-3} if base.takes("eps") and base.kind is not optim.Adafactor else {}
    tolerance = max(HALF.get(dtype, base.tolerance if dtype is torch.float64 else single) for dtype in dtypes)
    assert_agrees(base, problem, tolerance=tolerance, **flag, **eps)


@each_way(BASES)
def test_empty_parameters_and_those_without_gradients_are_left_alone(base: Base, flag: dict[str, bool]) -> None:
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
def test_channels_last_weights_keep_their_layout_and_step_as_by_hand(
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
                by_hand(optimizer, decays)
            return torch.tensor(1.0)

        optimizer.step(closure)

    for grad in grads:
        step(lars, weight, grad, None)
        step(alone, plain, grad, [base.decay])
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert_close([weight], [plain], base.tolerance)


@every_base
def test_a_sparse_gradient_is_a_clear_error_before_anything_changes(base: Base) -> None:
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


# 14. A base that raises.


@every_base
@pytest.mark.parametrize("lr_placement", ["outside", "inside"])
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
def test_weight_decay_lr_and_gradients_are_back_when_the_base_raises(
    base: Base, lr_placement: Any, tensor_lr: bool
) -> None:
    problem = Problem(base)
    params = problem.parameters()
    lr: Any = torch.tensor(0.25, dtype=torch.float64) if tensor_lr else 0.25
    inner = base.build(params, lr=lr, **({"weight_decay": DECAY} if base.takes("weight_decay") else {}))
    lars = LARS(inner, lr_placement=lr_placement)
    within: list[Any] = []

    def broken(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        group = optimizer.param_groups[0]
        within.append((group.get("weight_decay", 0.0), float(group["lr"])))
        raise FloatingPointError("broken")

    inner.register_step_pre_hook(broken)
    with pytest.raises(FloatingPointError):
        run(lars, params, problem, range(1))
    assert within == [(0.0, 1.0 if lr_placement == "inside" else 0.25)]
    assert lars.param_groups[0].get("weight_decay", 0.0) == base.decay
    assert lars.param_groups[0]["lr"] is lr
    assert float(lr) == 0.25
    if not base.calls_closure:
        assert [p.grad is None for p in params] == [False] * 4 + [True]


def test_settings_are_back_when_the_closure_of_lbfgs_raises() -> None:
    lars = LARS(optim.LBFGS([Parameter(torch.ones(2))], lr=0.25), lr_placement="inside")

    def closure() -> float:
        assert lars.param_groups[0]["lr"] == 1.0
        raise FloatingPointError("broken")

    with pytest.raises(FloatingPointError):
        lars.step(closure)
    assert lars.param_groups[0]["lr"] == 0.25


# 15. Decoupled decay.


def adamw(weight: Any, grads: Iterable[Any], weight_decay: str) -> Any:
    """LARS over AdamW written out: decay within the ratio ("coupled"), or AdamW's own after it ("base")."""
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
def test_decoupled_decay_is_within_the_ratio_or_left_to_adamw(weight_decay: Any, flag: Any, kind: str) -> None:
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
def test_decay_left_to_the_base_is_the_bases_own_of_whatever_kind(base: Base) -> None:
    problem = Problem(base)
    params, plain = problem.parameters(), problem.parameters()
    lars = LARS(base.build(params, weight_decay=DECAY), **OPTIONS, weight_decay="base")
    run(lars, params, problem)
    run(base.build(plain, weight_decay=DECAY), plain, problem, decays=[0.0])
    assert_close(params, plain, base.tolerance)
    coupled = problem.parameters()
    run(base.lars(coupled), coupled, problem)
    assert any(not torch.allclose(p, q) for p, q in zip(params, coupled, strict=True))


# 16. DTensor and FSDP2: what two processes do, this file's program, and what they told.

ROWS = (5, 3, 1)
DECAYS = (DECAY, 0.0, 0.3)


def sharded_weights() -> tuple[list[Tensor], Any]:
    """Weights with 5, 3 and 1 rows, which two ranks share unevenly or not at all, and the gradient of update i."""
    draw = np.random.default_rng(4)
    weights = [torch.from_numpy(draw.normal(size=(rows, 4))) for rows in ROWS]
    grads = [[torch.from_numpy(draw.normal(size=(rows, 4))) for rows in ROWS] for _ in range(UPDATES)]
    return weights, grads


def groups_of(base: Base, params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """A group for each parameter, all with their own weight decay; LBFGS has but one."""
    if base.calls_closure:
        return [{"params": list(params)}]
    own = [{"weight_decay": decay} if base.takes("weight_decay") else {} for decay in DECAYS]
    return [{"params": [p], **decay} for p, decay in zip(params, own, strict=True)]


def stepped(optimizer: Any, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    def closure() -> Tensor:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        return torch.tensor(1.0)

    optimizer.step(closure)


def on_two_ranks(base: Base, mesh: Any, wrap: bool, options: dict[str, Any]) -> dict[str, Any]:
    """The weights after some updates of shards, and the collectives of each update; or the error."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    def shard(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    weights, grads = sharded_weights()
    params = [Parameter(shard(w)) for w in weights]
    optimizer: Any = base.build(groups_of(base, params))
    if wrap:
        optimizer = LARS(optimizer, **(OPTIONS | options))
    counts = []
    try:
        for update in range(UPDATES):
            shards = [shard(grad) for grad in grads[update]]
            with CommDebugMode() as seen:
                stepped(optimizer, params, shards)
            counts.append({str(k): v for k, v in seen.get_comm_counts().items()})
    except Exception as error:
        decays = [g.get("weight_decay", 0.0) for g in optimizer.param_groups]
        return {"error": type(error).__name__, "decays": decays}
    full: list[Any] = [p.full_tensor() for p in params]  # type: ignore[attr-defined]
    return {"weights": [w.detach().tolist() for w in full], "counts": counts}


def fsdp_on_two_ranks(base: Base, mesh: Any, rank: int) -> dict[str, Any]:
    """Training of a model whose parameters FSDP2 shards, each rank on its half of the batch."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    model = Matrices()
    fully_shard(model, mesh=mesh)
    lars = base.lars(model.parameters())
    counts = []
    for update in range(UPDATES):
        lars.zero_grad()
        model(fsdp_batch(update)[rank::2]).square().sum().backward()
        with CommDebugMode() as seen:
            lars.step()
        counts.append({str(k): v for k, v in seen.get_comm_counts().items()})
    full: list[Any] = [p.full_tensor() for p in model.parameters()]  # type: ignore[attr-defined]
    return {"weights": [w.detach().tolist() for w in full], "counts": counts}


def fsdp_batch(update: int) -> Tensor:
    return torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3) * (1 + update)


SHARDED_OPTIONS: dict[str, dict[str, Any]] = {"default": {}, "lr-inside": {"lr_placement": "inside"}}


def program(rank: int, folder: Path) -> None:
    """What each of the two processes does."""
    from torch.distributed.device_mesh import init_device_mesh

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), world_size=2, rank=rank)
    told: dict[str, Any] = {}
    try:
        mesh = init_device_mesh("cpu", (2,))
        for base in BASES:
            told[base.name] = {"alone": on_two_ranks(base, mesh, False, {})}
            for name, options in SHARDED_OPTIONS.items():
                told[base.name][name] = on_two_ranks(base, mesh, True, options)
            if "error" not in told[base.name]["alone"]:
                told[base.name]["fsdp"] = fsdp_on_two_ranks(base, mesh, rank)
    finally:
        dist.destroy_process_group()
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        ranks = []
        for rank in range(2):
            errors = stack.enter_context((folder / f"{rank}.txt").open("w"))
            command = [sys.executable, __file__, str(rank), str(folder)]
            ranks.append(subprocess.Popen(command, env=environment, stderr=errors))
            stack.callback(ranks[-1].wait)
            stack.callback(ranks[-1].kill)
        codes = [rank.wait(timeout=180) for rank in ranks]
    assert codes == [0, 0], "\n".join((folder / f"{rank}.txt").read_text()[-4000:] for rank in range(2))
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(2)]


ALL_REDUCE = "c10d.allreduce_"


@pytest.mark.slow
@pytest.mark.parametrize("options", SHARDED_OPTIONS)
@every_base
def test_shards_of_a_dtensor_step_like_the_whole_with_one_collective_for_all_norms(
    two_ranks: list[dict[str, Any]], base: Base, options: str
) -> None:
    alone, seen = two_ranks[0][base.name]["alone"], two_ranks[0][base.name][options]
    assert seen == two_ranks[1][base.name][options]
    if "error" in alone:
        # torch itself cannot step these shards: no worse with LARS, and no setting is lost.
        assert seen == alone
        return
    weights, grads = sharded_weights()
    plain = [Parameter(w) for w in weights]
    reference = base.alone(groups_of(base, plain))
    for group in reference.param_groups:
        group |= {"weight_decay": 0.0} if base.takes("weight_decay") else {}
        group["lr"] = 1.0 if options == "lr-inside" else group["lr"]
    for update in range(UPDATES):
        by_rule = [
            torch.from_numpy(rescaled(wide(p), wide(g), decay if base.takes("weight_decay") else 0.0))
            for p, g, decay in zip(plain, grads[update], DECAYS, strict=True)
        ]
        inside = base.keywords["lr"] if options == "lr-inside" else 1.0
        stepped(reference, plain, [inside * grad for grad in by_rule])
    assert_close([torch.tensor(w, dtype=torch.float64) for w in seen["weights"]], plain, base.tolerance)
    for with_lars, without in zip(seen["counts"], alone["counts"], strict=True):
        assert with_lars == without | {ALL_REDUCE: without.get(ALL_REDUCE, 0) + 1}


@pytest.mark.slow
def test_torch_can_step_shards_of_most_bases(two_ranks: list[dict[str, Any]]) -> None:
    stepped = {name for name, told in two_ranks[0].items() if "error" not in told["alone"]}
    assert {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "ASGD", "RMSprop"} <= stepped


@pytest.mark.slow
@every_base
def test_fsdp2_shards_train_like_one_process_with_one_collective_for_all_norms(
    two_ranks: list[dict[str, Any]], base: Base
) -> None:
    if "error" in two_ranks[0][base.name]["alone"]:
        pytest.skip(f"torch itself cannot step shards with {base.name}")
    seen = two_ranks[0][base.name]["fsdp"]
    assert seen["weights"] == two_ranks[1][base.name]["fsdp"]["weights"]
    model = Matrices()
    reference = base.alone(model.parameters())
    for update in range(UPDATES):
        reference.zero_grad()
        # FSDP2 averages the gradients of the ranks.
        (model(fsdp_batch(update)).square().sum() / 2).backward()
        by_hand(reference, [base.decay])
        reference.step()
    assert_close(
        [torch.tensor(w, dtype=torch.float64) for w in seen["weights"]], list(model.parameters()), base.tolerance
    )
    assert [count[ALL_REDUCE] for count in seen["counts"]] == [1] * UPDATES


# 17. torch.compile.


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


if __name__ == "__main__":
    program(int(sys.argv[1]), Path(sys.argv[2]))
