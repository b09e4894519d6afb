"""The operations, the bytes and the saved activations of ResNet-50's training step on a GPU, counted without one.

The kernels are recorded instead of run, so the values are arbitrary. 2 images of 32 pixels have 1/784 of the values of
32 images of 224 pixels in every layer.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ghost_cases import LAST, Launch, recorded
from tape import computes
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models
from torchvision.models.resnet import Bottleneck

from lars_train.models import ghost_norm as dispatch
from lars_train.models.batchnorm import GhostBatchNorm2d, RunningStatistics
from lars_train.models.factory import build_model
from lars_train.models.fused_blocks import fuse_blocks, without_fusing
from lars_train.preflight.devices import _OPERATIONS_OF_UPDATE, DEVICES

pytest.importorskip("triton")

IMAGES, SIZE = 2, 32
# Reads and writes of every value: those of the operations are by definition, those of the kernels are compared with
# their compiled loads and stores in test_fused_kernels.py.
PASSES = {"aten::relu_": 2, "aten::threshold_backward": 3, "aten::add_.Tensor": 3}
PASSES |= {"aten::native_batch_norm": 3, "aten::native_batch_norm_backward": 5}
PASSES |= {"_chunk_moments": 1, "_normalize": 2, "_chunk_sums": 2, "_input_gradient": 3}

OTHERS = {f"aten::{name}" for name in ("convolution", "convolution_backward", "add.Tensor", "mean.dim", "div.Scalar")}
OTHERS |= {f"aten::{name}" for name in ("max_pool2d_with_indices", "max_pool2d_with_indices_backward", "as_strided_")}


class Step(TorchDispatchMode):
    """The operations of a step that compute, and the values that batch norm, ReLU and sums with shortcuts move."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.others: set[str] = set()
        """Operations with activations among their arguments, other than those that are counted in `moved`."""
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if computes(func):
            self.operations[name] += 1
            if name in PASSES and args[0].ndim == 4:
                self.moved += PASSES[name] * args[0].numel()
            elif any(isinstance(value, Tensor) and value.ndim == 4 for value in args):
                self.others.add(name)
        return func(*args, **(kwargs or {}))

    def add(self, launches: list[Launch]) -> None:
        self.operations.update(launch.name for launch in launches)
        for launch in launches:
            arguments = dict(zip((p.name for p in launch.kernel.params), launch.arguments, strict=True))
            # A shortcut is read; an output is read, and the gradient before its ReLU is written.
            more = sum(arguments.get(name) is not None for name in ("shortcut", "output", "unmasked"))
            passes = PASSES.get(launch.name, 0)
            self.moved += (passes + more) * launch.arguments[0].numel() if passes else 0


@contextmanager
def as_on_a_gpu(fused: bool, graphed: bool, images: int = 32, keep: bool = True) -> Iterator[list[Launch]]:
    """Choose and record the kernels as for ghost batches of this many images of 224 pixels; see `recorded`."""

    def is_looped(_: object, input: Tensor, ghosts: int) -> bool:
        return ghosts == 1 and not dispatch.is_faster_for_single_ghost(input)

    with (
        pytest.MonkeyPatch.context() as patch,
        recorded(patch, keep) as launches,
        nullcontext() if fused else without_fusing(),
        dispatch.launches_are_free() if graphed else nullcontext(),
    ):
        patch.setattr(dispatch, "_is_supported", lambda input: input.is_contiguous(memory_format=LAST))
        patch.setattr(dispatch, "_disabled", [])
        patch.setattr(dispatch, "LARGE", dispatch.LARGE * IMAGES * SIZE**2 // (images * 224**2))
        patch.setattr(GhostBatchNorm2d, "_is_looped", is_looped)
        yield launches
        assert dispatch._disabled == []


def resnet_50() -> nn.Module:
    with torch.device("meta"):
        network = build_model("resnet50", num_classes=10, ghost_batch=IMAGES, zero_gamma=True)
    fuse_blocks(network)
    network = network.to_empty(device="cpu").to(memory_format=LAST)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.zero_()
    return network


def batch(ghosts: int) -> tuple[Tensor, Tensor]:
    images = torch.zeros(ghosts * IMAGES, 3, SIZE, SIZE).contiguous(memory_format=LAST)
    return images, torch.zeros(len(images), dtype=torch.long)


@functools.cache
def step(ghosts: int, fused: bool = True, graphed: bool = False, images: int = 32, half: bool = False) -> Step:
    """Return the forward and backward pass of a micro-batch, as CUDA graphs record it if `graphed`.

    No test changes it. `images`: per ghost batch; `half`: with autocast to bfloat16.
    """
    network, (given, labels) = resnet_50(), batch(ghosts)
    statistics = RunningStatistics(network, collected=True)
    with as_on_a_gpu(fused, graphed, images) as launches, Step() as made:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = network(given)
        torch.autograd.backward(functional.cross_entropy(logits.float(), labels) * 0.5)
        statistics.collect()
    made.add(launches)
    return made


def count_operations(ghosts: int, **options: Any) -> int:
    return step(ghosts, **options).operations.total() + _OPERATIONS_OF_UPDATE


def memory_after(forward: Callable[[Tensor], Tensor], images: Tensor) -> int:
    """Return the bytes that a forward pass has allocated and not freed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = forward(images)
    assert output.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.events())


def bare_loop() -> Step:
    """Return an update of torchvision's network with its own batch norm and fused SGD."""
    network = models.resnet50(num_classes=10).to(memory_format=LAST)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=True)
    images, labels = batch(1)
    for _ in range(2):  # the first update also makes the momentum buffers
        with Step() as made:
            loss = functional.cross_entropy(network(images), labels)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return made


# Before fusing: 559 and 824.
@pytest.mark.parametrize(("ghosts", "graphed", "most"), [(1, False, 415), (4, False, 560), (1, True, 510)])
def test_resnet_50_takes_few_operations(ghosts: int, graphed: bool, most: int) -> None:
    operations = step(ghosts, graphed=graphed).operations
    # The step is complete.
    assert operations["aten::convolution_backward"] == operations["aten::convolution"] == 53
    # A single ghost batch takes torch's batch norm and ReLU where the kernels would take the host longer.
    alone = 48 if ghosts == 1 and not graphed else 0
    assert operations["aten::native_batch_norm"] == operations["aten::native_batch_norm_backward"] == alone
    assert operations["_normalize"] == operations["_input_gradient"] == 53 - alone
    # Of the 5 large layers, one is the convolution of a shortcut, which no ReLU follows.
    assert operations["aten::relu_"] == operations["aten::threshold_backward"] == (49 - 4 if alone else 0)
    assert 400 < count_operations(ghosts, graphed=graphed) <= most
    assert not operations.keys() & {"aten::clone", "aten::_to_copy"}


def test_norms_relus_and_sums_move_at_most_seven_tenths() -> None:
    apart, fused, graphed = step(4, fused=False), step(4), step(1, graphed=True)
    # The page counts the convolutions and the sums of gradients (add), and names the others, which are small.
    assert apart.others == fused.others == OTHERS
    assert apart.operations["aten::relu_"] == apart.operations["aten::threshold_backward"] == 49
    assert 0.6 < fused.moved / apart.moved <= 0.70
    # 13 passes become 8 without a shortcut, 16 become 11 with one.
    values = count_outputs(SIZE)
    scale = 4 * IMAGES
    assert apart.moved == scale * (13 * values["relu"] + 16 * values["sum"] + 8 * values["none"])
    assert fused.moved == scale * (8 * values["relu"] + 11 * values["sum"] + 8 * values["none"])
    assert graphed.moved == fused.moved / 4


def count_outputs(size: int) -> Counter[str]:
    """Count an image's outputs of batch norm before a ReLU, a sum, and none of them; inputs of convolutions, blocks."""
    values = Counter[str]()

    def count(kind: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        values[kind] += output.numel()
        if isinstance(module, nn.Conv2d):
            values["inputs"] += inputs[0].numel()

    with torch.device("meta"):
        network = build_model("resnet50", num_classes=10, ghost_batch=IMAGES, zero_gamma=True).eval()
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            kind = "sum" if name.endswith("bn3") else "none" if "downsample" in name else "relu"
            module.register_forward_hook(functools.partial(count, kind))
        elif isinstance(module, nn.Conv2d):
            module.register_forward_hook(functools.partial(count, "outputs"))
        elif isinstance(module, Bottleneck):
            module.register_forward_pre_hook(lambda _, inputs: values.update(blocks=inputs[0].numel()))
    with torch.no_grad():
        network(torch.zeros(1, 3, size, size, device="meta"))
    return values


def test_the_page_has_the_counted_operations_bytes_and_bounds() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gpu_notes.md").read_text()
    values = count_outputs(224)
    others = 6 * (values["inputs"] + values["outputs"] + values["blocks"])
    passes = ((13, 16), (8, 11))
    moved = [2 * (one * values["relu"] + other * values["sum"] + 8 * values["none"]) for one, other in passes]
    in_all = [amount + others for amount in moved]
    memory = DEVICES["h100"].memory
    counts = [count_operations(ghosts) for ghosts in (1, 4)]
    unfused = [count_operations(ghosts, fused=False) for ghosts in (1, 4)]
    of_images = [count_operations(1, images=images) for images in (64, 128, 256)]
    graphed = step(1, graphed=True).operations.total()
    percents = [
        100 * step(1, images=images).moved / step(1, fused=False, images=images).moved for images in (32, 64, 128, 256)
    ]
    for ghosts, fused in itertools.product((1, 4), (True, False)):
        assert count_operations(ghosts, fused=fused, half=True) - count_operations(ghosts, fused=fused) == 113
    for row in (
        f"but without fusing, there are {unfused[0]} and {unfused[1]} operations.",
        "256 images**: {}, {} or {} operations, because".format(*of_images),
        f"`cuda_graphs=true` {count_operations(1, graphed=True)}, of which a graph launches {graphed} at once.",
        "only large layers are fused, these passes move {:.0f}, {:.0f}, {:.0f} or {:.0f} % of".format(*percents),
        f"(a bare loop with fused SGD: {bare_loop().operations.total()}) | 559 | {counts[0]} |",
        f"four ghost batches per micro-batch | 824 | {counts[1]} |",
        f"these passes move | {moved[0] / 1e6:.0f} MB | {moved[1] / 1e6:.0f} MB |",
        f"sums of gradients | {in_all[0] / 1e6:.0f} MB | {in_all[1] / 1e6:.0f} MB |",
        f"at {memory / 1e12:g} TB/s | {memory / in_all[0]:,.0f} | {memory / in_all[1]:,.0f} |",
    ):
        assert row in page


@pytest.mark.parametrize(("ghosts", "graphed"), [(1, False), (4, False), (1, True)])
def test_fusing_keeps_no_more_memory_for_the_backward_pass(ghosts: int, graphed: bool) -> None:
    images, _ = batch(ghosts)
    # torchvision's ReLU works in place, too. Its batch norm keeps one mean and variance, and not one per ghost batch.
    plain = memory_after(models.resnet50(num_classes=10).to(memory_format=LAST), images)
    more = (ghosts - 1) * 2 * 4 * sum(layer.num_features for layer in norms(resnet_50()))
    with as_on_a_gpu(fused=True, graphed=graphed, keep=False):
        network = resnet_50()
        RunningStatistics(network, collected=True)
        fused = memory_after(network, images)
    assert 0.9 * plain < fused <= plain + more


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
