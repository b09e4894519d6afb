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
    """Return the results by case, dtype and kind. Those by kind and "nan" have one NaN in their input."""
    given: dict[Any, Given] = {}
    for kind in KINDS:
        given |= {(case, dtype, kind): (operands(case, dtype, kind), case, kind) for case, dtype in TYPED_CASES}
        tensors = operands(CASES[0], torch.float32, kind)
        assert tensors[0] is not None
        tensors[0][0, 0, 0, 0] = torch.nan
        given[kind, "nan"] = (tensors, CASES[0], kind)
    made = interpreted(tmp_path_factory.mktemp("interpreted"), list(given.values()))
    return dict(zip(given, made, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("case", "dtype"), TYPED_CASES, ids=str)
def test_interpreted_fused_kernels_agree_with_float64(
    results: Results, case: Case, dtype: torch.dtype, kind: str
) -> None:
    check(results[case, dtype, kind], operands(case, dtype, kind), case, dtype, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_relu_keeps_what_is_not_a_number(results: Results, kind: str) -> None:
    made = results[kind, "nan"]
    output, grad_input, *_ = made.tensors
    for tensor in (output, grad_input):
        assert tensor[:, 0].isnan().all()
        assert not tensor[:, 1:].isnan().any()
    assert made.totals[0].isnan().tolist() == [[True, False, False]] * 2


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
        (RELU, torch.float16, 90, 64),
        (SHORTCUT, torch.float32, 80, 64),
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
