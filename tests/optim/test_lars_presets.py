"""`LARS.preset` against the original packages, or against their published arithmetic if there is no package."""

from __future__ import annotations

import importlib.util
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lars_train.optim.lars import LARS
from lars_train.optim.options import PRESETS

Array = NDArray[np.float64]
RATES = (0.5, 2.0, 29.0, 1.5, 0.25)
DECAY, MOMENTUM = 0.05, 0.9
SHAPES = [(4, 3), (5,), (2, 3, 3, 3), (6,)]
VECTORS = [len(shape) == 1 for shape in SHAPES]


def tensors(zeros: bool) -> tuple[list[Array], list[list[Array]]]:
    """Return weights and their gradients in five updates; `zeros`: with a zero weight and a zero gradient."""
    draw = np.random.default_rng(11)
    weights = [draw.normal(size=s) for s in SHAPES]
    gradients = [[draw.normal(size=s) for s in SHAPES] for _ in RATES]
    if zeros:
        weights[3][:] = 0
        gradients[2][0][:] = 0
    return weights, gradients


def parameters(weights: Iterable[Array]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(w)) for w in weights]


def run(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], gradients: Sequence[Sequence[Array]]
) -> list[Array]:
    for grads, rate in zip(gradients, RATES, strict=True):
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return [p.detach().numpy() for p in params]


def groups_of(params: Sequence[nn.Parameter], excluded_decay: float | None) -> Any:
    """Return one group, or put the vectors into an excluded group with weight decay `excluded_decay`."""
    if excluded_decay is None:
        return params
    chosen = list(zip(params, VECTORS, strict=True))
    return [
        {"params": [p for p, vector in chosen if not vector]},
        {"params": [p for p, vector in chosen if vector], "weight_decay": excluded_decay, "exclude": True},
    ]


def ours(
    name: str,
    zeros: bool,
    *,
    excluded_decay: float | None = None,
    decay: float = DECAY,
    nesterov: bool = False,
    **options: Any,
) -> list[Array]:
    weights, gradients = tensors(zeros)
    params = parameters(weights)
    base = torch.optim.SGD(
        groups_of(params, excluded_decay), lr=1.0, momentum=MOMENTUM, weight_decay=decay, nesterov=nesterov
    )
    return run(LARS.preset(name, base, **options), params, gradients)


def theirs(make: Callable[..., torch.optim.Optimizer], zeros: bool, **keywords: Any) -> list[Array]:
    weights, gradients = tensors(zeros)
    params = parameters(weights)
    return run(make(params, lr=1.0, momentum=MOMENTUM, **keywords), params, gradients)


def assert_equal(got: Sequence[Array], expected: Sequence[Array], tolerance: float = 1e-12) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("their_options", "our_options"),
    [
        ({"weight_decay": DECAY}, {}),
        ({"weight_decay": DECAY, "trust_clip": True}, {"clip": "lr"}),
        ({"weight_decay": 0.0}, {"decay": 0.0}),
        ({"weight_decay": 0.0, "always_adapt": True}, {"decay": 0.0, "zero_decay": "adapt"}),
    ],
    ids=str,
)
def test_timm(zeros: bool, nesterov: bool, their_options: dict[str, Any], our_options: dict[str, Any]) -> None:
    lars = pytest.importorskip("timm.optim.lars").Lars
    expected = theirs(lars, zeros, nesterov=nesterov, trust_coeff=0.001, eps=1e-8, **their_options)
    assert_equal(ours("timm", zeros, nesterov=nesterov, **our_options), expected)


@pytest.mark.parametrize("decay", [DECAY, 0.0])
@pytest.mark.parametrize("zeros", [False, True])
def test_torch_optimizer(zeros: bool, decay: float) -> None:
    lars = pytest.importorskip("torch_optimizer").LARS
    assert_equal(ours("torch-optimizer", zeros, decay=decay), theirs(lars, zeros, weight_decay=decay))


def test_pytorch_optimizer() -> None:
    lars = pytest.importorskip("pytorch_optimizer").LARS
    expected = theirs(lars, False, weight_decay=DECAY, trust_coefficient=0.001, dampening=0.0, nesterov=False)
    assert_equal(ours("pytorch-optimizer", False, excluded_decay=0.0), expected)


@pytest.mark.parametrize("zeros", [False, True])
def test_open_lars(zeros: bool) -> None:
    lars = pytest.importorskip("open_lars").LARS
    assert_equal(ours("open-lars", zeros, excluded_decay=DECAY), theirs(lars, zeros, weight_decay=DECAY))


OPTAX = """
import pickle, sys
import jax, numpy, optax

def train(weights, gradients, rates, decay, momentum, nesterov):
    values, steps = [jax.numpy.asarray(w) for w in weights], jax.numpy.asarray(rates)
    rule = optax.lars(lambda count: steps[count], weight_decay=decay, momentum=momentum, nesterov=nesterov)
    state = rule.init(values)
    for grads in gradients:
        changes, state = rule.update([jax.numpy.asarray(g) for g in grads], state, values)
        values = optax.apply_updates(values, changes)
    return [numpy.asarray(v) for v in values]

with jax.enable_x64(True):
    pickle.dump([train(*case) for case in pickle.load(sys.stdin.buffer)], sys.stdout.buffer)
"""
OPTAX_CASES = list(itertools.product([False, True], repeat=2))
"""With and without zeros, with and without Nesterov's momentum."""


@pytest.fixture(scope="module")
def optax_values() -> dict[tuple[bool, bool], list[Array]]:
    """Return optax's weights by case."""
    if importlib.util.find_spec("optax") is None or importlib.util.find_spec("jax") is None:
        pytest.skip("optax is not installed")
    # In a separate process: with Hydra's logging, optax's logging closes the streams that pytest captures.
    given = pickle.dumps([(*tensors(zeros), RATES, DECAY, MOMENTUM, nesterov) for zeros, nesterov in OPTAX_CASES])
    done = subprocess.run([sys.executable, "-c", OPTAX], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return dict(zip(OPTAX_CASES, pickle.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("zeros", "nesterov"), OPTAX_CASES)
def test_optax(zeros: bool, nesterov: bool, optax_values: dict[tuple[bool, bool], list[Array]]) -> None:
    expected = optax_values[zeros, nesterov]
    assert {value.dtype for value in expected} == {np.dtype(np.float64)}
    assert_equal(ours("optax", zeros, nesterov=nesterov), expected)


def norm(x: Array) -> float:
    return float(np.linalg.norm(x))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_mlperf(zeros: bool, nesterov: bool) -> None:
    # lars_optimizer.py: mom = momentum * mom - grad * scaled_lr; var += mom. Skipped parameters are not decayed.
    values, gradients = tensors(zeros)
    buffers = [np.zeros_like(w) for w in values]
    for grads, rate in zip(gradients, RATES, strict=True):
        for i, g in enumerate(grads):
            w, scaled = values[i], rate
            if not VECTORS[i]:
                if norm(w) > 0 and norm(g) > 0:
                    scaled = rate * 0.001 * norm(w) / (norm(g) + DECAY * norm(w) + 1e-7)
                g = g + DECAY * w
            buffers[i] = MOMENTUM * buffers[i] - scaled * g
            values[i] = w + (MOMENTUM * buffers[i] - scaled * g if nesterov else buffers[i])
    assert_equal(ours("mlperf", zeros, excluded_decay=0.0, nesterov=nesterov), values)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("zeros", [False, True])
def test_larc(zeros: bool, clip: bool) -> None:
    # LARC.py: the gradient is decayed and scaled only if both norms are above 0; SGD steps without decay.
    weights, gradients = tensors(zeros)
    params = parameters(weights)
    sgd = torch.optim.SGD(params, lr=1.0, momentum=MOMENTUM)
    for grads, rate in zip(gradients, RATES, strict=True):
        for p, g in zip(params, grads, strict=True):
            w = p.detach().numpy()
            if norm(w) > 0 and norm(g) > 0:
                adaptive = 0.02 * norm(w) / (norm(g) + DECAY * norm(w) + 1e-8)
                if clip:
                    adaptive = min(adaptive / rate, 1)
                g = (g + DECAY * w) * adaptive
            p.grad = torch.tensor(g)
        sgd.param_groups[0]["lr"] = rate
        sgd.step()
    expected = [p.detach().numpy() for p in params]
    assert_equal(ours("larc", zeros, **({} if clip else {"clip": None})), expected)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-4])
def test_nus_hpc(zeros: bool, scale: float) -> None:
    # lars.py: the ratio, clamped to [0, 50], multiplies the lr; elements are clamped to [-10, 10].
    weights, gradients = tensors(zeros)
    gradients = [[g * scale for g in grads] for grads in gradients]
    values = [w.copy() for w in weights]
    buffers: list[Array | None] = [None] * len(values)
    for grads, rate in zip(gradients, RATES, strict=True):
        for i, g in enumerate(grads):
            w, ratio = values[i], 1.0
            if norm(w) > 0 and norm(g) > 0:
                ratio = 0.001 * norm(w) / (norm(g) + DECAY * norm(w) + 1e-5)
            ratio = min(max(ratio, 0.0), 50.0)
            d = np.clip(g + DECAY * w, -10, 10)
            before = buffers[i]
            buffers[i] = buffer = d if before is None else MOMENTUM * before + d
            values[i] = w - rate * ratio * buffer
    params = parameters(weights)
    base = torch.optim.SGD(params, lr=1.0, momentum=MOMENTUM, weight_decay=DECAY)
    assert_equal(run(LARS.preset("nus-hpc", base), params, gradients), values)


def by_hand(
    rule: Callable[[Array, Array, bool, float], Array], zeros: bool, nesterov: bool, *, lr_inside: bool = False
) -> list[Array]:
    """Return the weights after five updates of torch's SGD with the gradients that `rule` returns.

    Args:
        rule: maps weight, gradient, whether the weight is a vector, and lr to the new gradient.
        lr_inside: multiply the gradient by the lr, and step with an lr of 1.
    """
    values, gradients = tensors(zeros)
    buffers: list[Array | None] = [None] * len(values)
    for grads, rate in zip(gradients, RATES, strict=True):
        for i, g in enumerate(grads):
            d = rule(values[i], g, VECTORS[i], rate) * (rate if lr_inside else 1.0)
            before = buffers[i]
            buffers[i] = buffer = d if before is None else MOMENTUM * before + d
            values[i] = values[i] - (1.0 if lr_inside else rate) * (d + MOMENTUM * buffer if nesterov else buffer)
    return values


ssl = pytest.mark.parametrize(("zeros", "nesterov"), list(itertools.product([False, True], repeat=2)))


@ssl
@pytest.mark.parametrize("decay", [DECAY, 0.0])
def test_bolts(zeros: bool, nesterov: bool, decay: float) -> None:
    # lars.py: neither ratio nor decay if the decay or a norm is 0.
    def rule(w: Array, g: Array, vector: bool, rate: float) -> Array:
        if decay == 0 or norm(w) == 0 or norm(g) == 0:
            return g
        return (g + decay * w) * 0.001 * norm(w) / (norm(g) + decay * norm(w) + 1e-8)

    expected = by_hand(rule, zeros, nesterov)
    assert_equal(ours("bolts", zeros, nesterov=nesterov, decay=decay), expected)
    if importlib.util.find_spec("lightly") is not None:
        lars = pytest.importorskip("lightly.utils.lars").LARS
        assert_equal(theirs(lars, zeros, nesterov=nesterov, weight_decay=decay), expected)


@ssl
def test_moco_v3(zeros: bool, nesterov: bool) -> None:
    # optimizer.py: the norm of the decayed gradient, and no eps; vectors are neither decayed nor adapted.
    def rule(w: Array, g: Array, vector: bool, rate: float) -> Array:
        if vector:
            return g
        d = g + DECAY * w
        return d * (0.001 * norm(w) / norm(d) if norm(w) > 0 and norm(d) > 0 else 1.0)

    expected = by_hand(rule, zeros, nesterov)
    assert_equal(ours("moco-v3", zeros, excluded_decay=0.0, nesterov=nesterov), expected)


@ssl
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("exclude", [False, True])
def test_swav_and_solo_learn(zeros: bool, nesterov: bool, clip: bool, exclude: bool) -> None:
    # LARC.py and lars.py: neither ratio nor decay if a norm is 0. solo-learn can clip, and exclude vectors.
    def rule(w: Array, g: Array, vector: bool, rate: float) -> Array:
        if norm(w) == 0 or norm(g) == 0 or (vector and exclude):
            return g
        ratio = 0.001 * norm(w) / (norm(g) + DECAY * norm(w) + 1e-8)
        return (g + DECAY * w) * (min(ratio / rate, 1.0) if clip else ratio)

    options: dict[str, Any] = {"clip": "lr"} if clip else {}
    got = ours("swav", zeros, excluded_decay=0.0 if exclude else None, nesterov=nesterov, **options)
    assert_equal(got, by_hand(rule, zeros, nesterov))


@ssl
@pytest.mark.parametrize("excluded_decay", [None, 0.0, DECAY])
def test_mmpretrain(zeros: bool, nesterov: bool, excluded_decay: float | None) -> None:
    # lars.py: the lr is in the momentum. lars_exclude leaves out the ratio alone; decay_mult=0 leaves out the decay.
    def rule(w: Array, g: Array, vector: bool, rate: float) -> Array:
        if vector and excluded_decay is not None:
            return g + excluded_decay * w
        zero = norm(w) == 0 or norm(g) == 0
        return (g + DECAY * w) * (1.0 if zero else 0.001 * norm(w) / (norm(g) + DECAY * norm(w) + 1e-8))

    expected = by_hand(rule, zeros, nesterov, lr_inside=True)
    assert_equal(ours("mmpretrain", zeros, excluded_decay=excluded_decay, nesterov=nesterov), expected)


def test_torchlars_is_the_default() -> None:
    assert PRESETS["torchlars"] == {}
    params = parameters(tensors(False)[0])
    base = torch.optim.SGD(params, lr=0.1)
    assert LARS.preset("torchlars", base).rule == LARS(base, eps=1e-8, trust_coef=0.001).rule


def test_libraries_with_the_same_rule_have_its_preset() -> None:
    same = {"lightly": "bolts", "barlowtwins": "moco-v3", "vissl": "swav", "solo-learn": "swav"}
    assert {name: PRESETS[name] for name in same} == {name: PRESETS[other] for name, other in same.items()}


IN_THE_GRADIENT = ("mmpretrain", "mlperf", "optax", "open-lars")


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.LBFGS], ids=lambda b: b.__name__)
def test_the_lr_in_the_gradient_needs_a_step_that_follows_it(base: Any) -> None:
    assert set(IN_THE_GRADIENT) == {name for name in PRESETS if PRESETS[name].get("lr_placement") == "inside"}
    for name in IN_THE_GRADIENT:
        with pytest.raises(ValueError, match=f"the step of {base.__name__} is not, so it would ignore the lr"):
            LARS.preset(name, base(parameters(tensors(False)[0]), lr=1e-4))


def test_a_preset_takes_overrides_and_an_unknown_one_is_refused() -> None:
    base = torch.optim.SGD(parameters(tensors(False)[0]), lr=0.1)
    assert LARS.preset("larc", base, trust_coef=0.5).rule.trust_coef == 0.5
    assert LARS.preset("larc", base, trust_coef=0.5).rule.clip == "lr"
    with pytest.raises(ValueError, match="choose one of torchlars, mlperf, timm, larc, optax, nus-hpc"):
        LARS.preset("lion", base)
    swapped: Any = base
    with pytest.raises(TypeError, match=r"takes the name first: write LARS.preset\('bolts', base\)"):
        LARS.preset(swapped, "bolts")
