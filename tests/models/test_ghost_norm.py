"""Ghost batch norm without a loop, as on accelerators, against torch's batch norm of each ghost batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lars_train.models.batchnorm import GhostBatchNorm2d, RunningStatistics
from lars_train.models.ghost_norm import ghost_norm

CHANNELS, GHOSTS, EPS = 5, 4, 1e-5
LAYOUTS = [torch.contiguous_format, torch.channels_last]
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def at_once(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ghost_norm(x, weight, bias, ghosts=GHOSTS, eps=EPS)


def in_a_loop(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    parts = [functional.batch_norm(p, None, None, weight, bias, training=True, eps=EPS) for p in x.chunk(GHOSTS)]
    return torch.cat(parts)


def operands(dtype: torch.dtype, layout: torch.memory_format, offset: float = 1.0) -> list[Tensor]:
    """Return input, weight, bias and the gradient of the output; weight and bias are at least float32."""
    draw = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x, grad = (torch.randn(12, CHANNELS, 7, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.rand(CHANNELS, generator=draw, dtype=wide) + 0.5 for _ in range(2))
    # Every channel has a different mean and spread.
    scale = torch.linspace(0.5, 2, CHANNELS, dtype=torch.float64).view(-1, 1, 1)
    x, grad = (t.to(dtype).contiguous(memory_format=layout) for t in (x * scale + offset, grad))
    return [x, weight, bias, grad]


def results(norm: Norm, given: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the output and the gradients of input, weight and bias, computed in `dtype` if it is given."""
    x, weight, bias, grad = (t.detach().to(dtype or t.dtype) for t in given)
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    out = norm(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def largest_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest value."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_agrees_with_a_loop_over_slices(layout: torch.memory_format) -> None:
    given = operands(torch.float64, layout)
    for got, expected in zip(results(at_once, given), results(in_a_loop, given), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# A unit in the last place times the rounding errors of a sum of 126 values per ghost batch. An input whose mean is 50
# times its spread loses six more bits, as in torch's kernels.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("offset", "bound"), [(1.0, 1e-6), (50.0, 3e-5)])
def test_float32_is_close_to_the_float64_loop(layout: torch.memory_format, offset: float, bound: float) -> None:
    given = operands(torch.float32, layout, offset)
    for got, expected in zip(results(at_once, given), results(in_a_loop, given, torch.float64), strict=True):
        assert got.dtype == torch.float32
        assert largest_error(got, expected) < bound


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_when_stored(dtype: torch.dtype, offset: float, layout: torch.memory_format) -> None:
    given = operands(dtype, layout, offset)
    out, grad_input, grad_weight, grad_bias = results(at_once, given)
    expected = results(in_a_loop, given, torch.float64)
    unit = torch.finfo(dtype).eps
    assert (out.dtype, grad_input.dtype, grad_weight.dtype, grad_bias.dtype) == (dtype, dtype, *[torch.float32] * 2)
    # Half a unit; the input's gradient is rounded twice. Output and gradients vary in size by less than a factor of 2.
    assert largest_error(out, expected[0]) < 0.51 * unit
    assert largest_error(grad_input, expected[1]) < 0.8 * unit
    # bfloat16's products are rounded by up to two units each, independently, and 504 of them are summed.
    assert largest_error(grad_weight, expected[2]) < (2 * unit if dtype == torch.bfloat16 else 1e-5)
    assert largest_error(grad_bias, expected[3]) < 1e-5


def test_float16_products_beyond_its_range_are_summed() -> None:
    given = operands(torch.float16, torch.channels_last)
    given[0] *= 30
    given[3] *= 8000
    expected = results(in_a_loop, given, torch.float64)
    assert float((given[0] * given[3]).abs().max()) == torch.inf
    assert largest_error(results(at_once, given)[2], expected[2]) < 1e-5


def test_the_weight_gradient_uses_the_mean_in_float32() -> None:
    given = operands(torch.bfloat16, torch.channels_last, offset=20.3)
    given[3] = (given[3] + 8).contiguous(memory_format=torch.channels_last)
    expected = results(in_a_loop, given, torch.float64)[2]
    # Rounding a mean of 20 changes it by up to 1/16; with the sum of 504 gradients of 8 that is at most 250.
    assert float((results(at_once, given)[2] - expected).abs().max()) < 10


def test_gradients_agree_with_finite_differences() -> None:
    x, weight, bias, _ = operands(torch.float64, torch.channels_last)
    x = x[:, :2, :2, :2].contiguous(memory_format=torch.channels_last)
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight[:2], bias[:2])]
    assert torch.autograd.gradcheck(at_once, leaves)
    assert torch.autograd.gradcheck(lambda x: ghost_norm(x, None, None, ghosts=GHOSTS, eps=EPS), leaves[:1])


def test_a_weight_of_zero_has_a_gradient() -> None:
    given = operands(torch.float64, torch.channels_last)
    given[1][:2] = 0
    for got, expected in zip(results(at_once, given), results(in_a_loop, given), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_channels_last_stays_channels_last(dtype: torch.dtype) -> None:
    given = operands(dtype, torch.channels_last)
    out, grad_input, *_ = results(at_once, given)
    for tensor in (out, grad_input):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()
    # A gradient may have another format, or be expanded, as that of a mean over the pixels.
    bound = 1e-6 if dtype == torch.float32 else 0.8 * torch.finfo(dtype).eps
    for grad in (given[3].contiguous(), given[3][:, :, :1, :1].expand(given[3].shape)):
        given[3] = grad
        got = results(at_once, given)
        assert got[1].is_contiguous(memory_format=torch.channels_last)
        assert not got[1].is_contiguous()
        assert largest_error(got[1], results(in_a_loop, given, torch.float64)[1]) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_backward_pass_keeps_only_input_and_statistics(
    dtype: torch.dtype,
) -> None:
    x, weight, bias, _ = operands(dtype, torch.channels_last)
    x.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        at_once(x, weight.requires_grad_(), bias)
    own = [t for t in kept if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert len(kept) == 4
    assert [t.numel() for t in own] == [GHOSTS * CHANNELS] * 2


class Calls(TorchDispatchMode):
    """The dispatched operators, those that copy values to the host, and the dtypes of results with `size` values."""

    def __init__(self, size: int = 0) -> None:
        super().__init__()
        self.size = size
        self.made: list[str] = []
        self.to_host: list[str] = []
        self.large: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.name().startswith(("prim::", "profiler::", "aten::promote_types")):
            self.made.append(func.name())
        result = func(*args, **(kwargs or {}))
        given, got = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), result))
        if any(t.device.type == "cuda" for t in given) and any(t.device.type == "cpu" for t in got):
            self.to_host.append(func.name())
        self.large |= {t.dtype for t in got if t.numel() == self.size}
        return result


@pytest.mark.parametrize(("affine", "biased"), [(True, True), (True, False), (False, False)])
def test_a_layer_without_the_loop_has_the_same_results(
    affine: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GhostBatchNorm2d, "_is_looped", lambda *_: False)
    layer = GhostBatchNorm2d(CHANNELS, ghost_batch=3, affine=affine, dtype=torch.float64)
    plain = nn.BatchNorm2d(CHANNELS, affine=affine, dtype=torch.float64)
    if not biased:
        layer.bias = plain.bias = None  # type: ignore[assignment]
    x, *_, grad = operands(torch.float64, torch.channels_last)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = layer(a), torch.cat([plain(p) for p in b.split(3)])
    got.backward(grad)
    expected.backward(grad)
    RunningStatistics(layer).update()
    rows = x.unflatten(0, (4, 3)).transpose(1, 2).flatten(2)
    state = layer.state_dict()
    pairs = [
        (got, expected),
        (a.grad, b.grad),
        (state["running_mean"], 0.1 * rows.mean(2).mean(0)),
        (state["running_var"], 0.9 + 0.1 * rows.var(2, correction=1).mean(0)),
        *((p.grad, q.grad) for p, q in zip(layer.parameters(), plain.parameters(), strict=True)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_autocast_makes_no_float32_copy_of_bfloat16_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GhostBatchNorm2d, "_is_looped", lambda *_: False)
    layer = GhostBatchNorm2d(CHANNELS, ghost_batch=3)
    x, *_, grad = operands(torch.bfloat16, torch.channels_last)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16), Calls(x.numel()) as calls:
        out = layer(x)
        out.backward(grad)
    assert out.dtype == torch.bfloat16
    assert calls.large == {torch.bfloat16}
    assert layer.ghost_sums.dtype == torch.float32
    assert largest_error(
        out.detach(), in_a_loop(x.detach().double(), torch.ones(CHANNELS).double(), torch.zeros(CHANNELS).double())
    ) < (0.51 * torch.finfo(torch.bfloat16).eps)


def calls_on_cuda(ghosts: int, dtype: torch.dtype) -> Calls:
    """Return the calls of a layer's forward and backward pass over fake CUDA tensors in channels_last."""
    with FakeTensorMode():
        layer = GhostBatchNorm2d(64, ghost_batch=4, device="cuda")
        x = torch.empty(4 * ghosts, 64, 8, 8, device="cuda", dtype=dtype, requires_grad=True)
        x = x.contiguous(memory_format=torch.channels_last)
        grad = torch.empty_like(x)
        with Calls(x.numel()) as calls:
            node = layer(x).grad_fn
            # The engine that runs a graph of CUDA tensors needs a driver; a single node does not.
            with torch.no_grad():
                given = (grad, None, None) if ghosts > 1 else (grad,)
                gradients = getattr(node, "apply", node)(*given)
            assert gradients[0].shape == x.shape
            assert gradients[0].is_contiguous(memory_format=torch.channels_last)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_calls_do_not_grow_with_the_ghost_batches(dtype: torch.dtype) -> None:
    names = calls_on_cuda(2, dtype).made
    assert names == calls_on_cuda(64, dtype).made
    kernels = [name for name in names if not name.startswith(("aten::view", "aten::_unsafe_view", "aten::detach"))]
    assert 10 < len(kernels) <= 50, kernels


@pytest.mark.parametrize("ghosts", [1, 8])
def test_no_call_waits_for_the_device(ghosts: int) -> None:
    calls = calls_on_cuda(ghosts, torch.bfloat16)
    assert calls.to_host == []
    assert not [name for name in calls.made if any(w in name for w in ("_local_scalar_dense", "nonzero", "equal"))]
    with FakeTensorMode(), Calls() as counter:
        torch.ones(2, device="cuda").cpu()
    assert counter.to_host == ["aten::_to_copy"]


def test_one_ghost_batch_on_cuda_uses_torchs_batch_norm() -> None:
    def norms(ghosts: int) -> list[str]:
        return [name for name in calls_on_cuda(ghosts, torch.float32).made if "batch_norm" in name]

    assert len(norms(1)) == 2
    assert norms(2) == []


def test_torch_compile_makes_one_graph_with_the_same_results() -> None:
    given = operands(torch.bfloat16, torch.channels_last)
    compiled = torch.compile(at_once, backend="aot_eager", fullgraph=True)
    expected = results(in_a_loop, given, torch.float64)
    unit = torch.finfo(torch.bfloat16).eps
    for got, exact, bound in zip(
        results(compiled, given), expected, (0.51 * unit, 0.8 * unit, 1e-5, 1e-5), strict=True
    ):
        assert largest_error(got, exact) < bound


def test_what_kernels_do_not_check_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(4, 3, 2, 2)
    with pytest.raises(ValueError, match="a shortcut without relu=True"):
        ghost_norm(x, None, None, ghosts=2, eps=1e-5, shortcut=x)
    monkeypatch.setattr(GhostBatchNorm2d, "_is_looped", lambda *_: False)
    with pytest.raises(ValueError, match="an input of 3 channels; this layer has 8"):
        GhostBatchNorm2d(8, ghost_batch=2)(x)


def test_a_single_value_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 ghost batches .* more than 1 value per channel"):
        ghost_norm(torch.zeros(4, 3, 1, 1), None, None, ghosts=4, eps=EPS)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_agrees_with_the_float64_loop_without_waiting(dtype: torch.dtype, layout: torch.memory_format) -> None:
    given = operands(dtype, layout)
    expected = results(in_a_loop, given, torch.float64)
    on_device = [t.to("cuda") for t in given]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = results(at_once, on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    unit = torch.finfo(dtype).eps
    bounds = (8, 8, 8, 8) if dtype in (torch.float32, torch.float64) else (0.6, 0.9, 2, 0.1)
    for ours, exact, bound in zip(got, expected, bounds, strict=True):
        assert largest_error(ours.cpu(), exact) < bound * unit


def test_the_output_may_be_modified_in_place() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    gradients = []
    for in_place in (True, False):
        leaf = x.clone().requires_grad_()
        output = ghost_norm(leaf, None, None, ghosts=4, eps=1e-5)
        (functional.relu(output, inplace=in_place) * x).sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
