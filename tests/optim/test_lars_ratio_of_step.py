"""``ratio_of="step"`` against LAMB's and each base's own arithmetic, on the host's path and on that in bulk."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bases import BASES, DECAY, UPDATES, Base, Problem, assert_close, no_warnings, over, wide
from numpy.typing import NDArray
from torch import Tensor, nn

from lars_train.optim import rescale_step
from lars_train.optim.lars import LARS

pytestmark = no_warnings

Array = NDArray[np.float64]
RATES = (0.01, 0.3, 0.02, 0.0, 0.005)
BETAS, EPS = (0.9, 0.98), 1e-6
REFUSED = {"Adafactor", "ASGD", "LBFGS", "Rprop"}
PROPORTIONAL = [base for base in BASES if base.name not in REFUSED]


@pytest.fixture(params=["on the host", "in bulk"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in bulk":
        monkeypatch.setattr(rescale_step, "is_host_tensor", lambda tensor: False)
    return str(request.param)


def tensors() -> tuple[list[Array], list[list[Array]]]:
    """Return weights and gradients by update. One weight is zero, and one has no gradient but zeros at first."""
    draw = np.random.default_rng(3)
    shapes = [(4, 3), (5,), (3,), (2, 2, 2)]
    weights = [draw.normal(size=s) for s in shapes]
    weights[2][:] = 0
    gradients = [[draw.normal(size=s) for s in shapes] for _ in RATES]
    gradients[0][3][:] = 0
    return weights, gradients


def run(optimizer: Any, params: Sequence[Tensor], gradients: Sequence[Sequence[Array]]) -> list[Array]:
    for grads, rate in zip(gradients, RATES, strict=True):
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g, dtype=p.dtype)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return [wide(p) for p in params]


def norm(x: Array) -> float:
    return float(np.linalg.norm(x))


def lamb(weights: Sequence[Array], gradients: Sequence[Sequence[Array]], decay: float) -> list[Array]:
    """Return the weights after five updates of LAMB, Algorithm 2 of https://arxiv.org/abs/1904.00962."""
    values = [w.copy() for w in weights]
    first, second = [np.zeros_like(w) for w in values], [np.zeros_like(w) for w in values]
    for t, (grads, rate) in enumerate(zip(gradients, RATES, strict=True), start=1):
        for i, g in enumerate(grads):
            first[i] = BETAS[0] * first[i] + (1 - BETAS[0]) * g
            second[i] = BETAS[1] * second[i] + (1 - BETAS[1]) * g**2
            r = first[i] / (1 - BETAS[0] ** t) / (np.sqrt(second[i] / (1 - BETAS[1] ** t)) + EPS)
            update, x = r + decay * values[i], values[i]
            # The paper leaves open what to do if a norm is 0.
            ratio = norm(x) / norm(update) if norm(x) > 0 and norm(update) > 0 else 1.0
            values[i] = x - rate * ratio * update
    return values


def over_adamw(params: Any, decay: float = DECAY, **options: Any) -> LARS:
    base = torch.optim.AdamW(params, lr=1e-3, betas=BETAS, eps=EPS, weight_decay=decay)
    return LARS.preset("lamb", base, **options)


def assert_equal(got: Sequence[Array], expected: Sequence[Array], tolerance: float = 1e-13) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def parameters(weights: Sequence[Array]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(w)) for w in weights]


@pytest.mark.parametrize("decay", [DECAY, 0.0])
def test_lamb_is_the_algorithm_of_its_paper(decay: float) -> None:
    weights, gradients = tensors()
    params = parameters(weights)
    assert_equal(run(over_adamw(params, decay), params, gradients), lamb(weights, gradients, decay))


@pytest.mark.parametrize("trust_clip", [False, True])
@pytest.mark.parametrize("always_adapt", [False, True])
@pytest.mark.parametrize("decay", [DECAY, 0.0])
def test_lamb_equals_timm(trust_clip: bool, always_adapt: bool, decay: float) -> None:
    lamb_of_timm = pytest.importorskip("timm.optim.lamb").Lamb
    weights, gradients = tensors()
    theirs, params = parameters(weights), parameters(weights)
    expected = run(
        lamb_of_timm(
            theirs,
            betas=BETAS,
            eps=EPS,
            weight_decay=decay,
            max_grad_norm=None,
            trust_clip=trust_clip,
            always_adapt=always_adapt,
        ),
        theirs,
        gradients,
    )
    options: dict[str, Any] = {"clip": (0.0, 1.0)} if trust_clip else {}
    options |= {} if always_adapt else {"zero_decay": "skip"}
    assert_equal(run(over_adamw(params, decay, **options), params, gradients), expected)


@over(PROPORTIONAL)
def test_each_base_takes_its_step_at_the_ratio(base: Base) -> None:
    # The step of the base is that of a copy with its own lr, divided by that lr.
    problem, lr = Problem(base), base.keywords["lr"]
    params = problem.parameters()
    changes = {"weight_decay": DECAY} | ({"maximize": True} if base.takes("maximize") else {})
    lars = LARS(base.build(params, **changes), eps=1e-3, trust_coef=0.05, ratio_of="step")
    for update in range(UPDATES):
        for p in params:
            p.grad = None
        problem.loss(params, update).backward()
        alone, copies = copy.deepcopy((lars.base_optimizer, params))
        for p, c in zip(params, copies, strict=True):
            c.grad = p.grad
        alone.step()
        expected = []
        for p, c in zip(params, copies, strict=True):
            step = (wide(c) - wide(p)) / lr
            both = norm(wide(p)) > 0 and norm(step) > 0
            ratio = 0.05 * norm(wide(p)) / (norm(step) + 1e-3) if both else 1.0
            expected.append(torch.from_numpy(wide(p) + 0.3 * lr * ratio * step))
        lars.param_groups[0]["lr"] = 0.3 * lr
        lars.step()
        assert lars.param_groups[0]["lr"] == 0.3 * lr
        lars.param_groups[0]["lr"] = lr
        assert_close(params, expected, 1e-11)


def test_excluded_groups_take_the_step_of_the_base() -> None:
    weights, gradients = tensors()
    params, plain = parameters(weights), parameters(weights)
    groups: list[dict[str, Any]] = [
        {"params": params[:2]},
        {"params": params[2:], "weight_decay": 0.3, "exclude": True},
    ]
    got = run(over_adamw(groups), params, gradients)
    expected = run(
        torch.optim.AdamW(plain[2:], betas=BETAS, eps=EPS, weight_decay=0.3), plain[2:], [g[2:] for g in gradients]
    )
    assert_equal(got[2:], expected)
    assert_equal(got[:2], lamb(weights, gradients, DECAY)[:2])


def test_an_lr_of_zero_moves_nothing_but_the_state() -> None:
    weights, gradients = tensors()
    params = parameters(weights)
    lars = over_adamw(params)
    lars.param_groups[0]["lr"] = 0.0
    for p, g in zip(params, gradients[1], strict=True):
        p.grad = torch.tensor(g)
    lars.step()
    assert_equal([wide(p) for p in params], weights, 0.0)
    assert all(lars.state[p]["exp_avg"].any() for p in params)


def test_gradients_are_unchanged_and_layers_has_the_step() -> None:
    weights, gradients = tensors()
    params = parameters(weights)
    lars = over_adamw(params, record=True)
    for p, g in zip(params, gradients[1], strict=True):
        p.grad = torch.tensor(g)
    lars.step()
    for p, g in zip(params, gradients[1], strict=True):
        assert p.grad is not None
        assert_equal([p.grad.numpy()], [g], 0.0)
    layers = lars.layers()
    assert layers is not None
    for i, (w, g) in enumerate(zip(weights, gradients[1], strict=True)):
        step = norm(g / (np.abs(g) + EPS) + DECAY * w)
        ratio = norm(w) / step if norm(w) > 0 else 1.0
        np.testing.assert_allclose(layers.values[:, i].numpy(), [norm(w), step, ratio], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_weights_are_exact_to_their_precision(dtype: torch.dtype) -> None:
    weights, gradients = tensors()
    params = [nn.Parameter(torch.tensor(w).to(dtype)) for w in weights]
    rounded = [wide(p) for p in params]
    grads = [[wide(torch.tensor(g).to(dtype)) for g in each] for each in gradients]
    got = run(over_adamw(params), params, grads)
    assert_equal(got, lamb(rounded, grads, DECAY), 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_the_lr_may_be_a_tensor_and_is_restored_on_errors(tensor_lr: bool) -> None:
    weights, gradients = tensors()
    params = parameters(weights)
    lr: Any = torch.tensor(0.25) if tensor_lr else 0.25
    base = torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=DECAY, foreach=False)
    lars = LARS(base, trust_coef=1.0, eps=0.0, ratio_of="step")
    for p, g in zip(params, gradients[1], strict=True):
        p.grad = torch.tensor(g)
    lars.step()
    expected = []
    for w, g in zip(weights, gradients[1], strict=True):
        step = g + DECAY * w
        expected.append(w - 0.25 * (norm(w) / norm(step) if norm(w) > 0 else 1.0) * step)
    assert_equal([wide(p) for p in params], expected)
    params[0].grad = torch.ones_like(params[0]).fill_(1.0)
    base.state[params[0]]["momentum_buffer"] = torch.zeros(7, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        lars.step()
    assert lars.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_bases_that_are_not_proportional_to_the_lr_are_refused(name: str) -> None:
    base = getattr(torch.optim, name)([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=rf"ratio_of='step' needs a base .*{name}"):
        LARS(base, ratio_of="step")
    lars = LARS(base)
    stored = {**lars.state_dict(), "lars": {"ratio_of": "step"}}
    with pytest.raises(ValueError, match=rf"ratio_of='step' needs a base .*{name}"):
        lars.load_state_dict(stored)


@pytest.mark.parametrize(
    "option",
    [
        {"denominator": "combined"},
        {"zero_norm": "skip"},
        {"weight_decay": "base"},
        {"ratio_placement": "outside"},
        {"lr_placement": "inside"},
        {"clamp": 1.0},
    ],
    ids=str,
)
def test_options_of_the_gradient_are_refused(option: dict[str, Any]) -> None:
    base = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=rf"ratio_of='step' conflicts with {next(iter(option))}="):
        LARS(base, ratio_of="step", **option)
