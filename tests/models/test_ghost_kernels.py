"""The Triton kernels of ghost batch norm: interpreted on the CPU, compiled without a GPU, and run on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ghost_cases import (
    CASES,
    COUNTED,
    DTYPES,
    EPS,
    LAST,
    PLAIN,
    RELU,
    SHORTCUT,
    STREAMS,
    SUMS,
    TYPED_CASES,
    Case,
    Given,
    Launch,
    Made,
    check,
    compiled,
    expected,
    interpreted,
    largest_error,
    operands,
    passes_of,
    recorded,
    run_on,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lars_train.models import ghost_norm as dispatch
from lars_train.models.batchnorm import GhostBatchNorm2d

pytest.importorskip("triton")
from lars_train.models import ghost_launch as kernels


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Made]:
    """Return the results by case and dtype; "two": the first two ghost batches of the case of three, in float32."""
    given: list[Given] = [(operands(case, dtype), case, PLAIN) for case, dtype in TYPED_CASES]
    three, (x, weight, bias, grad, _) = CASES[3], operands(CASES[3], torch.float32)
    assert x is not None
    assert grad is not None
    two = [x[: 2 * three.samples].clone(memory_format=LAST), weight, bias, grad[: 2 * three.samples], None]
    given.append((two, three._replace(ghosts=2), PLAIN))
    return dict(zip([*TYPED_CASES, "two"], interpreted(tmp_path_factory.mktemp("interpreted"), given), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), TYPED_CASES, ids=str)
def test_interpreted_kernels_agree_with_float64(results: dict[Any, Made], case: Case, dtype: torch.dtype) -> None:
    check(results[case, dtype], operands(case, dtype), case, dtype)


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_ghost_batches(results: dict[Any, Made]) -> None:
    three, two = results[CASES[3], torch.float32], results["two"]
    for ours, theirs in zip(three.tensors[:2], two.tensors[:2], strict=True):
        assert torch.equal(ours[: len(theirs)], theirs)
    assert torch.equal(three.moments[:, :2], two.moments)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Record launches instead of making them."""
    with recorded(monkeypatch) as made:
        yield made


# Channels and side of ResNet-50's batch norms (He et al. 2016, https://arxiv.org/abs/1512.03385, table 1).
RESNET_50 = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]


def test_launches_do_not_grow_with_the_ghost_batches(launched: list[Launch]) -> None:
    for ghosts in (2, 64):
        launched.clear()
        run_on("meta", ghosts, 64, 7, torch.bfloat16)
        assert [launch.name for launch in launched] == [
            *("_chunk_moments", "_combine_moments", "_normalize"),
            *("_chunk_sums", "_combine_sums", "_input_gradient"),
        ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "side"), RESNET_50)
def test_two_ghost_batches_of_resnet_50_fill_a_gpu(
    launched: list[Launch], channels: int, side: int, dtype: torch.dtype
) -> None:
    run_on("meta", 2, channels, side, dtype)
    assert min(launch.programs for launch in launched if launch.name in STREAMS) > 2 * 132


# 24 is a multiple of 8, but of no higher power of 2.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "capability", "channels"),
    [
        (torch.float32, 90, 64),
        (torch.bfloat16, 90, 64),
        (torch.bfloat16, 80, 24),
        (torch.float16, 70, 2048),
    ],
    ids=str,
)
def test_compiled_kernels_make_eight_passes_of_16_byte_accesses(
    launched: list[Launch],
    dtype: torch.dtype,
    capability: int,
    channels: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    run_on("meta", 8, channels, 14, dtype)
    for launch in launched:
        if launch.name not in STREAMS:
            assert len(compiled(launch, capability).asm["cubin"]) > 1000
    passes = {launch.name: passes_of(launch, capability) for launch in launched if launch.name in STREAMS}
    assert passes == dict(zip(STREAMS, [(1, 0), (1, 1), (2, 0), (2, 1)], strict=True))
    assert sum(map(sum, passes.values())) == 8


def on_fake_cuda(dtype: torch.dtype, layout: torch.memory_format, *, ghost_batch: int = 4) -> None:
    """Run a layer's forward and backward pass over 8 samples."""
    with FakeTensorMode():
        layer = GhostBatchNorm2d(64, ghost_batch=ghost_batch, device="cuda")
        x = torch.empty(8, 64, 8, 8, device="cuda", dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        node = layer(x).grad_fn
        # The engine that runs a graph of CUDA tensors needs a driver; a single node does not.
        with torch.no_grad():
            # A built-in node of torch takes the gradient of its only differentiable output.
            grad = torch.empty_like(x)
            node.apply(grad, None, None) if hasattr(node, "apply") else node(grad)


@pytest.mark.parametrize(
    ("dtype", "layout", "launches"),
    [
        *((dtype, LAST, 6) for dtype in DTYPES),
        (torch.float64, LAST, 0),
        (torch.bfloat16, torch.contiguous_format, 0),
    ],
    ids=str,
)
def test_a_layer_on_cuda_uses_the_kernels_in_channels_last(
    launched: list[Launch],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    layout: torch.memory_format,
    launches: int,
) -> None:
    monkeypatch.setattr(dispatch, "_is_plain", lambda input: True)
    monkeypatch.setattr(dispatch, "_disabled", [])
    on_fake_cuda(dtype, layout)
    assert dispatch._disabled == []
    assert len(launched) == launches


@pytest.mark.parametrize(("more", "launches"), [(0, 6), (1, 0)])
def test_one_ghost_batch_uses_the_kernels_only_if_large(
    launched: list[Launch], monkeypatch: pytest.MonkeyPatch, more: int, launches: int
) -> None:
    monkeypatch.setattr(dispatch, "_is_plain", lambda input: True)
    monkeypatch.setattr(dispatch, "_disabled", [])
    monkeypatch.setattr(dispatch, "LARGE", 8 * 64 * 8 * 8 + more)
    on_fake_cuda(torch.bfloat16, LAST, ghost_batch=8)
    assert len(launched) == launches
    with dispatch.launches_are_free():
        on_fake_cuda(torch.bfloat16, LAST, ghost_batch=8)
    assert len(launched) == launches + 6


def test_fake_tensors_and_compiled_models_avoid_the_kernels(
    launched: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_disabled", [])
    on_fake_cuda(torch.bfloat16, LAST)
    monkeypatch.setattr(dispatch, "_is_supported", lambda input: True)
    x = torch.randn(8, 3, 4, 4).contiguous(memory_format=LAST).requires_grad_()
    norm = torch.compile(dispatch.ghost_norm, backend="aot_eager", fullgraph=True)
    norm(x, None, None, ghosts=2, eps=EPS).sum().backward()
    assert (launched, dispatch._disabled) == ([], [])


@pytest.mark.parametrize("kind", [PLAIN, RELU, SHORTCUT])
@pytest.mark.parametrize("failing", ["import", "forward", "backward"])
def test_without_triton_torch_takes_over_with_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str, kind: str
) -> None:
    def working(*arguments: Any, totals: Any, **options: Any) -> tuple[Tensor, ...]:
        made = dispatch._normalize(*arguments, **options)
        dispatch._add_to(totals, arguments[0], *made[1:])
        return made

    def fail(*_: Any, **__: Any) -> Any:
        raise ImportError("No module named 'triton'") if failing == "import" else RuntimeError("no C compiler")

    monkeypatch.setattr(dispatch, "_disabled", [])
    monkeypatch.setattr(dispatch, "_is_supported", lambda input: True)
    if failing == "import":
        monkeypatch.setattr(dispatch, "_kernels", fail)
    monkeypatch.setattr(kernels, "normalize", working if failing == "backward" else fail)
    monkeypatch.setattr(kernels, "gradients", fail)
    case = CASES[4]
    for _ in range(2):
        given = operands(case, torch.float32, kind)
        x, weight, bias, grad, shortcut = given
        leaves = [t.requires_grad_() for t in (x, weight, bias, shortcut) if t is not None]
        totals = (torch.zeros(2, case.channels), torch.zeros(1))
        output = dispatch.ghost_norm(
            x, weight, bias, ghosts=case.ghosts, eps=EPS, shortcut=shortcut, relu=kind != PLAIN, totals=totals
        )
        made = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
        exact = expected(given, case.ghosts, kind)
        for ours, theirs in zip([*made, totals[0][0]], [*exact.tensors, exact.moments[0].sum(0)], strict=True):
            assert largest_error(ours, theirs) < 2e-6
        assert totals[1].tolist() == [case.ghosts]
    message = capsys.readouterr().err
    assert message.count("runs without its Triton kernels") == 1
    assert ("No module named 'triton'" if failing == "import" else "no C compiler") in message


def test_out_of_memory_does_not_disable_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(dispatch, "_disabled", [])
    monkeypatch.setattr(dispatch, "_is_supported", lambda input: True)
    monkeypatch.setattr(kernels, "normalize", fail)
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.ghost_norm(torch.zeros(4, 3, 2, 2), None, None, ghosts=2, eps=EPS)
    assert dispatch._disabled == []


def needs_cuda(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def on_the_gpu(given: list[Tensor | None], ghosts: int, kind: str) -> Made:
    x, weight, bias, grad, shortcut = (None if t is None else t.detach().cuda() for t in given)
    assert x is not None
    leaves = [t.requires_grad_() for t in (x, weight, bias, shortcut) if t is not None]
    totals = (torch.full((2, x.shape[1]), SUMS, device="cuda"), torch.full((1,), COUNTED, device="cuda"))
    output, *moments = dispatch._GhostNorm.apply(x, weight, bias, shortcut, ghosts, EPS, kind != PLAIN, totals)
    made = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
    return Made([t.cpu() for t in made], torch.stack(moments).cpu(), tuple(t.cpu() for t in totals))


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [PLAIN, RELU, SHORTCUT])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_kernels_agree_with_float64_and_with_torch(
    monkeypatch: pytest.MonkeyPatch, case: Case, kind: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(dispatch, "_disabled", [])
    monkeypatch.setattr(kernels, "PROGRAMS", case.programs)
    given = operands(case, dtype, kind)
    got = on_the_gpu(given, case.ghosts, kind)
    assert dispatch._disabled == []
    check(got, given, case, dtype, kind)
    with dispatch.without_kernels():
        torchs = on_the_gpu(given, case.ghosts, kind)
    rounding = 0.0 if case.offset < 100 else 6e-5
    # torch's operations round several times, and they round bfloat16's products.
    bound = 5e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for ours, theirs in zip(got.tensors, torchs.tensors, strict=True):
        assert largest_error(ours, theirs.double()) < bound + 5 * rounding


@needs_cuda
def test_cuda_never_waits_and_autocast_keeps_dtype_and_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_disabled", [])
    layer = GhostBatchNorm2d(64, ghost_batch=4, device="cuda")
    x = torch.randn(8, 64, 9, 9, device="cuda").to(torch.bfloat16).contiguous(memory_format=LAST).requires_grad_()
    grad = torch.randn_like(x)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        # Triton compiles and loads the kernels at the first call.
        layer(x).backward(grad)
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = layer(x)
            output.backward(grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert dispatch._disabled == []
    assert x.grad is not None
    for tensor in (output, x.grad):
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous(memory_format=LAST)


@needs_cuda
def test_cuda_graphs_of_the_kernels_replay_bit_identically(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_disabled", [])
    case = Case(64, 3, 4, 30)
    x, weight, bias, grad, shortcut = (t if t is None else t.cuda() for t in operands(case, torch.bfloat16, SHORTCUT))
    assert x is not None
    assert grad is not None

    def step() -> tuple[Tensor, ...]:
        output, *moments = kernels.normalize(x, weight, bias, case.ghosts, EPS, shortcut=shortcut, relu=True)
        made = kernels.gradients(grad, x, weight, bias, *moments, EPS, output=output, relu=True)
        return (output, *moments, *(t for t in made if t is not None))

    first = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    graph.replay()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, first, strict=True))


@needs_cuda
def test_cuda_normalizes_more_than_2_to_the_31_values() -> None:
    ghosts, shape = 9, (1, 64, 2048, 2048)
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of memory on the device")
    one = torch.randn(shape, device="cuda").to(torch.bfloat16).contiguous(memory_format=LAST)
    x = torch.empty(ghosts, *shape[1:], dtype=one.dtype, device="cuda").contiguous(memory_format=LAST)
    for ghost in range(ghosts):
        x[ghost] = one[0]
    output, *moments = kernels.normalize(x, None, None, ghosts, EPS)
    grad_input, *_ = kernels.gradients(one.expand_as(x), x, None, None, *moments, EPS)
    for tensor in (output, grad_input):
        assert all(torch.equal(tensor[ghost], tensor[0]) for ghost in range(ghosts))
