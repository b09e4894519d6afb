"""The Triton kernels of ghost batch norm: interpreted on the CPU, compiled without a GPU, and run on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lars_train.models import ghost_norm as dispatch
from lars_train.models.batchnorm import GhostBatchNorm2d

pytest.importorskip("triton")
from lars_train.models import ghost_kernels as kernels

EPS = 1e-5
STREAMS = ("_chunk_moments", "_normalize", "_chunk_sums", "_input_gradient")
COMBINING = ("_combine_moments", "_combine_sums")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST = torch.channels_last


class Case(NamedTuple):
    """Ghost batches of samples (C, side, side) with mean `offset` and a spread of 0.5 to 2."""

    channels: int
    ghosts: int
    samples: int
    side: int
    offset: float = 1.0
    affine: bool = True
    programs: int = 512

    def __str__(self) -> str:
        return "-".join(str(value) for value in self)


CASES = [
    Case(3, 1, 2, 5),
    Case(3, 9, 1, 7, affine=False),
    Case(64, 2, 3, 1),
    Case(64, 3, 3, 11, offset=1000.0, programs=2),
    Case(65, 4, 1, 7),
    Case(2048, 1, 2, 7, programs=1),
    # One sample with many pixels: chunks of several tiles, the last one partial.
    Case(3, 2, 1, 100, offset=1000.0, programs=4),
    Case(24, 2, 1, 33, affine=False, programs=3),
]
# Every case in float32, and every other one in either half precision.
TYPED_CASES = [(case, torch.float32) for case in CASES]
TYPED_CASES += [(case, (torch.bfloat16, torch.float16)[number % 2]) for number, case in enumerate(CASES)]
# Runs `ghost_norm` with the kernels on the CPU, as on CUDA.
INTERPRETED = """
import sys, torch
from lars_train.models import ghost_kernels, ghost_norm
ghost_norm._is_supported = lambda input: True
results = []
for (x, weight, bias, grad), ghosts, eps, ghost_kernels.PROGRAMS in torch.load(sys.argv[1]):
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    output, statistics = ghost_norm.ghost_norm(x, weight, bias, ghosts=ghosts, eps=eps)
    made = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
    results.append((made, statistics))
assert not ghost_norm._disabled, ghost_norm._disabled
torch.save(results, sys.argv[2])
"""
Made = tuple[list[Tensor], Tensor]


def operands(case: Case, dtype: torch.dtype) -> list[Tensor | None]:
    draw = torch.Generator().manual_seed(0)
    shape = (case.ghosts * case.samples, case.channels, case.side, case.side)
    scale = torch.linspace(0.5, 2, case.channels, dtype=torch.float64).view(-1, 1, 1)
    x, grad = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    # Near 1000, neighboring bfloat16 values differ by 4 or 8.
    offset = case.offset if dtype == torch.float32 else min(case.offset, 30.0)
    x, grad = (t.to(dtype).contiguous(memory_format=LAST) for t in (x * scale + offset, grad))
    weight, bias = (torch.rand(case.channels, generator=draw) + 0.5 if case.affine else None for _ in range(2))
    return [x, weight, bias, grad]


def expected(given: list[Tensor | None], ghosts: int, eps: float = EPS) -> Made:
    """Compute the reference with `nn.BatchNorm2d` in float64, ghost batch by ghost batch."""
    x, weight, bias, grad = (None if t is None else t.detach().double() for t in given)
    assert x is not None
    assert grad is not None
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    norm = nn.BatchNorm2d(x.shape[1], eps=eps, momentum=1.0, affine=False, dtype=torch.float64, device=x.device)
    outputs, statistics = [], []
    for part in x.chunk(ghosts):
        outputs.append(norm(part))
        statistics.append(torch.stack([norm.running_mean.clone(), norm.running_var.clone()]))
    output = torch.cat(outputs)
    if weight is not None and bias is not None:
        output = output * weight[:, None, None] + bias[:, None, None]
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)], torch.stack(statistics, 1)


def largest_error(got: Tensor, exact: Tensor) -> float:
    """Return the largest error relative to the largest value."""
    return float((got.double() - exact).abs().max() / exact.abs().max())


def interpreted(folder: Path, cases: list[tuple[list[Tensor | None], int, float, int]]) -> list[Made]:
    torch.save(cases, folder / "cases.pt")
    # Triton reads TRITON_INTERPRET when the kernels are defined.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    names = [str(folder / "cases.pt"), str(folder / "results.pt")]
    subprocess.run([sys.executable, "-c", INTERPRETED, *names], check=True, env=environment, timeout=400)
    results: list[Made] = torch.load(folder / "results.pt")
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Made]:
    """Return the results by case and dtype; "two": the first two ghost batches of the case of three, in float32."""
    given = [(operands(case, dtype), case.ghosts, EPS, case.programs) for case, dtype in TYPED_CASES]
    three, (x, weight, bias, grad) = CASES[3], operands(CASES[3], torch.float32)
    assert x is not None
    assert grad is not None
    two = [x[: 2 * three.samples].clone(memory_format=LAST), weight, bias, grad[: 2 * three.samples]]
    given.append((two, 2, EPS, three.programs))
    return dict(zip([*TYPED_CASES, "two"], interpreted(tmp_path_factory.mktemp("interpreted"), given), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), TYPED_CASES, ids=str)
def test_interpreted_kernels_agree_with_float64(results: dict[Any, Made], case: Case, dtype: torch.dtype) -> None:
    got, statistics = results[case, dtype]
    exact, exact_statistics = expected(operands(case, dtype), case.ghosts)
    # A float32 mean of 1000 has a rounding error of half a unit, 3e-5, compared with a spread of 0.5 or more. The sum
    # of gradients times normalized values accumulates it. The interpreter truncates bfloat16; a GPU rounds.
    rounding = 0.0 if case.offset < 100 else 6e-5
    unit = {torch.float32: 1.5e-6, torch.float16: 0.51 * 2**-10, torch.bfloat16: 1.01 * 2**-7}[dtype]
    assert (got[0].dtype, got[1].dtype) == (dtype, dtype)
    for ours, theirs in zip(got[:2], exact[:2], strict=True):
        assert ours.is_contiguous(memory_format=LAST)
        # A ghost batch of three values may have a small variance, which divides its gradients.
        assert largest_error(ours, theirs) < unit + rounding + (1e-5 if case.side == 1 else 0)
    for ours, theirs in zip(got[2:], exact[2:], strict=True):
        assert ours.dtype == torch.float32
        assert largest_error(ours, theirs) < 2e-6 + 5 * rounding
    assert statistics.dtype == torch.float32
    # Differences of up to 8 from a chunk's first value have rounding errors of up to 5e-7.
    assert largest_error(statistics[0], exact_statistics[0]) < 1e-6
    assert float((statistics[1].double() / exact_statistics[1] - 1).abs().max()) < 2e-6 + rounding


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_ghost_batches(results: dict[Any, Made]) -> None:
    three, two = results[CASES[3], torch.float32], results["two"]
    for ours, theirs in zip(three[0][:2], two[0][:2], strict=True):
        assert torch.equal(ours[: len(theirs)], theirs)
    assert torch.equal(three[1][:, :2], two[1])


class Launch(NamedTuple):
    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, int]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Record launches instead of making them."""
    made: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *arguments, **options: made.append(Launch(self.kernel, grid[0], arguments, options))

    for name in (*STREAMS, *COMBINING):
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name)))
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    return made


def run_on(device: str, ghosts: int, channels: int, side: int, dtype: torch.dtype, samples: int = 32) -> None:
    x = torch.empty(ghosts * samples, channels, side, side, dtype=dtype, device=device).contiguous(memory_format=LAST)
    weight = torch.empty(channels, device=device)
    _, statistics, inverse = kernels.normalize(x, weight, weight, ghosts, EPS)
    kernels.gradients(x, x, weight, statistics[0], inverse)


# Channels and side of ResNet-50's batch norms (He et al. 2016, https://arxiv.org/abs/1512.03385, table 1).
RESNET_50 = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]


def test_launches_do_not_grow_with_the_ghost_batches(launched: list[Launch]) -> None:
    for ghosts in (2, 64):
        launched.clear()
        run_on("meta", ghosts, 64, 7, torch.bfloat16)
        assert [launch.kernel.fn.__name__ for launch in launched] == [
            *("_chunk_moments", "_combine_moments", "_normalize"),
            *("_chunk_sums", "_combine_sums", "_input_gradient"),
        ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "side"), RESNET_50)
def test_two_ghost_batches_of_resnet_50_fill_a_gpu(
    launched: list[Launch], channels: int, side: int, dtype: torch.dtype
) -> None:
    run_on("meta", 2, channels, side, dtype)
    assert min(launch.programs for launch in launched if launch.kernel.fn.__name__ in STREAMS) > 2 * 132


def compiled(launch: Launch, capability: int) -> Any:
    """Compile the kernel as launched, with aligned memory, for a GPU of that compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    signature, constants, aligned = {}, {}, {}
    for number, (parameter, value) in enumerate(zip(launch.kernel.params, launch.arguments, strict=True)):
        if isinstance(value, Tensor):
            signature[parameter.name] = kinds[value.dtype]
            aligned[(number,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(launch.kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def loops(ptx: str) -> str:
    """Return the basic blocks that branch back to their own beginning."""
    blocks = re.split(r"^(\$\w+):", ptx, flags=re.MULTILINE)
    pairs = zip(blocks[1::2], blocks[2::2], strict=True)
    return "".join(block for label, block in pairs if re.search(rf"bra(\.uni)?\s+\{label};", block))


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
    passes = {}
    for launch in launched:
        made = compiled(launch, capability)
        assert len(made.asm["cubin"]) > 1000
        name = launch.kernel.fn.__name__
        if name not in STREAMS:
            continue
        # Offsets of values have 64 bits.
        assert re.search(r"arith\.muli .*: i64", made.asm["ttir"])
        loop = loops(made.asm["ptx"])
        # Rounded to nearest, and once; the interpreter only truncates.
        if dtype != torch.float32 and name in ("_normalize", "_input_gradient"):
            assert set(re.findall(r"cvt\.(r\w)\.b?f16", loop)) == {"rn"}
        accesses = re.findall(r"\b((?:ld|st|cp)\.(?:global|async)\S*)", loop)
        assert {re.sub(r"\.L\d::\w+", "", a) for a in accesses} <= {"ld.global.v4.b32", "st.global.v4.b32"}
        *_, rows, columns = launch.arguments
        whole = rows * columns * dtype.itemsize / (32 * launch.options["num_warps"] * 16)
        passes[name] = tuple(sum(a.startswith(kind) for a in accesses) / whole for kind in ("ld", "st"))
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
            node.apply(grad, None) if hasattr(node, "apply") else node(grad)


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


def test_fake_tensors_and_compiled_models_avoid_the_kernels(
    launched: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_disabled", [])
    on_fake_cuda(torch.bfloat16, LAST)
    monkeypatch.setattr(dispatch, "_is_supported", lambda input: True)
    x = torch.randn(8, 3, 4, 4).contiguous(memory_format=LAST).requires_grad_()
    norm = torch.compile(dispatch.ghost_norm, backend="aot_eager", fullgraph=True)
    norm(x, None, None, ghosts=2, eps=EPS)[0].sum().backward()
    assert (launched, dispatch._disabled) == ([], [])


@pytest.mark.parametrize("failing", ["import", "forward", "backward"])
def test_without_triton_torch_takes_over_with_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    def fail(*_: Any) -> Any:
        raise ImportError("No module named 'triton'") if failing == "import" else RuntimeError("no C compiler")

    monkeypatch.setattr(dispatch, "_disabled", [])
    monkeypatch.setattr(dispatch, "_is_supported", lambda input: True)
    if failing == "import":
        monkeypatch.setattr(dispatch, "_kernels", fail)
    monkeypatch.setattr(kernels, "normalize", dispatch._normalize if failing == "backward" else fail)
    monkeypatch.setattr(kernels, "gradients", fail)
    case = CASES[4]
    for _ in range(2):
        given = operands(case, torch.float32)
        x, weight, bias, grad = given
        leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
        output, statistics = dispatch.ghost_norm(x, weight, bias, ghosts=case.ghosts, eps=EPS)
        made = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
        exact, exact_statistics = expected(given, case.ghosts)
        for ours, theirs in zip([*made, statistics], [*exact, exact_statistics], strict=True):
            assert largest_error(ours, theirs) < 2e-6
    message = capsys.readouterr().err
    assert message.count("runs without its Triton kernels") == 1
    assert ("No module named 'triton'" if failing == "import" else "no C compiler") in message


def test_out_of_memory_does_not_disable_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(dispatch, "_disabled", [])
    monkeypatch.setattr(dispatch, "_is_supported", lambda input: True)
    monkeypatch.setattr(kernels, "normalize", fail)
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.ghost_norm(torch.zeros(4, 3, 2, 2), None, None, ghosts=2, eps=EPS)
    assert dispatch._disabled == []


def needs_cuda(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def on_the_gpu(given: list[Tensor | None], ghosts: int) -> Made:
    x, weight, bias, grad = (None if t is None else t.detach().cuda() for t in given)
    assert x is not None
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    output, statistics = dispatch.ghost_norm(x, weight, bias, ghosts=ghosts, eps=EPS)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)], statistics


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_kernels_agree_with_float64_and_with_torch(
    monkeypatch: pytest.MonkeyPatch, case: Case, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(dispatch, "_disabled", [])
    monkeypatch.setattr(kernels, "PROGRAMS", case.programs)
    given = operands(case, dtype)
    (got, statistics), (exact, exact_statistics) = on_the_gpu(given, case.ghosts), expected(given, case.ghosts)
    assert dispatch._disabled == []
    with dispatch.without_kernels():
        torchs, _ = on_the_gpu(given, case.ghosts)
    rounding = 0.0 if case.offset < 100 else 6e-5
    half = 1.5e-6 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    for number, (ours, theirs, true) in enumerate(zip(got, torchs, exact, strict=True)):
        bound = (half if number < 2 else 3e-6) + 5 * rounding + (1e-5 if case.side == 1 else 0)
        assert largest_error(ours.cpu(), true) < bound
        # torch's operations round twice, and they round bfloat16's products.
        assert largest_error(ours.cpu(), theirs.cpu().double()) < 4 * bound + (2**-6 if dtype == torch.bfloat16 else 0)
    assert largest_error(statistics[0].cpu(), exact_statistics[0]) < 1e-6
    assert float((statistics[1].cpu().double() / exact_statistics[1] - 1).abs().max()) < 2e-6 + rounding


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
    x, weight, bias, grad = (t if t is None else t.cuda() for t in operands(case, torch.bfloat16))
    assert x is not None
    assert grad is not None

    def step() -> tuple[Tensor, ...]:
        output, statistics, inverse = kernels.normalize(x, weight, bias, case.ghosts, EPS)
        return (output, statistics, *kernels.gradients(grad, x, weight, statistics[0], inverse))

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
    output, statistics, inverse = kernels.normalize(x, None, None, ghosts, EPS)
    grad_input, _ = kernels.gradients(one.expand_as(x), x, None, statistics[0], inverse)
    for tensor in (output, grad_input):
        assert all(torch.equal(tensor[ghost], tensor[0]) for ghost in range(ghosts))
