"""Every scheduler of torch acts on LARS as on a plain optimizer, also after loading a state dict."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import OPTIONS, UPDATES, Base, Problem, assert_close, every_base, no_warnings, run
from torch.nn import Parameter
from torch.optim import lr_scheduler, swa_utils

from lars_train import LARS

pytestmark = no_warnings


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


def test_schedulers_has_every_scheduler_of_torch() -> None:
    kinds = (v for module in (lr_scheduler, swa_utils) for v in vars(module).values() if isinstance(v, type))
    found = {kind for kind in kinds if issubclass(kind, lr_scheduler.LRScheduler)}
    assert set(SCHEDULERS) == found - {lr_scheduler.LRScheduler, lr_scheduler._LRScheduler}


def scheduled(base: Base, schedule: Callable[[Any], Any], where: str) -> tuple[list[Any], list[Parameter]]:
    """Return the settings of a scheduler built `where` in eight updates, and the weights after them."""
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
def test_every_scheduler_acts_as_on_the_plain_base(base: Base, kind: type) -> None:
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


@every_base
@pytest.mark.parametrize("where", ["LARS", "base"])
def test_a_scheduler_still_acts_after_loading(base: Base, where: str) -> None:
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
