"""Cases of the Triton kernels of ghost batch norm, their float64 reference, and ways to run and to compile them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

EPS = 1e-5
STREAMS = ("_chunk_moments", "_normalize", "_chunk_sums", "_input_gradient")
COMBINING = ("_combine_moments", "_combine_sums")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST = torch.channels_last
PLAIN, RELU, SHORTCUT = "batch norm", "with ReLU", "with shortcut and ReLU"
# The counted samples and the values of the sums before a pass.
COUNTED, SUMS = 3.0, 2.0


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
# Runs batch norm with the kernels on the CPU, as on CUDA.
INTERPRETED = """
import sys, torch
from lars_train.models import ghost_launch, ghost_norm
ghost_norm._is_supported = lambda input: True
results = []
for given, ghosts, eps, ghost_launch.PROGRAMS, relu, totals in torch.load(sys.argv[1]):
    x, weight, bias, grad, shortcut = given
    leaves = [t.requires_grad_() for t in (x, weight, bias, shortcut) if t is not None]
    output, *moments = ghost_norm._GhostNorm.apply(x, weight, bias, shortcut, ghosts, eps, relu, totals)
    made = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
    results.append((made, torch.stack(moments), totals))
assert not ghost_norm._disabled, ghost_norm._disabled
torch.save(results, sys.argv[2])
"""


class Made(NamedTuple):
    """The results of a forward and backward pass."""

    tensors: list[Tensor]
    """The output and the gradients of input, weight, bias and shortcut, without those that do not exist."""
    moments: Tensor
    """Means and biased variances, (2, ghosts, C)."""
    totals: tuple[Tensor, ...] = ()


def operands(case: Case, dtype: torch.dtype, kind: str = PLAIN) -> list[Tensor | None]:
    """Return input, weight, bias, the output's gradient, and the shortcut."""
    draw = torch.Generator().manual_seed(0)
    shape = (case.ghosts * case.samples, case.channels, case.side, case.side)
    scale = torch.linspace(0.5, 2, case.channels, dtype=torch.float64).view(-1, 1, 1)
    x, grad, shortcut = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(3))
    # Near 1000, neighboring bfloat16 values differ by 4 or 8.
    offset = case.offset if dtype == torch.float32 else min(case.offset, 30.0)
    x, grad, shortcut = (t.to(dtype).contiguous(memory_format=LAST) for t in (x * scale + offset, grad, shortcut))
    weight, bias = (torch.rand(case.channels, generator=draw) + 0.5 if case.affine else None for _ in range(2))
    given: list[Tensor | None] = [x, weight, bias, grad, shortcut if kind == SHORTCUT else None]
    if kind != PLAIN:
        # Near zero, rounding decides the sign and with it the gradient.
        grad[_outputs(given, case.ghosts)[0].abs() < 1e-3] = 0
    return given


def _outputs(given: list[Tensor | None], ghosts: int) -> tuple[Tensor, Tensor]:
    """Compute the output before ReLU and the moments with `nn.BatchNorm2d`, ghost batch by ghost batch."""
    x, weight, bias, _grad, shortcut = (None if t is None else t.double() for t in given)
    assert x is not None
    norm = nn.BatchNorm2d(x.shape[1], eps=EPS, momentum=1.0, affine=False, dtype=torch.float64, device=x.device)
    outputs, moments = [], []
    for part in x.chunk(ghosts):
        outputs.append(norm(part))
        values = part.numel() // x.shape[1]
        assert norm.running_mean is not None
        assert norm.running_var is not None
        moments.append(torch.stack([norm.running_mean.clone(), norm.running_var * ((values - 1) / values)]))
    output = torch.cat(outputs)
    if weight is not None and bias is not None:
        output = output * weight[:, None, None] + bias[:, None, None]
    return output if shortcut is None else output + shortcut, torch.stack(moments, 1)


def expected(given: list[Tensor | None], ghosts: int, kind: str = PLAIN) -> Made:
    """Compute the reference in float64."""
    double = [None if t is None else t.detach().double() for t in given]
    x, weight, bias, grad, shortcut = double
    assert grad is not None
    leaves = [t.requires_grad_() for t in (x, weight, bias, shortcut) if t is not None]
    output, moments = _outputs(double, ghosts)
    if kind != PLAIN:
        output = output.relu()
    return Made([output.detach(), *torch.autograd.grad(output, leaves, grad)], moments)


def largest_error(got: Tensor, exact: Tensor) -> float:
    """Return the largest error relative to the largest value."""
    return float((got.double() - exact).abs().max() / exact.abs().max())


def check(got: Made, given: list[Tensor | None], case: Case, dtype: torch.dtype, kind: str = PLAIN) -> None:
    """Compare the results of interpreted kernels with the float64 reference."""
    exact = expected(given, case.ghosts, kind)
    # A float32 mean of 1000 has a rounding error of half a unit, 3e-5, compared with a spread of 0.5 or more. The sum
    # of gradients times normalized values accumulates it. The interpreter truncates bfloat16; a GPU rounds.
    rounding = 0.0 if case.offset < 100 else 6e-5
    unit = {torch.float32: 1.5e-6, torch.float16: 0.51 * 2**-10, torch.bfloat16: 1.01 * 2**-7}[dtype]
    # With a shortcut, the gradient is also rounded between the two kernels.
    unit *= 2 if kind == SHORTCUT else 1
    like_input = [0, 1, len(exact.tensors) - 1] if kind == SHORTCUT else [0, 1]
    assert len(got.tensors) == len(exact.tensors)
    for number, (ours, theirs) in enumerate(zip(got.tensors, exact.tensors, strict=True)):
        if number in like_input:
            assert ours.dtype == dtype
            assert ours.is_contiguous(memory_format=LAST)
            # A ghost batch of three values may have a small variance, which divides its gradients.
            assert largest_error(ours, theirs) < unit + rounding + (1e-5 if case.side == 1 else 0)
        else:
            assert ours.dtype == torch.float32
            assert largest_error(ours, theirs) < 2e-6 + 5 * rounding
    assert got.moments.dtype == torch.float32
    # Differences of up to 8 from a chunk's first value have rounding errors of up to 5e-7.
    assert largest_error(got.moments[0], exact.moments[0]) < 1e-6
    assert float((got.moments[1].double() / exact.moments[1] - 1).abs().max()) < 2e-6 + rounding
    sums, counted = got.totals
    values = case.samples * case.side**2
    unbiased = exact.moments * torch.tensor([1.0, values / (values - 1)])[:, None, None]
    assert largest_error(sums, SUMS + case.samples * unbiased.sum(1)) < 2e-6 + rounding
    assert counted.tolist() == [COUNTED + case.samples * case.ghosts]


Given = tuple[list[Tensor | None], Case, str]
"""Operands, with their case and kind."""


def interpreted(folder: Path, given: list[Given]) -> list[Made]:
    """Run the kernels in Triton's interpreter, in another process."""
    runs = []
    for tensors, case, kind in given:
        totals = (torch.full((2, case.channels), SUMS), torch.full((1,), COUNTED))
        runs.append((tensors, case.ghosts, EPS, case.programs, kind != PLAIN, totals))
    torch.save(runs, folder / "cases.pt")
    # Triton reads TRITON_INTERPRET when the kernels are defined.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    names = [str(folder / "cases.pt"), str(folder / "results.pt")]
    subprocess.run([sys.executable, "-c", INTERPRETED, *names], check=True, env=environment, timeout=400)
    return [Made(*made) for made in torch.load(folder / "results.pt")]


class Launch(NamedTuple):
    """A launch of a kernel."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """The name of the kernel."""
        name: str = self.kernel.fn.__name__
        return name


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, keep: bool = True) -> Iterator[list[Launch]]:
    """Record launches instead of making them. `keep=False` drops them, and with them their tensors."""
    from lars_train.models import ghost_kernels

    made: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(*arguments: Any, **options: Any) -> None:
                if keep:
                    made.append(Launch(self.kernel, grid[0], arguments, options))

            return launch

    with monkeypatch.context() as patch:
        for name in (*STREAMS, *COMBINING):
            patch.setattr(ghost_kernels, name, Recorder(getattr(ghost_kernels, name)))
        patch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
        yield made


def run_on(
    device: str, ghosts: int, channels: int, side: int, dtype: torch.dtype, samples: int = 32, kind: str = PLAIN
) -> None:
    """Launch the kernels of a forward and backward pass over arbitrary values."""
    from lars_train.models import ghost_launch

    x = torch.empty(ghosts * samples, channels, side, side, dtype=dtype, device=device).contiguous(memory_format=LAST)
    weight = torch.empty(channels, device=device)
    shortcut, relu = x if kind == SHORTCUT else None, kind != PLAIN
    totals = (x.new_empty(2, channels, dtype=torch.float32), x.new_empty(1, dtype=torch.float32))
    output, *moments = ghost_launch.normalize(
        x, weight, weight, ghosts, EPS, shortcut=shortcut, relu=relu, totals=totals
    )
    output_or_none = None if shortcut is None else output
    ghost_launch.gradients(x, x, weight, weight, *moments, EPS, output=output_or_none, relu=relu)


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


def passes_of(launch: Launch, capability: int) -> tuple[float, float]:
    """Compile a kernel that streams activations, and return its passes: those that read and those that write.

    Also check that its loop over tiles makes 16-byte accesses only, and rounds half precision to the nearest.
    """
    made = compiled(launch, capability)
    assert len(made.asm["cubin"]) > 1000
    # Offsets of values have 64 bits.
    assert re.search(r"arith\.muli .*: i64", made.asm["ttir"])
    # The other loop of `_normalize`, over the ghost batches, reads statistics.
    loop = "".join(block for block in _loops(made.asm["ptx"]) if ".v4.b32" in block)
    dtype = launch.arguments[0].dtype
    # Rounded to nearest, and once; the interpreter only truncates.
    if dtype != torch.float32 and "st.global" in loop:
        assert set(re.findall(r"cvt\.(r\w)\.b?f16", loop)) == {"rn"}
    accesses = re.findall(r"\b((?:ld|st|cp)\.(?:global|async)\S*)", loop)
    assert {re.sub(r"\.L\d::\w+", "", a) for a in accesses} <= {"ld.global.v4.b32", "st.global.v4.b32"}
    *_, rows, columns = launch.arguments
    whole = rows * columns * dtype.itemsize / (32 * launch.options["num_warps"] * 16)
    reads, writes = (sum(a.startswith(kind) for a in accesses) / whole for kind in ("ld", "st"))
    return reads, writes


def _loops(ptx: str) -> list[str]:
    """Return the basic blocks that branch back to their own beginning."""
    blocks = re.split(r"^(\$\w+):", ptx, flags=re.MULTILINE)
    pairs = zip(blocks[1::2], blocks[2::2], strict=True)
    return [block for label, block in pairs if re.search(rf"bra(\.uni)?\s+\{label};", block)]
