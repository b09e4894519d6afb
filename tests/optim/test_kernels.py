"""The C kernels of LARS over SGD against formulas in float64, and updates without the kernels."""

import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

from lars_train import LARS
from lars_train.optim import fused_sgd

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-13}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    if fused_sgd.kernels is None:
        pytest.skip("no C compiler was available when this package was installed")
    return fused_sgd.kernels


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(st.sampled_from([0.0, 0.9]))
    return {
        "size": draw(st.one_of(st.integers(0, 70), st.sampled_from([16383, 16384, 20001]))),
        "offset": draw(st.integers(0, 3)),
        "seed": draw(st.integers(0, 99)),
        "scale": draw(st.sampled_from([1e-12, 1e-3, 1.0])),
        "momentum": momentum,
        "nesterov": momentum > 0 and draw(st.booleans()),
        "maximize": draw(st.booleans()),
        "decay": draw(st.sampled_from([0.0, 0.01])),
        "lr": draw(st.sampled_from([0.1, 29.0])),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases())
@settings(deadline=None)
def test_norms_and_update_equal_the_formulas(kernels: ModuleType, dtype: torch.dtype, case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    size, offset, wide = case["size"], case["offset"], dtype is torch.float64
    # With an offset, so that addresses are not aligned for vector instructions.
    w, g, b = (torch.randn(size + offset, dtype=dtype)[offset:] for _ in range(3))
    w0, g0, b0 = (t.double().numpy().copy() for t in (w, g, b))

    of_weight, of_grad = kernels.norms(w.data_ptr(), g.data_ptr(), size, wide)
    np.testing.assert_allclose([of_weight, of_grad], [np.linalg.norm(w0), np.linalg.norm(g0)], rtol=1e-13)

    has_momentum = case["momentum"] > 0
    numbers = (case["decay"], case["scale"], case["momentum"], case["lr"])
    at = b.data_ptr() if has_momentum else 0
    kernels.update(w.data_ptr(), g.data_ptr(), at, size, wide, case["nesterov"], case["maximize"], *numbers)
    d = case["scale"] * ((-g0 if case["maximize"] else g0) + case["decay"] * w0)
    buffer = case["momentum"] * b0 + d if has_momentum else b0
    step = d + case["momentum"] * buffer if case["nesterov"] else buffer if has_momentum else d
    tolerance = DTYPES[dtype]
    np.testing.assert_allclose(w.double(), w0 - case["lr"] * step, rtol=tolerance, atol=tolerance * (1 + case["lr"]))
    np.testing.assert_allclose(b.double(), buffer, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(g.double(), g0)


def test_norms_in_float32_neither_overflow_nor_underflow(kernels: ModuleType) -> None:
    large, small = torch.full((20,), 1e30), torch.full((20,), 1e-30)
    norms = kernels.norms(large.data_ptr(), small.data_ptr(), 20, False)
    np.testing.assert_allclose(norms, [1e30 * 20**0.5, 1e-30 * 20**0.5], rtol=1e-6)


def test_wrong_arguments_are_refused(kernels: ModuleType) -> None:
    with pytest.raises(TypeError, match="norms takes 4 arguments, not 1"):
        kernels.norms(0)
    with pytest.raises(TypeError, match="update takes 11 arguments, not 2"):
        kernels.update(0, 0)
    with pytest.raises(TypeError):
        kernels.norms("here", 0, 0, False)


@pytest.mark.parametrize("threads", [1, 2])
def test_updates_do_not_depend_on_the_c_kernels(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with_c = trained()
        monkeypatch.setattr(fused_sgd, "kernels", None)
        without = trained()
    finally:
        torch.set_num_threads(before)
    for one, other in zip(with_c, without, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def trained() -> list[torch.Tensor]:
    """Return the weights after three updates; one is long enough for several threads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 900), nn.ReLU(), nn.Linear(900, 3)).double()
    optimizer = LARS(optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01), trust_coef=0.1)
    inputs = torch.randn(8, 60, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_fused_sgd_works_without_the_c_kernels() -> None:
    code = (
        "import sys; sys.modules['lars_train.optim.kernels'] = None\n"
        "from lars_train.optim import fused_sgd; assert fused_sgd.kernels is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("size", [10, 60000])
@pytest.mark.parametrize("threads", [1, 2])
def test_momentum_of_the_wrong_shape_changes_nothing(size: int, threads: int) -> None:
    def optimizer(*shape: int) -> tuple[nn.Parameter, LARS]:
        weight = nn.Parameter(torch.ones(shape))
        weight.grad = torch.ones(shape)
        return weight, LARS(optim.SGD([weight], lr=0.1, momentum=0.9))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, small = optimizer(size, 2)
        small.step()
        # As many elements, or more.
        for shape in ((2, size), (100 * size,)):
            weight, other = optimizer(*shape)
            other.load_state_dict(small.state_dict())
            with pytest.raises(RuntimeError, match=r"size of tensor|shape"):
                other.step()
            assert (weight == 1).all()
    finally:
        torch.set_num_threads(before)


def test_a_gradient_of_the_wrong_size_raises_the_bases_error() -> None:
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    weight.data = torch.ones(8)
    with pytest.raises(RuntimeError, match="size of tensor"):
        LARS(optim.SGD([weight], lr=0.1, momentum=0.9)).step()


def test_a_zero_gradient_without_storage_counts_as_zeros() -> None:
    weights = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    weights[0].grad, weights[1].grad = torch._efficientzerotensor(4), torch.zeros(4)
    for weight in weights:
        LARS(optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)).step()
    torch.testing.assert_close(weights[0], weights[1])
