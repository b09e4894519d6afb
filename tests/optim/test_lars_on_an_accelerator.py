"""A step on fake CUDA tensors makes few calls, all on torch's fast path, and never waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lars_train.models.factory import build_model
from lars_train.optim.lars import LARS

# The shapes of ResNet-50's parameters, 161 tensors.
SHAPES = [p.shape for p in build_model("resnet50", num_classes=1000, ghost_batch=32, zero_gamma=False).parameters()]
# FakeTensor calls these itself; they do not reach a device.
_NO_CALLS = ("prim::", "profiler::", "aten::promote_types")
# Each returns a value, or a size that depends on values, to the host.
_WAITS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2")


class Calls(TorchDispatchMode):
    """The dispatched operators with their arguments.

    `to_host` has those that copy device values to the host, `from_host` those that read a CPU tensor for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[Any, ...]]] = []
        self.to_host: list[str] = []
        self.from_host: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.name().startswith(_NO_CALLS):
            self.made.append((func.name(), args))
        result = func(*args, **(kwargs or {}))
        given, got = ({t.device.type for t in tree_leaves(x) if isinstance(t, Tensor)} for x in (args, result))
        if "cuda" in given and "cpu" in got:
            self.to_host.append(func.name())
        if "cpu" in given and "cuda" in got:
            self.from_host.append(func.name())
        return result


@contextmanager
def on_cuda(shapes: Sequence[Any], **options: Any) -> Iterator[tuple[LARS, list[nn.Parameter]]]:
    """Yield LARS over SGD on fake CUDA tensors, after a first step has created the momentum buffers."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in shapes]
        base = torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=True)
        lars = LARS(base, **options)
        for p in params:
            p.grad = torch.empty_like(p)
        lars.step()
        yield lars, params


def calls_of_a_step(shapes: Sequence[Any], **options: Any) -> list[tuple[str, tuple[Any, ...]]]:
    with on_cuda(shapes, **options) as (lars, _), Calls() as calls:
        lars.step()
    return calls.made


def plain(name: str) -> str:
    return name.partition("::")[2].partition(".")[0]


def test_a_step_of_resnet50_makes_at_most_25_calls() -> None:
    assert len(SHAPES) == 161
    made = calls_of_a_step(SHAPES)
    assert 0 < len(made) <= 25, [name for name, _ in made]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": "lr"},
        {"zero_norm": "skip"},
        {"denominator": "combined"},
        {"lr_placement": "inside"},
        {"ratio_placement": "outside", "clamp": 10.0},
        {"ratio_of": "step"},
        {"record": True},
    ],
    ids=str,
)
def test_calls_do_not_grow_with_the_tensors(options: dict[str, Any]) -> None:
    few = [name for name, _ in calls_of_a_step(SHAPES[:7], **options)]
    assert few == [name for name, _ in calls_of_a_step(SHAPES, **options)]
    # The plan counts the step without options (preflight/devices.py), as does docs/gpu_notes.md.
    assert len(few) == 22 if not options else len(few) <= 35


@pytest.mark.parametrize(
    "options", [{}, {"clip": "lr", "zero_norm": "skip"}, {"ratio_of": "step"}, {"record": True}], ids=str
)
def test_no_call_waits_for_the_device(options: dict[str, Any]) -> None:
    with on_cuda(SHAPES, **options) as (lars, params), Calls() as calls:
        lars.step()
        lars.layers()
        assert calls.to_host == []
        assert not {plain(name) for name, _ in calls.made} & set(_WAITS)
        # Check that the counter counts.
        params[0].detach().cpu()
        assert calls.to_host == ["aten::_to_copy"]


CAPTURABLE: dict[str, Callable[[Any], LARS]] = {
    "SGD": lambda params: LARS(torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4)),
    "AdamW": lambda params: LARS(torch.optim.AdamW(params, capturable=True)),
    "lamb": lambda params: LARS.preset("lamb", torch.optim.AdamW(params, capturable=True)),
}


@pytest.mark.parametrize("make", CAPTURABLE.values(), ids=CAPTURABLE)
def test_a_cuda_graph_can_capture_a_step(make: Callable[[Any], LARS]) -> None:
    # https://docs.pytorch.org/docs/stable/notes/cuda.html#constraints: the same calls and tensors in every replay,
    # nothing copied to or from the host.
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in SHAPES[:7]]
        lars = make(params)
        if "capturable" in lars.defaults:
            # A tensor, so that replays use its current value. The constructor would read it.
            lars.param_groups[0]["lr"] = torch.ones((), device="cuda")
        for p in params:
            p.grad = torch.empty_like(p)

        def tensors() -> list[int]:
            states = [t for own in lars.state.values() for t in own.values() if isinstance(t, Tensor)]
            return [id(t) for t in (*params, *(p.grad for p in params), *states)]

        lars.step()
        before, made = tensors(), []
        for _ in range(2):
            with Calls() as calls:
                lars.step()
            assert calls.to_host == calls.from_host == []
            assert not {plain(name) for name, _ in calls.made} & set(_WAITS)
            made.append([name for name, _ in calls.made])
        assert tensors() == before
        assert made[0] == made[1]
        with Calls() as calls:
            params[0].detach().copy_(torch.zeros(params[0].shape))
        assert calls.from_host == ["aten::copy_"]  # the counter counts


@pytest.mark.parametrize("preset", ["torchlars", "larc", "mlperf"])
def test_lars_over_sgd_leaves_an_lr_on_the_device(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # SGD's fused step takes such an lr, but has no kernel for fake tensors.
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure=None: None)
    with on_cuda(SHAPES[:7]) as (lars, params):
        lars = LARS.preset(preset, lars.base_optimizer)
        lars.param_groups[0]["lr"] = torch.ones((), device="cuda")
        with Calls() as calls:
            lars.step()
        assert calls.to_host == calls.from_host == []
        assert calls.made
        assert params[0].grad is not None


def test_every_call_over_lists_is_on_the_multi_tensor_fast_path() -> None:
    # check_fast_path_restrictions in torch's include/ATen/native/ForeachUtils.h: at each position of the lists the
    # same device, dtype, sizes and strides; dense memory. 0-D factors: foreach_pointwise_op_0d_tensor1_ in
    # aten/src/ATen/native/cuda/ForeachPointwiseOp.cu, for addcmul and addcdiv alone.
    seen = set()
    for name, args in calls_of_a_step(SHAPES):
        if "_foreach_" not in name:
            continue
        seen.add(name)
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
        if "addcmul" in name:
            factors = lists.pop(1)
            assert {t.dim() for t in factors} == {0}
            assert {(t.dtype, t.device) for t in factors} == {(t.dtype, t.device) for t in lists[0]}
            # Four elements of any list are loaded at once if it is aligned for that (kILP, ForeachFunctors.cuh).
            assert {t.storage_offset() % 4 for t in factors} == {0}
        first = lists[0]
        assert len({(t.dtype, t.device) for t in first}) == 1
        for other in lists:
            for a, b in zip(first, other, strict=True):
                assert (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())
        # A list of scalars, one per tensor, would have to come from the host.
        assert not any(isinstance(a, (list, tuple)) and a and isinstance(a[0], float) for a in args)
    assert {plain(name) for name in seen} == {
        "_foreach_norm",
        "_foreach_add",
        "_foreach_zero_",
        "_foreach_addcmul_",
        "_foreach_mul_",
        "_foreach_add_",
    }


def test_no_copy_of_gradients_or_weights_outlives_the_step() -> None:
    with on_cuda(SHAPES) as (lars, params):
        before = [id(p.grad) for p in params]
        lars.step()
        assert [id(p.grad) for p in params] == before
        kept = [t for own in lars.state.values() for t in own.values() if isinstance(t, Tensor)]
        assert len(kept) == len(params)  # SGD's momentum
        assert not any(isinstance(value, (Tensor, list)) for value in vars(lars).values())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fused", [False, True])
def test_cuda_agrees_with_the_cpu_and_can_be_captured_in_a_graph(fused: bool) -> None:
    torch.manual_seed(0)
    shapes = [(64, 3, 7, 7), (64,), (10, 64), (10,)]
    weights = [torch.randn(s) for s in shapes]
    grads = [torch.randn(s) for s in shapes]

    def optimizer(device: str, **how: Any) -> tuple[LARS, list[nn.Parameter]]:
        params = [nn.Parameter(w.clone().to(device)) for w in weights]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone().to(device)
        return LARS(torch.optim.SGD(params, lr=2.0, momentum=0.9, weight_decay=5e-4, **how)), params

    host, expected = optimizer("cpu")
    device, params = optimizer("cuda", fused=fused, foreach=not fused)
    held = [g.to("cuda") for g in grads]

    def step() -> None:
        torch._foreach_copy_([p.grad for p in params], held)
        device.step()

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(4):
        graph.replay()
    for _ in range(5):
        host.step()
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().cpu(), e.detach(), rtol=1e-4, atol=1e-6)
