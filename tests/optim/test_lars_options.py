"""Every option of LARS against its formula in float64, on each code path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from lars_train.optim import fused_sgd, rescale
from lars_train.optim.lars import LARS

Array = NDArray[np.float64]
RATES = (0.5, 2.0, 29.0, 1.5, 0.25)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"eps": 0.3, "trust_coef": 0.05},
    {"denominator": "combined"},
    {"clip": "lr", "trust_coef": 0.5},
    {"clip": (0.0005, 0.0015)},
    {"zero_norm": "skip"},
    {"zero_norm": "skip", "clip": "lr", "trust_coef": 0.5},
    {"zero_decay": "skip"},
    {"ratio_placement": "outside"},
    {"ratio_placement": "outside", "clip": (0.0, 0.0015), "clamp": 0.7},
    {"lr_placement": "inside"},
    {"lr_placement": "inside", "denominator": "combined", "eps": 0.0},
    {"clamp": 0.5},
]


@pytest.fixture(params=["one pass", "torch's kernels", "on the host", "in bulk"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch's kernels":
        monkeypatch.setattr(fused_sgd, "kernels", None)
    elif request.param != "one pass":
        monkeypatch.setattr(fused_sgd, "applies_to", lambda base, rule: False)
    if request.param == "in bulk":
        monkeypatch.setattr(rescale, "is_host_tensor", lambda tensor: False)
    return str(request.param)


def tensors(seed: int) -> tuple[list[Array], list[list[Array]]]:
    """Return four weights and their gradients in five updates; one weight is zero, one has some zero gradients."""
    draw = np.random.default_rng(seed)
    shapes = [(4, 3), (5,), (3,), (2, 2, 2)]
    weights = [draw.normal(size=s) for s in shapes]
    weights[2][:] = 0
    gradients = [[draw.normal(size=s) for s in shapes] for _ in RATES]
    for grads in gradients[1::2]:
        grads[3][:] = 0
    return weights, gradients


def ratio_of(w: Array, g: Array, wd: float, lr: float, o: dict[str, Any]) -> tuple[float, float]:
    """Return ratio and weight decay of one tensor, by the formula in the docstring of LARS."""
    combined = o.get("denominator") == "combined"
    weight_norm = float(np.linalg.norm(w))
    grad_norm = float(np.linalg.norm(g + wd * w if combined else g))
    if not (weight_norm > 0 and grad_norm > 0):
        if o.get("zero_norm") == "skip":
            return 1.0, 0.0
        ratio = 1.0
    else:
        below = grad_norm if combined else grad_norm + wd * weight_norm
        ratio = o.get("trust_coef", 0.001) * weight_norm / (below + o.get("eps", 1e-8))
    if o.get("clip") == "lr":
        ratio = min(ratio / lr, 1.0)
    elif "clip" in o:
        low, high = o["clip"]
        ratio = min(max(ratio, low), high)
    return ratio, wd


def expected(
    weights: Sequence[Array],
    gradients: Sequence[Sequence[Array]],
    *,
    decays: Sequence[float],
    excluded: Sequence[bool] = (False,) * 4,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    **o: Any,
) -> list[Array]:
    """Return the weights after five updates of LARS over SGD with the options `o`."""
    result = [w.copy() for w in weights]
    buffers: list[Array | None] = [None] * len(result)
    for grads, rate in zip(gradients, RATES, strict=True):
        for i, g in enumerate(grads):
            w, wd, ratio = result[i], decays[i], 1.0
            if not excluded[i] and not (wd == 0 and o.get("zero_decay") == "skip"):
                ratio, wd = ratio_of(w, g, wd, rate, o)
            d = g + wd * w
            if "clamp" in o and not excluded[i]:
                d = np.clip(d, -o["clamp"], o["clamp"])
            inside = o.get("lr_placement") == "inside"
            outside = o.get("ratio_placement") == "outside"
            d = d * (1.0 if outside else ratio) * (rate if inside else 1.0)
            if momentum:
                before = buffers[i]
                buffers[i] = buffer = d if before is None else momentum * before + (1 - dampening) * d
                d = d + momentum * buffer if nesterov else buffer
            result[i] = w - (1.0 if inside else rate) * (ratio if outside else 1.0) * d
    return result


def run(optimizer: LARS, params: Sequence[Tensor], gradients: Sequence[Sequence[Array]], dtype: torch.dtype) -> None:
    for grads, rate in zip(gradients, RATES, strict=True):
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g, dtype=dtype)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


def assert_close(params: Sequence[Tensor], arrays: Sequence[Array], tolerance: float) -> None:
    for p, a in zip(params, arrays, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), a, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "sgd",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_five_updates_equal_the_options_formula(
    path: str, options: dict[str, Any], sgd: dict[str, Any], decay: float
) -> None:
    weights, gradients = tensors(1)
    params = [nn.Parameter(torch.tensor(w)) for w in weights]
    run(LARS(torch.optim.SGD(params, lr=1.0, weight_decay=decay, **sgd), **options), params, gradients, torch.float64)
    assert_close(params, expected(weights, gradients, decays=[decay] * 4, **sgd, **options), 1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_excluded_groups_get_no_ratio_and_groups_their_own_decay(path: str, options: dict[str, Any]) -> None:
    weights, gradients = tensors(2)
    params = [nn.Parameter(torch.tensor(w)) for w in weights]
    groups: list[dict[str, Any]] = [
        {"params": params[:1], "weight_decay": 0.1},
        {"params": params[1:2], "weight_decay": 0.3, "exclude": True},
        {"params": params[2:], "weight_decay": 0.0},
    ]
    run(LARS(torch.optim.SGD(groups, lr=1.0, momentum=0.9), **options), params, gradients, torch.float64)
    reference = expected(
        weights,
        gradients,
        decays=[0.1, 0.3, 0.0, 0.0],
        excluded=[False, True, False, False],
        momentum=0.9,
        **options,
    )
    assert_close(params, reference, 1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_maximizing_mirrors_minimizing(path: str, options: dict[str, Any]) -> None:
    weights, gradients = tensors(3)
    params = [nn.Parameter(torch.tensor(w)) for w in weights]
    base = torch.optim.SGD(params, lr=1.0, momentum=0.9, weight_decay=0.2, maximize=True)
    run(LARS(base, **options), params, [[-g for g in grads] for grads in gradients], torch.float64)
    assert_close(params, expected(weights, gradients, decays=[0.2] * 4, momentum=0.9, **options), 1e-12)


@pytest.mark.parametrize("options", [{"clip": "lr", "trust_coef": 0.5}, {"lr_placement": "inside"}], ids=str)
def test_the_lr_may_be_a_tensor(path: str, options: dict[str, Any]) -> None:
    weights, gradients = tensors(4)
    params = [nn.Parameter(torch.tensor(w)) for w in weights]
    lr = torch.tensor(1.0, dtype=torch.float64)
    lars = LARS(torch.optim.SGD(params, lr=lr, momentum=0.9, foreach=False), **options)
    for grads, rate in zip(gradients, RATES, strict=True):
        lr.fill_(rate)
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g)
        lars.step()
        assert lars.param_groups[0]["lr"] is lr
    assert_close(params, expected(weights, gradients, decays=[0.0] * 4, momentum=0.9, **options), 1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grad_layout", [torch.contiguous_format, torch.channels_last])
def test_large_tensors_in_any_layout_equal_the_formula(
    path: str, layout: torch.memory_format, grad_layout: torch.memory_format
) -> None:
    draw = np.random.default_rng(8)
    shape = (20, 40, 16, 17)  # more than one block of the cache, and no multiple of it
    weights, gradients = [draw.normal(size=shape)], [[draw.normal(size=shape)] for _ in RATES]
    p = nn.Parameter(torch.tensor(weights[0]).to(memory_format=layout))
    lars = LARS(torch.optim.SGD([p], lr=1.0, momentum=0.9, weight_decay=0.1), clamp=None if path == "one pass" else 1.0)
    for grads, rate in zip(gradients, RATES, strict=True):
        p.grad = torch.tensor(grads[0]).to(memory_format=grad_layout)
        lars.param_groups[0]["lr"] = rate
        lars.step()
    options = {} if path == "one pass" else {"clamp": 1.0}
    reference = expected(weights, gradients, decays=[0.1], excluded=[False], momentum=0.9, **options)
    assert_close([p], reference, 1e-12)


def test_an_lr_of_zero_moves_nothing(path: str) -> None:
    weights, gradients = tensors(5)
    for options in OPTIONS:
        params = [nn.Parameter(torch.tensor(w)) for w in weights]
        lars = LARS(torch.optim.SGD(params, lr=0.0, momentum=0.9, weight_decay=0.1), **options)
        for p, g in zip(params, gradients[0], strict=True):
            p.grad = torch.tensor(g)
        lars.step()
        assert_close(params, weights, 0.0)


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(1e-9, 1e9),
    weight=st.floats(1e-6, 1e6),
    trust=st.floats(1e-6, 1.0),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
def test_precision_does_not_depend_on_the_scale(
    scale: float, weight: float, trust: float, double: bool, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    dtype = torch.float64 if double else torch.float32
    w = torch.tensor(draw.normal(size=(7, 3)) * weight).to(dtype)
    gradients = [torch.tensor(draw.normal(size=(7, 3)) * scale).to(dtype) for _ in RATES]
    p = nn.Parameter(w.clone())
    lars = LARS(torch.optim.SGD([p], lr=1.0, momentum=0.9, weight_decay=1e-3), trust_coef=trust)
    run(lars, [p], [[g.numpy()] for g in gradients], dtype)
    reference = expected(
        [w.double().numpy()],
        [[g.double().numpy()] for g in gradients],
        decays=[1e-3],
        excluded=[False],
        momentum=0.9,
        trust_coef=trust,
    )
    # Compare the distance moved, up to the rounding of the weights.
    moved = np.abs(reference[0] - w.double().numpy()).max() + weight
    error = np.abs(p.detach().double().numpy() - reference[0]).max()
    assert error <= (1e-13 if double else 1e-5) * 100 * moved


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_gradient_that_is_not_finite_affects_only_its_tensor(path: str, bad: float) -> None:
    weights, gradients = tensors(6)
    params = [nn.Parameter(torch.tensor(w)) for w in weights]
    damaged = [[g.copy() for g in grads] for grads in gradients]
    damaged[1][0][0, 0] = bad
    run(LARS(torch.optim.SGD(params, lr=1.0, momentum=0.9, weight_decay=0.1)), params, damaged, torch.float64)
    with np.errstate(invalid="ignore"):
        reference = expected(weights, damaged, decays=[0.1] * 4, momentum=0.9)
    assert not np.isfinite(reference[0]).all()
    assert_close(params, reference, 1e-12)


@pytest.mark.parametrize("options", [{}, {"denominator": "combined"}, {"ratio_placement": "outside"}], ids=str)
def test_layers_returns_norms_and_ratios_of_the_last_step(path: str, options: dict[str, Any]) -> None:
    weights, gradients = tensors(7)
    params = [nn.Parameter(torch.tensor(w)) for w in weights]
    groups: list[dict[str, Any]] = [{"params": params[:3]}, {"params": params[3:], "exclude": True}]
    lars = LARS(torch.optim.SGD(groups, lr=2.0, weight_decay=0.1), record=True, **options)
    assert lars.layers() is None
    for p, g in zip(params, gradients[0], strict=True):
        p.grad = torch.tensor(g)
    lars.step()
    layers = lars.layers()
    assert layers is not None
    assert [id(p) for p in layers.parameters] == [id(p) for p in params[:3]]
    assert (layers.values.dtype, layers.values.shape) == (torch.float32, (3, 3))
    for i, (w, g) in enumerate(zip(weights[:3], gradients[0][:3], strict=True)):
        ratio, _ = ratio_of(w, g, 0.1, 2.0, options)
        grad_norm = np.linalg.norm(g + 0.1 * w if options.get("denominator") == "combined" else g)
        np.testing.assert_allclose(layers.values[:, i].numpy(), [np.linalg.norm(w), grad_norm, ratio], rtol=1e-6)
    lars.record = False
    lars.step()
    assert lars.layers() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"denominator": "both"}, "denominator"),
        ({"clip": 1.0}, "clip"),
        ({"clip": (2.0, 1.0)}, "clip"),
        ({"clip": "ratio"}, "clip"),
        ({"zero_norm": "one"}, "zero_norm"),
        ({"zero_decay": ""}, "zero_decay"),
        ({"weight_decay": "none"}, "weight_decay"),
        ({"clamp": 0.0}, "clamp"),
        ({"ratio_placement": "outside", "lr_placement": "inside"}, "lr_placement='inside'"),
        ({"weight_decay": "base", "lr_placement": "inside"}, "weight_decay='base'"),
        ({"ratio_of": "update"}, "ratio_of"),
    ],
)
def test_invalid_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARS(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0), **options)


def test_the_ratio_outside_is_refused_for_lbfgs() -> None:
    with pytest.raises(ValueError, match="LBFGS makes several"):
        LARS(torch.optim.LBFGS([nn.Parameter(torch.ones(2))]), ratio_placement="outside")
