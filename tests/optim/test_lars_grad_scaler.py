"""LARS with a GradScaler."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from bases import (
    ONE_GRADIENT,
    UPDATES,
    Base,
    Problem,
    assert_close,
    assert_moved,
    assert_same,
    no_warnings,
    rescale_by_hand,
)
from torch import nn

pytestmark = no_warnings


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
def test_grad_scaler_unscales_first_and_skips_infinities(base: Base, fused: bool, clipped: bool) -> None:
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
        rescale_by_hand(alone, [base.decay])
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
