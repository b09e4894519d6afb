"""LARS against a plain float64 reference, and as the torch optimizer that it claims to be."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.profiler import profile

from lars_train.optim.lars import LARS

Array = NDArray[np.float64]
UPDATES = 5


def length(x: Array) -> float:
    return math.sqrt(math.fsum(float(v) * float(v) for v in x.ravel()))


def adapted(w: Array, g: Array, decay: float, eps: float, trust: float) -> Array:
    """The rule, as the LARS docstring states it."""
    ratio = 1.0
    if length(w) > 0 and length(g) > 0:
        ratio = trust * length(w) / (length(g) + decay * length(w) + eps)
    return ratio * (g + decay * w)


def reference(
    weights: Sequence[Array],
    gradients: Sequence[Sequence[Array | None]],
    *,
    rates: Sequence[float],
    decays: Sequence[float],
    momentum: float = 0.0,
    nesterov: bool = False,
    eps: float = 1e-8,
    trust: float = 0.001,
) -> list[Array]:
    """LARS over SGD: ratio inside the momentum, learning rate outside, as torch's SGD defines momentum."""
    result = [w.copy() for w in weights]
    buffers: list[Array | None] = [None] * len(result)
    for grads, rate in zip(gradients, rates, strict=True):
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            step = adapted(result[i], grad, decays[i], eps, trust)
            if momentum:
                before = buffers[i]
                buffer = step if before is None else momentum * before + step
                buffers[i] = buffer
                step = step + momentum * buffer if nesterov else buffer
            result[i] = result[i] - rate * step
    return result


def problem(seed: int = 0) -> tuple[list[Array], list[list[Array | None]]]:
    """A matrix, a vector, a zero tensor, one whose gradients are zero now and then, one without gradients."""
    draw = np.random.default_rng(seed)
    shapes = [(4, 3), (5,), (3,), (2, 2, 2), (6,)]
    weights = [draw.normal(size=s) for s in shapes]
    weights[2][:] = 0
    gradients: list[list[Array | None]] = []
    for update in range(UPDATES):
        grads: list[Array | None] = [draw.normal(size=s) for s in shapes]
        if update % 2:
            grads[3] = np.zeros(shapes[3])
        grads[4] = None
        gradients.append(grads)
    return weights, gradients


def parameters(weights: Sequence[Array], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(w, dtype=dtype)) for w in weights]


def set_gradients(params: Sequence[Tensor], grads: Sequence[Array | None]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else torch.tensor(g, dtype=p.dtype)


def run(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], gradients: Sequence[Any]) -> None:
    for grads in gradients:
        set_gradients(params, grads)
        optimizer.step()


def assert_close(params: Sequence[Tensor], expected: Sequence[Array], tolerance: float = 1e-12) -> None:
    for p, e in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("decay", [0.0, 5e-4, 0.3])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("how", ["single", "foreach", "fused"])
def test_five_updates_equal_the_formula(decay: float, momentum: float, nesterov: bool, how: str) -> None:
    weights, gradients = problem()
    params = parameters(weights)
    base = torch.optim.SGD(
        params,
        lr=2.0,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=decay,
        foreach=how == "foreach",
        fused=how == "fused",
    )
    run(LARS(base), params, gradients)
    expected = reference(weights, gradients, rates=[2.0] * 5, decays=[decay] * 5, momentum=momentum, nesterov=nesterov)
    assert_close(params, expected)


@pytest.mark.parametrize(("eps", "trust"), [(0.0, 0.001), (1e-2, 0.02), (5.0, 1.0)])
def test_eps_and_trust_coef_enter_as_the_formula_says(eps: float, trust: float) -> None:
    weights, gradients = problem(1)
    params = parameters(weights)
    base = torch.optim.SGD(params, lr=0.5, momentum=0.9, weight_decay=0.1)
    run(LARS(base, eps=eps, trust_coef=trust), params, gradients)
    expected = reference(weights, gradients, rates=[0.5] * 5, decays=[0.1] * 5, momentum=0.9, eps=eps, trust=trust)
    assert_close(params, expected)


def test_groups_keep_their_own_weight_decay_and_rate_may_change() -> None:
    weights, gradients = problem(2)
    params = parameters(weights)
    groups = [{"params": params[:2], "weight_decay": 0.2}, {"params": params[2:], "weight_decay": 0.0}]
    lars = LARS(torch.optim.SGD(groups, lr=1.0, momentum=0.9))
    rates = [0.5, 1.0, 2.0, 1.5, 0.25]
    for grads, rate in zip(gradients, rates, strict=True):
        set_gradients(params, grads)
        for group in lars.param_groups:
            group["lr"] = rate
        lars.step()
    expected = reference(weights, gradients, rates=rates, decays=[0.2, 0.2, 0, 0, 0], momentum=0.9)
    assert_close(params, expected)


def test_another_base_finds_the_rescaled_gradient_in_place() -> None:
    weights, gradients = problem(3)
    params = parameters(weights)
    set_gradients(params, gradients[0])
    held = [p.grad for p in params]
    LARS(torch.optim.RMSprop(params, lr=1.0, weight_decay=0.1)).step()
    for p, before, w, g in zip(params, held, weights, gradients[0], strict=True):
        assert p.grad is before
        if g is not None:
            assert p.grad is not None
            np.testing.assert_allclose(p.grad.numpy(), adapted(w, g, 0.1, 1e-8, 0.001), rtol=1e-12)


def test_sgd_on_the_cpu_leaves_the_gradients_as_they_are() -> None:
    weights, gradients = problem(3)
    params = parameters(weights)
    set_gradients(params, gradients[0])
    held = [p.grad for p in params]
    LARS(torch.optim.SGD(params, lr=1.0, momentum=0.9, weight_decay=0.1)).step()
    for p, before, g in zip(params, held, gradients[0], strict=True):
        assert p.grad is before
        if g is not None:
            assert p.grad is not None
            np.testing.assert_array_equal(p.grad.numpy(), g)


def test_weight_decay_pulls_the_same_way_when_the_base_maximizes() -> None:
    weights, gradients = problem(4)
    params = parameters(weights)
    base = torch.optim.SGD(params, lr=0.5, momentum=0.9, weight_decay=0.1, maximize=True)
    run(LARS(base), params, gradients)
    negated = [[None if g is None else -g for g in grads] for grads in gradients]
    assert_close(params, reference(weights, negated, rates=[0.5] * 5, decays=[0.1] * 5, momentum=0.9))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_base_steps_on_the_rescaled_gradients_without_weight_decay(kind: Any) -> None:
    weights, gradients = problem(5)
    params, plain = parameters(weights), parameters(weights)
    lars = LARS(kind(params, lr=0.01, weight_decay=0.1))
    alone = kind(plain, lr=0.01, weight_decay=0.0)
    for grads in gradients:
        set_gradients(params, grads)
        lars.step()
        by_hand = [
            None if g is None else adapted(p.detach().numpy(), g, 0.1, 1e-8, 0.001)
            for p, g in zip(plain, grads, strict=True)
        ]
        set_gradients(plain, by_hand)
        alone.step()
    assert_close(params, [p.detach().numpy() for p in plain])
    assert lars.param_groups[0]["weight_decay"] == 0.1


def test_a_base_without_weight_decay_gets_none() -> None:
    weights, gradients = problem(6)
    params = parameters(weights)
    lars = LARS(torch.optim.Rprop(params, lr=0.01))
    run(lars, params, gradients)
    assert "weight_decay" not in lars.param_groups[0]


def test_weight_decay_comes_back_when_the_base_raises() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            assert [g["weight_decay"] for g in self.param_groups] == [0.0, 0.0]
            raise FloatingPointError("broken")

    params = parameters([np.ones(2), np.ones(3)])
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.2}]
    lars = LARS(Broken(groups, lr=1.0))
    set_gradients(params, [np.ones(2), np.ones(3)])
    with pytest.raises(FloatingPointError):
        lars.step()
    assert [g["weight_decay"] for g in lars.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_beyond_half_precision_neither_overflow_nor_round_the_ratio(dtype: torch.dtype) -> None:
    # Squares of 300 sum to 9e8, far beyond float16; the ratio is 1e-3 * 3e4 / 3e1.
    params = [nn.Parameter(torch.full((10_000,), 300.0, dtype=dtype))]
    params[0].grad = torch.full((10_000,), 0.3, dtype=dtype)
    grad = float(params[0].grad[0])
    LARS(torch.optim.SGD(params, lr=1.0), eps=0.0).step()
    ratio = 0.001 * 300.0 / grad
    expected = torch.tensor(ratio * grad, dtype=torch.float64).to(dtype)
    assert params[0].grad is not None
    assert params[0].grad.dtype is dtype
    assert torch.equal(params[0].grad, expected.expand(10_000))


def test_dtypes_may_be_mixed() -> None:
    weights, gradients = problem(7)
    params = parameters(weights)
    params[0] = nn.Parameter(params[0].detach().float())
    run(LARS(torch.optim.SGD(params, lr=1.0, weight_decay=0.1)), params, gradients)
    expected = reference(weights, gradients, rates=[1.0] * 5, decays=[0.1] * 5)
    assert_close(params[:1], expected[:1], 1e-6)
    assert_close(params[1:], expected[1:])


def test_a_gradient_that_is_not_finite_stays_so() -> None:
    for bad in (math.nan, math.inf):
        params = parameters([np.ones(3)])
        set_gradients(params, [np.array([1.0, bad, 1.0])])
        LARS(torch.optim.SGD(params, lr=1.0)).step()
        assert not torch.isfinite(params[0]).all()


def test_a_sparse_gradient_is_refused_before_anything_changes() -> None:
    layer = nn.Embedding(4, 2, sparse=True)
    dense = nn.Parameter(torch.ones(2))
    (layer(torch.tensor([1])).sum() + dense.sum()).backward()
    with pytest.raises(RuntimeError, match=r"\(4, 2\).*dense"):
        LARS(torch.optim.SGD([dense, layer.weight], lr=1.0)).step()
    assert dense.grad is not None
    assert torch.equal(dense.grad, torch.ones(2))


def test_a_closure_is_called_once_before_the_ratios_and_its_loss_returned() -> None:
    weights, gradients = problem(9)
    params = parameters(weights)
    calls = []

    def closure() -> Any:
        calls.append(torch.is_grad_enabled())
        set_gradients(params, gradients[0])
        return torch.tensor(3.5)

    loss = LARS(torch.optim.SGD(params, lr=1.0)).step(closure)
    assert calls == [True]
    assert float(loss) == 3.5
    assert_close(params, reference(weights, gradients[:1], rates=[1.0], decays=[0.0] * 5))


def simple(momentum: float = 0.9) -> tuple[list[nn.Parameter], LARS]:
    params = parameters(problem()[0])
    return params, LARS(torch.optim.SGD(params, lr=1.0, momentum=momentum, weight_decay=0.1))


def test_it_is_an_optimizer_that_shares_the_bases_objects() -> None:
    _, lars = simple()
    base = lars.base_optimizer
    assert isinstance(lars, torch.optim.Optimizer)
    assert lars.param_groups is base.param_groups
    assert lars.state is base.state
    assert lars.defaults is base.defaults
    lars.load_state_dict(lars.state_dict())
    assert lars.param_groups is base.param_groups
    assert lars.state is base.state
    extra = nn.Parameter(torch.ones(2))
    lars.add_param_group({"params": [extra], "lr": 7.0})
    assert base.param_groups[1]["params"][0] is extra


@pytest.mark.parametrize("on", [lambda lars: lars, lambda lars: lars.base_optimizer], ids=["lars", "base"])
def test_a_scheduler_on_either_acts_on_both_also_after_loading(
    on: Callable[[LARS], torch.optim.Optimizer],
) -> None:
    _, lars = simple()
    scheduler = torch.optim.lr_scheduler.LambdaLR(on(lars), lambda epoch: 0.5**epoch)
    for i in range(3):
        assert lars.param_groups[0]["lr"] == lars.base_optimizer.param_groups[0]["lr"] == 0.5**i
        lars.step()
        scheduler.step()
        lars.load_state_dict(lars.state_dict())


@pytest.mark.parametrize(
    "clone",
    [
        copy.deepcopy,
        lambda pair: pickle.loads(pickle.dumps(pair)),
    ],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_goes_on_like_the_original(clone: Callable[[Any], Any]) -> None:
    _, gradients = problem()
    params, lars = simple()
    run(lars, params, gradients[:2])
    params2, lars2 = clone((params, lars))
    assert lars2.param_groups[0]["params"][0] is params2[0]
    run(lars, params, gradients[2:])
    run(lars2, params2, gradients[2:])
    for p, q in zip(params, params2, strict=True):
        assert p is not q
        assert torch.equal(p, q)


def test_a_saved_state_dict_brings_back_state_and_settings() -> None:
    weights, gradients = problem()
    params, lars = simple()
    lars.eps, lars.trust_coef = 0.5, 0.25
    run(lars, params, gradients[:2])
    file = io.BytesIO()
    torch.save(lars.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved.keys() == {"state", "param_groups", "lars"}
    assert saved["lars"] | {"eps": 0.5, "trust_coef": 0.25} == saved["lars"]

    params2 = [nn.Parameter(p.detach().clone()) for p in params]
    lars2 = LARS(torch.optim.SGD(params2, lr=9.0))
    lars2.load_state_dict(saved)
    assert (lars2.eps, lars2.trust_coef) == (0.5, 0.25)
    run(lars, params, gradients[2:])
    run(lars2, params2, gradients[2:])
    for p, q in zip(params, params2, strict=True):
        assert torch.equal(p, q)
    expected = reference(weights, gradients, rates=[1.0] * 5, decays=[0.1] * 5, momentum=0.9, eps=0.5, trust=0.25)
    assert_close(params2, expected)


def test_a_base_state_dict_loads_and_the_settings_stay() -> None:
    _, gradients = problem()
    params, lars = simple()
    run(lars, params, gradients)
    other = LARS(torch.optim.SGD(parameters(problem()[0]), lr=9.0), eps=0.5, trust_coef=0.25)
    other.load_state_dict(lars.base_optimizer.state_dict())
    assert (other.eps, other.trust_coef) == (0.5, 0.25)
    assert other.param_groups[0]["lr"] == 1.0
    first = other.param_groups[0]["params"][0]
    assert torch.equal(other.state[first]["momentum_buffer"], lars.state[params[0]]["momentum_buffer"])


@pytest.mark.parametrize("entry", [{"eps": -1.0}, {"trust_coef": 0.0}, {"clip": 1.0}, {"clap": 1.0}])
def test_settings_that_cannot_be_are_refused_and_nothing_is_loaded(entry: dict[str, float]) -> None:
    _, lars = simple()
    state = {**lars.state_dict(), "lars": entry}
    state["param_groups"][0]["lr"] = 5.0
    with pytest.raises(ValueError, match=next(iter(entry))):
        lars.load_state_dict(state)
    assert lars.param_groups[0]["lr"] == 1.0
    assert (lars.eps, lars.trust_coef) == (1e-8, 0.001)


def test_step_and_state_dict_hooks_are_called() -> None:
    _, lars = simple()
    seen: list[str] = []
    lars.register_step_pre_hook(lambda opt, args, kwargs: seen.append(f"pre {type(opt).__name__}"))
    lars.register_step_post_hook(lambda opt, args, kwargs: seen.append(f"post {type(opt).__name__}"))
    lars.base_optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append("base"))
    lars.step()
    assert seen == ["pre LARS", "base", "post LARS"]

    seen.clear()
    lars.register_state_dict_pre_hook(lambda opt: seen.append("save"))
    lars.register_state_dict_post_hook(lambda opt, state: {**state, "extra": 1})
    lars.register_load_state_dict_pre_hook(lambda opt, state: {k: v for k, v in state.items() if k != "extra"})
    lars.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    state = lars.state_dict()
    assert state["extra"] == 1
    lars.load_state_dict(state)
    assert seen == ["save", "loaded"]


def test_the_profiler_names_the_step() -> None:
    _, lars = simple()
    with profile() as seen:
        lars.step()
        lars.zero_grad()
    names = {event.name for event in seen.events()}
    assert {"Optimizer.step#LARS.step", "Optimizer.zero_grad#LARS.zero_grad"} <= names


def test_zero_grad_empties_or_clears_the_gradients() -> None:
    params, lars = simple()
    set_gradients(params, problem()[1][0])
    lars.zero_grad(set_to_none=False)
    assert params[0].grad is not None
    assert not params[0].grad.any()
    lars.zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_under_a_gradient_scaler_the_ratio_sees_unscaled_gradients(fused: bool, unscale_first: bool) -> None:
    weights, _ = problem()
    params = parameters(weights[:2], torch.float32)
    plain = parameters(weights[:2], torch.float32)
    lars = LARS(torch.optim.SGD(params, lr=1.0, momentum=0.9, weight_decay=0.1, fused=fused))
    alone = LARS(torch.optim.SGD(plain, lr=1.0, momentum=0.9, weight_decay=0.1, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def loss(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([(v**2).sum() for v in values]).sum()

    for _ in range(3):
        lars.zero_grad()
        scaler.scale(loss(params)).backward()
        if unscale_first:
            scaler.unscale_(lars)
        scaler.step(lars)
        scaler.update()
        alone.zero_grad()
        loss(plain).backward()
        alone.step()
    for p, q in zip(params, plain, strict=True):
        assert torch.equal(p, q)

    before = [p.detach().clone() for p in params]
    lars.zero_grad()
    scaler.scale(loss(params) * math.inf).backward()
    scaler.step(lars)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p, old)


def test_what_it_cannot_wrap_is_refused_with_the_reason() -> None:
    params = parameters([np.ones(2)])
    sgd = torch.optim.SGD(params, lr=1.0)
    with pytest.raises(ValueError, match="differentiable"):
        LARS(torch.optim.SGD(params, lr=1.0, differentiable=True))
    for settings in ({"eps": -1e-9}, {"eps": math.nan}, {"trust_coef": 0.0}, {"trust_coef": math.inf}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            LARS(sgd, **settings)


def test_its_repr_shows_the_base_and_the_settings() -> None:
    _, lars = simple()
    assert repr(lars).startswith("LARS(SGD (")
    assert repr(lars).endswith("eps=1e-08, trust_coef=0.001)")
