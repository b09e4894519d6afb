"""Every dense optimizer of torch.optim, a problem for them, and LARS's rule in float64 NumPy.

The reference is the base alone, without weight decay, on gradients that `rescale_by_hand` has rescaled.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import Parameter
from torch.optim import Optimizer

from lars_train import LARS

# LARS's steps must not warn. The exception: garbage collection may report an unclosed file of an earlier test.
no_warnings = pytest.mark.filterwarnings(
    "error", "default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"
)

UPDATES = 5
DECAY = 0.1
EPS = 1e-3
TRUST = 0.05
OPTIONS = {"eps": EPS, "trust_coef": TRUST}


@dataclass(frozen=True)
class Base:
    """A class of torch.optim and the keywords to test it with."""

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
        # LBFGS divides by differences of gradients, so rounding errors grow a thousandfold with each update.
        return range(2 if self.calls_closure else UPDATES)

    @property
    def calls_closure(self) -> bool:
        return self.kind is optim.LBFGS

    @property
    def follows_the_gradient(self) -> bool:
        """True if the step is proportional to the gradient, as ``lr_placement="inside"`` requires."""
        return self.kind in (optim.SGD, optim.ASGD)

    def build(self, params: Any, **changes: Any) -> Optimizer:
        built: Optimizer = self.kind(params, **(self.keywords | changes))
        return built

    def lars(self, params: Any, **changes: Any) -> LARS:
        """Return LARS over this optimizer, with weight decay if the optimizer supports it."""
        decay = {"weight_decay": DECAY} if self.takes("weight_decay") else {}
        return LARS(self.build(params, **(decay | changes)), **OPTIONS)

    def alone(self, params: Any, **changes: Any) -> Optimizer:
        """Return this optimizer alone, without weight decay."""
        decay = {"weight_decay": 0.0} if self.takes("weight_decay") else {}
        return self.build(params, **(changes | decay))


# torch before 2.9 does not have Muon, before 2.5 no Adafactor, which torch_lars supports.
MUON: Any = getattr(optim, "Muon", None)
ADAFACTOR: Any = getattr(optim, "Adafactor", None)
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
    *([Base(ADAFACTOR, {"lr": 0.05})] if ADAFACTOR else []),
    Base(optim.LBFGS, {"lr": 0.1, "max_iter": 3}),
    *([Base(MUON, {"lr": 0.05})] if MUON else []),
]
# Bases that do not call the closure: a GradScaler and a second parameter group do not work with LBFGS.
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

    The third weight starts at zero, the fourth has a zero gradient in every other update, the fifth has no gradient.
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
    """Return the rescaled gradient, by the formula in the docstring of LARS."""
    weight_norm, grad_norm = np.linalg.norm(weight.ravel()), np.linalg.norm(grad.ravel())
    ratio = 1.0
    if weight_norm > 0 and grad_norm > 0:
        ratio = TRUST * weight_norm / (grad_norm + decay * weight_norm + EPS)
    return ratio * (grad - decay * weight if maximize else grad + decay * weight)


def rescale_by_hand(optimizer: Optimizer, decays: Sequence[float]) -> None:
    """Rescale the gradients of a base without LARS; `decays` has the weight decay of each group."""
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
    """Make updates with the gradients of `problem`, rescaled by hand if `decays` is given."""
    inner = getattr(optimizer, "base_optimizer", optimizer)
    for update in updates:

        def closure(update: int = update) -> Tensor:
            for p in params:
                p.grad = None
            loss = problem.loss(params, update)
            loss.backward()
            if decays is not None:
                rescale_by_hand(optimizer, decays)
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
    """Assert that every weight with a gradient has changed, so that comparisons are not trivial."""
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


class Matrices(nn.Module):
    """Two 2-D weights, which every base supports."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        draw = np.random.default_rng(1)
        self.first = Parameter(torch.from_numpy(draw.normal(size=(4, 3))).to(dtype))
        self.second = Parameter(torch.from_numpy(draw.normal(size=(2, 4))).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first.T).tanh() @ self.second.T


ROWS = (5, 3, 1)
DECAYS = (DECAY, 0.0, 0.3)


def sharded_weights() -> tuple[list[Tensor], Any]:
    """Return weights with 5, 3 and 1 rows, which do not divide evenly between two ranks, and gradients by update."""
    draw = np.random.default_rng(4)
    weights = [torch.from_numpy(draw.normal(size=(rows, 4))) for rows in ROWS]
    grads = [[torch.from_numpy(draw.normal(size=(rows, 4))) for rows in ROWS] for _ in range(UPDATES)]
    return weights, grads


def groups_of(base: Base, params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Return a group per parameter, each with its own weight decay; LBFGS has a single group."""
    if base.calls_closure:
        return [{"params": list(params)}]
    own = [{"weight_decay": decay} if base.takes("weight_decay") else {} for decay in DECAYS]
    return [{"params": [p], **decay} for p, decay in zip(params, own, strict=True)]
