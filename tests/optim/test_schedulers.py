"""WarmupCosine, WarmupPoly and WarmupSteps against torch's schedulers and the trainer's function."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import no_warnings
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from lars_train import LARS, WarmupCosine, WarmupPoly, WarmupSteps, learning_rate, parameter_groups

pytestmark = no_warnings

WARMUP, TOTAL = 4, 20  # updates of the warm-up, and of the run

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "cosine": lambda o: WarmupCosine(o, WARMUP, TOTAL, end_factor=0.01, start_factor=0.25),
    "whole": lambda o: WarmupPoly(o, WARMUP, TOTAL, 2.0, "whole"),
    "restart": lambda o: WarmupPoly(o, WARMUP, TOTAL, 2.0, "restart", end_factor=0.1),
    "steps": lambda o: WarmupSteps(o, WARMUP, [6, 10, 15], 0.5),
}
every_scheduler = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)


def lars(*lrs: float | torch.Tensor) -> LARS:
    groups = [{"params": [Parameter(torch.full((3,), 2.0))], "lr": lr} for lr in lrs]
    return LARS(SGD(groups, lr=1.0, momentum=0.9))


def rates(optimizer: Optimizer, scheduler: Any, updates: int = TOTAL) -> list[list[float]]:
    """Return the lr of each group in each update, and after the last."""
    found = []
    for _ in range(updates):
        found.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return [*found, [float(group["lr"]) for group in optimizer.param_groups]]


def first(found: list[list[float]]) -> list[float]:
    return [values[0] for values in found]


def warmup_of_torch(optimizer: Optimizer, decay: lr_scheduler.LRScheduler) -> lr_scheduler.LRScheduler:
    linear = lr_scheduler.LinearLR(optimizer, start_factor=1e-9, total_iters=WARMUP)
    return lr_scheduler.SequentialLR(optimizer, [linear, decay], [WARMUP])


def test_a_cosine_equals_torchs_linear_and_cosine_in_sequence() -> None:
    one, other = lars(0.8), SGD([Parameter(torch.zeros(1))], lr=0.8)
    theirs = warmup_of_torch(other, lr_scheduler.CosineAnnealingLR(other, TOTAL - WARMUP, eta_min=0.008))
    expected = first(rates(other, theirs))
    got = first(rates(one, WarmupCosine(one, WARMUP, TOTAL, end_factor=0.01, start_factor=1e-9)))
    assert got == pytest.approx(expected, rel=1e-12)
    assert got[WARMUP] == 0.8
    assert got[TOTAL] == pytest.approx(0.008, rel=1e-15)


def test_restart_equals_torchs_linear_and_polynomial_in_sequence() -> None:
    one, other = lars(0.8), SGD([Parameter(torch.zeros(1))], lr=0.8)
    expected = first(rates(other, warmup_of_torch(other, lr_scheduler.PolynomialLR(other, TOTAL - WARMUP, power=2.0))))
    got = first(rates(one, WarmupPoly(one, WARMUP, TOTAL, 2.0, "restart", start_factor=1e-9)))
    assert got == pytest.approx(expected, rel=1e-12)


def test_whole_equals_torchs_polynomial_after_the_warm_up() -> None:
    one, other = lars(0.8), SGD([Parameter(torch.zeros(1))], lr=0.8)
    expected = first(rates(other, lr_scheduler.PolynomialLR(other, TOTAL, power=2.0)))
    got = first(rates(one, WarmupPoly(one, WARMUP, TOTAL, 2.0, "whole")))
    assert got[WARMUP:] == pytest.approx(expected[WARMUP:], rel=1e-12)
    assert got[:WARMUP] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_steps_equal_torchs_multi_step_after_the_warm_up() -> None:
    one, other = lars(0.8), SGD([Parameter(torch.zeros(1))], lr=0.8)
    expected = first(rates(other, lr_scheduler.MultiStepLR(other, [6, 10], gamma=0.5), 3 * TOTAL))
    got = first(rates(one, WarmupSteps(one, WARMUP, [6, 10], 0.5), 3 * TOTAL))
    assert got[WARMUP:] == pytest.approx(expected[WARMUP:], rel=1e-15)
    assert got[:WARMUP] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_rates_are_exactly_those_of_the_trainers_function() -> None:
    settings: dict[str, dict[str, Any]] = {
        "cosine": {"end": 0.01 * 0.7, "start": 0.25 * 0.7},
        "whole": {"power": 2.0},
        "restart": {"power": 2.0, "end": 0.1 * 0.7},
        "steps": {"steps": (6, 10, 15), "factor": 0.5},
    }
    for form, values in settings.items():
        optimizer = lars(0.7)
        got = first(rates(optimizer, SCHEDULERS[form](optimizer)))
        assert got[:TOTAL] == [
            learning_rate(u, total=TOTAL, warmup=WARMUP, base=0.7, form=form, **values) for u in range(TOTAL)
        ]


def test_mlperfs_rule_is_restart_over_one_more_update() -> None:
    optimizer = lars(0.5)
    got = first(rates(optimizer, WarmupPoly(optimizer, WARMUP, TOTAL + 1, 2.0, "restart")))
    assert got[:TOTAL] == [
        learning_rate(u, total=TOTAL, warmup=WARMUP, base=0.5, power=2.0, form="mlperf") for u in range(TOTAL)
    ]


@every_scheduler
def test_groups_keep_the_proportion_of_their_rates(make: Callable[[Optimizer], Any]) -> None:
    optimizer = lars(0.2, 0.0048)
    for weights, biases in rates(optimizer, make(optimizer), TOTAL + 3):
        assert biases == pytest.approx(weights * 0.024, rel=1e-12)


# The factor of the lr at update u, by hand, for `SCHEDULERS`.
FACTORS: dict[str, Callable[[int], float]] = {
    "cosine": lambda u: (
        0.25 + 0.75 * u / WARMUP
        if u < WARMUP
        else 0.01 + 0.99 * (1 + math.cos(math.pi * (u - WARMUP) / (TOTAL - WARMUP))) / 2
    ),
    "whole": lambda u: (u + 1) / WARMUP if u < WARMUP else (1 - u / TOTAL) ** 2,
    "restart": lambda u: (u + 1) / WARMUP if u < WARMUP else 0.1 + 0.9 * (1 - (u - WARMUP) / (TOTAL - WARMUP)) ** 2,
    "steps": lambda u: (u + 1) / WARMUP if u < WARMUP else 0.5 ** sum(u >= step for step in (6, 10, 15)),
}


@pytest.mark.parametrize("form", SCHEDULERS)
@pytest.mark.parametrize("factor", [0.024, 0.0])
def test_a_groups_lr_factor_is_kept_as_by_torchs_lambda(form: str, factor: float) -> None:
    def optimizer() -> LARS:
        groups = parameter_groups(torch.nn.Linear(3, 2), 1e-6, lr=1.6, norm_bias_lr_factor=factor)
        assert [group.get("exclude") for group in groups] == [None, True]
        return LARS(SGD(groups, momentum=0.9))

    ours, theirs = optimizer(), optimizer()
    found = rates(ours, SCHEDULERS[form](ours))
    expected = rates(theirs, lr_scheduler.LambdaLR(theirs, FACTORS[form]))
    for (weights, biases), (their_weights, their_biases) in zip(found, expected, strict=True):
        assert weights == pytest.approx(their_weights, rel=1e-12, abs=1e-15)
        assert biases == pytest.approx(their_biases, rel=1e-12, abs=1e-15)
        assert biases == pytest.approx(factor * weights, rel=1e-12)


@every_scheduler
def test_the_lr_stays_at_its_end_after_the_run(make: Callable[[Optimizer], Any]) -> None:
    optimizer = lars(0.2)
    found = first(rates(optimizer, make(optimizer), TOTAL + 3))
    assert len(set(found[TOTAL:])) == 1
    assert found[TOTAL] <= found[TOTAL - 1]


@every_scheduler
@pytest.mark.parametrize("where", ["LARS", "base"])
def test_a_resumed_schedule_continues_with_equal_weights(make: Callable[[Optimizer], Any], where: str) -> None:
    def build() -> tuple[LARS, Any]:
        optimizer = lars(0.7, 0.1)
        return optimizer, make(optimizer if where == "LARS" else optimizer.base_optimizer)

    def train(optimizer: LARS, scheduler: Any, updates: range) -> None:
        for update in updates:
            for group in optimizer.param_groups:
                group["params"][0].grad = torch.tensor([1.0, update, -2.0])
            optimizer.step()
            scheduler.step()

    whole, broken, resumed = build(), build(), build()
    train(*whole, range(TOTAL))
    train(*broken, range(7))
    file = io.BytesIO()
    weights = [group["params"][0].detach() for group in broken[0].param_groups]
    torch.save([weights, broken[0].state_dict(), broken[1].state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for group, weight in zip(resumed[0].param_groups, saved[0], strict=True):
        group["params"][0].data.copy_(weight)
    resumed[0].load_state_dict(saved[1])
    resumed[1].load_state_dict(saved[2])
    train(*resumed, range(7, TOTAL))
    for one, other in zip(whole[0].param_groups, resumed[0].param_groups, strict=True):
        assert torch.equal(one["params"][0], other["params"][0])
        assert one["lr"] == other["lr"]
    assert whole[1].state_dict() == resumed[1].state_dict()


def test_last_epoch_resumes_as_in_torchs_schedulers() -> None:
    optimizer, again = lars(0.7), lars(0.7)
    expected = first(rates(optimizer, WarmupCosine(optimizer, WARMUP, TOTAL)))
    again.param_groups[0]["initial_lr"] = 0.7
    assert first(rates(again, WarmupCosine(again, WARMUP, TOTAL, last_epoch=6), TOTAL - 7)) == expected[7:]


@every_scheduler
def test_a_tensor_lr_changes_in_place_and_schedulers_pickle(make: Callable[[Optimizer], Any]) -> None:
    lr = torch.tensor(0.7, dtype=torch.float64)
    optimizer, plain = lars(lr), lars(0.7)
    expected = first(rates(plain, make(plain)))
    assert first(rates(optimizer, make(optimizer))) == pytest.approx(expected, rel=1e-12)
    assert optimizer.param_groups[0]["lr"] is lr
    scheduler = make(plain)
    assert pickle.loads(pickle.dumps(scheduler.state_dict())) == scheduler.state_dict()
    assert copy.deepcopy(scheduler).get_last_lr() == scheduler.get_last_lr()


def test_they_schedule_any_optimizer_of_torch() -> None:
    optimizer = AdamW([Parameter(torch.zeros(2))], lr=0.5)
    found = first(rates(optimizer, WarmupCosine(optimizer, 2, 10)))
    assert found[:3] == [0.25, 0.5, 0.5]
    assert found[10] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: WarmupCosine(o, 5, 5), "warmup=5"),
        (lambda o: WarmupCosine(o, -1, 5), "warmup=-1"),
        (lambda o: WarmupCosine(o, 0, 0), "0 updates"),
        (lambda o: WarmupCosine(o, 1, 5, end_factor=-0.1), "end_factor=-0.1"),
        (lambda o: WarmupCosine(o, 1, 5, start_factor=float("nan")), "start_factor=nan"),
        (lambda o: WarmupPoly(o, 1, 5, -2.0, "whole"), "power=-2.0"),
        (lambda o: WarmupPoly(o, 1, 5, 2.0, "cosine"), "form='cosine': choose 'whole' or 'restart'"),
        (lambda o: WarmupSteps(o, 5, [4, 9]), r"steps=\[4, 9\]: .* none before warmup=5"),
        (lambda o: WarmupSteps(o, 0, [4, 4]), r"steps=\[4, 4\]"),
        (lambda o: WarmupSteps(o, 0, [4], -1.0), "factor=-1.0"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(make: Callable[[Optimizer], Any], message: str) -> None:
    optimizer = lars(0.7)
    with pytest.raises(ValueError, match=message):
        make(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert "initial_lr" not in optimizer.param_groups[0]


@every_scheduler
def test_the_state_of_another_scheduler_is_refused(make: Callable[[Optimizer], Any]) -> None:
    scheduler = make(lars(0.7))
    before = scheduler.state_dict()
    others = [other(lars(0.7)) for other in SCHEDULERS.values()]
    for other in [*others, lr_scheduler.ExponentialLR(lars(0.7), 0.9)]:
        if type(other) is not type(scheduler):
            with pytest.raises(ValueError, match=f"the state dict is not of {type(scheduler).__name__}"):
                scheduler.load_state_dict(other.state_dict())
    assert scheduler.state_dict() == before


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (WarmupCosine, (2.5, 15), r"warmup=2.5: give a whole number of updates, e.g. round\(0.1 \* total\)"),
        (WarmupCosine, (0.1, 15), "warmup=0.1: give a whole number"),
        (WarmupPoly, (3, 15.5, 2.0, "whole"), "total=15.5: give a whole number"),
        (WarmupPoly, (3, "15", 2.0, "whole"), "total='15': give a whole number"),
        (WarmupSteps, (0.5, [4]), "warmup=0.5: give a whole number"),
        (WarmupSteps, (0, [4, 5.5]), r"steps\[1\]=5.5: give a whole number"),
        (WarmupSteps, (0, 8), r"steps=8: give a list of updates, e.g. \[8\]"),
    ],
)
def test_updates_that_are_not_whole_are_refused(kind: Any, arguments: tuple[Any, ...], message: str) -> None:
    optimizer = lars(0.7)
    with pytest.raises(ValueError, match=message):
        kind(optimizer, *arguments)
    assert optimizer.param_groups[0]["lr"] == 0.7
