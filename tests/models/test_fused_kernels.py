"""Ghost batch norm with the ReLU, and with the sum with a shortcut, in one: interpreted on the CPU, and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ghost_cases import (
    CASES,
    COMBINING,
    EPS,
    LAST,
    RELU,
    SHORTCUT,
    STREAMS,
    TYPED_CASES,
    Case,
    Given,
    Made,
    check,
    compiled,
    interpreted,
    operands,
    passes_of,
    recorded,
    run_on,
)
from torch import Tensor

from lars_train.models import ghost_norm as dispatch

pytest.importorskip("triton")

KINDS = (RELU, SHORTCUT)
Results = dict[Any, Made]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return the results by case, dtype and kind."""
    keys = [(case, dtype, kind) for case, dtype in TYPED_CASES for kind in KINDS]
    given: list[Given] = [(operands(case, dtype, kind), case, kind) for case, dtype, kind in keys]
    return dict(zip(keys, interpreted(tmp_path_factory.mktemp("interpreted"), given), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("case", "dtype"), TYPED_CASES, ids=str)
def test_interpreted_fused_kernels_agree_with_float64(
    results: Results, case: Case, dtype: torch.dtype, kind: str
) -> None:
    check(results[case, dtype, kind], operands(case, dtype, kind), case, dtype, kind)


@pytest.mark.slow
def test_interpreted_moments_of_torch_give_the_same_results(results: Results, tmp_path: Path) -> None:
    case = CASES[0]
    given = [(operands(case, torch.float32, kind), case, kind) for kind in KINDS]
    for kind, made in zip(KINDS, interpreted(tmp_path, given, large=dispatch.LARGE_FOR_MOMENTS), strict=True):
        check(made, operands(case, torch.float32, kind), case, torch.float32, kind)
        # Torch's mean and variance differ in the last digits, so these were used.
        assert not torch.equal(made.moments, results[case, torch.float32, kind].moments)


@pytest.mark.slow
def test_interpreted_relu_keeps_what_is_not_a_number(tmp_path: Path) -> None:
    case = CASES[0]
    given: list[Given] = []
    for kind in KINDS:
        tensors = operands(case, torch.float32, kind)
        assert tensors[0] is not None
        tensors[0][0, 0, 0, 0] = torch.nan
        given.append((tensors, case, kind))
    for made in interpreted(tmp_path, given):
        output, grad_input, *_ = made.tensors
        for tensor in (output, grad_input, *made.totals[:1]):
            channels = tensor.flatten(2) if tensor.ndim == 4 else tensor[:, :, None]
            assert channels[:, 0].isnan().all()
            assert not channels[:, 1:].isnan().any()


# Each launch reads or writes every value of these many tensors.
PASSES = {
    RELU: ((1, 0), (1, 1), (2, 0), (2, 1)),
    SHORTCUT: ((1, 0), (2, 1), (3, 1), (2, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "capability", "channels"),
    [
        (RELU, torch.float32, 90, 64),
        (RELU, torch.bfloat16, 80, 24),
        (SHORTCUT, torch.bfloat16, 90, 64),
        (SHORTCUT, torch.float16, 80, 2048),
    ],
    ids=str,
)
def test_compiled_fused_kernels_make_the_fewest_passes(
    kind: str,
    dtype: torch.dtype,
    capability: int,
    channels: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with recorded(monkeypatch) as launched:
        run_on("meta", 8, channels, 14, dtype, kind=kind)
    streams = [launch for launch in launched if launch.name in STREAMS]
    assert [launch.name for launch in launched if launch not in streams] == list(COMBINING)
    for launch in launched:
        if launch not in streams:
            assert len(compiled(launch, capability).asm["cubin"]) > 1000
    passes = [passes_of(launch, capability) for launch in streams]
    assert passes == list(PASSES[kind])
    # Separate operations: 8 for batch norm, 5 for ReLU and 3 for the sum.
    assert sum(map(sum, passes)) == (8 if kind == RELU else 11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_keeps_no_tensor_of_its_own(dtype: torch.dtype, kind: str) -> None:
    case = CASES[4]
    x, weight, bias, _, shortcut = operands(case, dtype, kind)
    assert x is not None
    x.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = dispatch.ghost_norm(x, weight, bias, ghosts=case.ghosts, eps=EPS, shortcut=shortcut, relu=True)
    large = [t.data_ptr() for t in kept if t.numel() == x.numel()]
    # The next layer keeps the output, too.
    assert sorted(large) == sorted([x.data_ptr(), output.data_ptr()] if kind == SHORTCUT else [x.data_ptr()])
    assert output.is_contiguous(memory_format=LAST)
