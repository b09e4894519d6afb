"""Blocks with fused batch norm give the results of the blocks they replace, and fuse only what they may."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from lars_train.models import ghost_norm as dispatch
from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.convert import freeze, use_ghost_batch_norm
from lars_train.models.fused_blocks import fuse_blocks, without_fusing
from lars_train.models.resnet_cifar import BasicBlock as CifarBlock
from lars_train.models.resnet_cifar import CifarResNet

GHOST, WIDTH = 2, 8


def norm(channels: int) -> nn.Module:
    return GhostBatchNorm2d(channels, ghost_batch=GHOST)


def downsample(channels: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(WIDTH, channels, 1, stride, bias=False), norm(channels))


def network_of_one_block() -> nn.Module:
    network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3, norm_layer=norm)
    network.layer2 = network.layer3 = network.layer4 = nn.Sequential()
    network.fc = nn.Linear(64, 3)
    return network


def timm_block(name: str, **options: Any) -> nn.Module:
    resnet = pytest.importorskip("timm.models.resnet")
    block: nn.Module = getattr(resnet, name)(WIDTH, WIDTH // getattr(resnet, name).expansion, **options)
    use_ghost_batch_norm(block, GHOST)
    return block


def blur(channels: int, stride: int, **_: Any) -> nn.Module:
    return nn.AvgPool2d(3, stride, padding=1)


# The network or block, and the number of fused operations.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "torchvision, basic": (lambda: BasicBlock(WIDTH, WIDTH, norm_layer=norm), 2),
    "torchvision, basic, strided": (lambda: BasicBlock(WIDTH, 16, 2, downsample(16, 2), norm_layer=norm), 2),
    "torchvision, bottleneck": (lambda: Bottleneck(WIDTH, WIDTH // 4, norm_layer=norm), 3),
    "torchvision, bottleneck, strided": (lambda: Bottleneck(WIDTH, 4, 2, downsample(16, 2), norm_layer=norm), 3),
    "torchvision, network": (network_of_one_block, 3),
    "cifar": (lambda: CifarBlock(WIDTH, WIDTH, 1, norm), 2),
    "cifar, strided": (lambda: CifarBlock(WIDTH, 16, 2, norm), 2),
    "cifar, network": (lambda: CifarResNet(1, num_classes=3, norm_layer=norm), 7),
    "timm, basic": (lambda: timm_block("BasicBlock"), 2),
    "timm, basic, blurred": (lambda: timm_block("BasicBlock", stride=2, aa_layer=blur, downsample=downsample(8, 2)), 2),
    "timm, bottleneck": (lambda: timm_block("Bottleneck"), 3),
}
UNFUSED: dict[str, Callable[[], nn.Module]] = {
    "timm, attention": lambda: timm_block("Bottleneck", attn_layer="se"),
    "timm, drop path": lambda: timm_block("BasicBlock", drop_path=nn.Dropout(0.0)),
    "timm, drop block": lambda: timm_block("BasicBlock", drop_block=lambda: nn.Dropout(0.0)),
    "timm, another activation": lambda: timm_block("Bottleneck", act_layer=nn.SiLU),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    block = BLOCKS[name][0]() if name in BLOCKS else UNFUSED[name]()
    for tensor in block.parameters():
        nn.init.uniform_(tensor, -1, 1)
    return block.to(memory_format=torch.channels_last).train()


def images(block: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    channels = 3 if isinstance(block, ResNet | CifarResNet) else WIDTH
    return torch.randn(3 * GHOST, channels, 8, 8, generator=draw).contiguous(memory_format=torch.channels_last)


def results(block: nn.Module, layout: torch.memory_format = torch.channels_last) -> dict[str, Tensor]:
    """Return the output, the gradients, and the sums of the statistics."""
    x = images(block).to(next(block.parameters()).dtype).contiguous(memory_format=layout).requires_grad_()
    # As behind a convolution: an input in channels_last that is not a leaf.
    output = block(x * 1.0)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    torch.autograd.backward(output, grad)
    assert x.grad is not None
    made = {"output": output.detach(), "input": x.grad}
    made |= {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return made | {name: b.clone() for name, b in block.named_buffers() if "ghost" in name}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let float32 in channels_last fuse, with torch's operations; return a list that grows with each fused operation.

    Its entries are True with a shortcut.
    """
    made: list[bool] = []

    def supports(input: Tensor) -> bool:
        return input.dtype == torch.float32 and input.is_contiguous(memory_format=torch.channels_last)

    def call(function: str, input: Tensor, *arguments: Any, **options: Any) -> None:
        if function == "normalize" and options["relu"]:
            made.append(options["shortcut"] is not None)

    monkeypatch.setattr(dispatch, "_is_supported", supports)
    monkeypatch.setattr(dispatch, "_call_kernel", call)
    return made


@pytest.mark.parametrize("name", BLOCKS)
def test_fused_blocks_have_the_results_of_unfused_ones(fused: list[bool], name: str) -> None:
    block = make(name)
    with without_fusing():
        expected = results(copy.deepcopy(block))
    assert fused == []
    fuse_blocks(block)
    got = results(block)
    assert len(fused) == BLOCKS[name][1]
    assert any(fused)
    assert got.keys() == expected.keys()
    for key, exact in expected.items():
        torch.testing.assert_close(got[key], exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()), msg=key)


# The networks of this package have no unfused form; scripts/verify/same_weights.py compares them with earlier versions.
@pytest.mark.parametrize("name", [name for name in BLOCKS if not name.startswith("cifar")])
def test_without_kernels_blocks_have_bit_identical_results(name: str) -> None:
    block = make(name)
    expected = results(copy.deepcopy(block))
    fuse_blocks(block)
    got = results(block)
    assert all(torch.equal(got[key], exact) for key, exact in expected.items())


@pytest.mark.parametrize("name", UNFUSED)
def test_blocks_with_other_parts_stay_unchanged(fused: list[bool], name: str) -> None:
    block = make(name)
    kinds = [type(layer) for layer in block.modules()]
    fuse_blocks(block)
    assert [type(layer) for layer in block.modules()] == kinds
    results(block)
    assert fused == []


def test_fused_networks_have_the_same_names_and_copies(fused: list[bool]) -> None:
    block = make("torchvision, network")
    before, kinds = block.state_dict(), [type(layer) for layer in block.modules()]
    text = repr(block)
    fuse_blocks(block)
    fuse_blocks(block)
    assert repr(block) == text
    assert list(block.state_dict()) == list(before)
    assert all(isinstance(layer, kind) for layer, kind in zip(block.modules(), kinds, strict=True))
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert [type(layer) for layer in other.modules()] == [type(layer) for layer in block.modules()]
        del fused[:]
        results(other)
        assert len(fused) == 3
        assert all(mine is not other for mine, other in zip(block.parameters(), other.parameters(), strict=True))


def on_norm(block: nn.Module, hook: Callable[..., None]) -> Any:
    return block.bn2.register_forward_hook(hook)  # type: ignore[operator,union-attr]


def on_relu(block: nn.Module, hook: Callable[..., None]) -> Any:
    return block.relu.register_forward_pre_hook(hook)  # type: ignore[operator,union-attr]


def on_every_module(_: nn.Module, hook: Callable[..., None]) -> Any:
    return register_module_forward_hook(hook)


@pytest.mark.parametrize(("register", "left"), [(on_norm, 1), (on_relu, 0), (on_every_module, 0)])
def test_layers_with_hooks_are_called(fused: list[bool], register: Callable[..., Any], left: int) -> None:
    block = make("torchvision, basic")
    fuse_blocks(block)
    seen: list[object] = []
    handle = register(block, lambda layer, *_: seen.append(type(layer)))
    try:
        results(block)
    finally:
        handle.remove()
    assert {GhostBatchNorm2d, nn.ReLU}.intersection(seen)
    assert len(fused) == left


def test_replaced_forward_methods_are_called(fused: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    block = make("torchvision, basic")
    fuse_blocks(block)
    relu = block.get_submodule("relu")
    relu.forward = lambda x: x  # type: ignore[method-assign]
    results(block)
    assert fused == []
    patched = make("torchvision, basic")
    kind: Any = type(patched)
    for replaced in (lambda self, x: self.bn1(self.conv1(x)), functools.wraps(kind.forward)(lambda self, x: x)):
        monkeypatch.setattr(kind, "forward", replaced)
        fuse_blocks(patched)
        assert type(patched) is kind


def test_blocks_without_ghost_batch_norm_stay_unchanged() -> None:
    network = ResNet(Bottleneck, [1, 1, 1, 1], norm_layer=lambda channels: nn.GroupNorm(1, channels))
    kinds = [type(layer) for layer in network.modules()]
    fuse_blocks(network)
    assert [type(layer) for layer in network.modules()] == kinds


@pytest.mark.parametrize("name", ["cifar", "torchvision, basic"])
def test_a_hook_of_the_backward_pass_before_the_sum_is_called(fused: list[bool], name: str) -> None:
    block = make(name)
    fuse_blocks(block)
    expected = results(copy.deepcopy(block))
    seen: list[Tensor] = []
    block.get_submodule("bn2").register_full_backward_hook(lambda layer, given, grads: seen.append(grads[0]))
    got = results(block)
    assert len(seen) == 1
    assert fused == [False, True, False]
    torch.testing.assert_close(got["input"], expected["input"], rtol=1e-4, atol=1e-4)


def test_evaluation_frozen_layers_and_other_formats_do_not_fuse(fused: list[bool]) -> None:
    block = make("torchvision, basic")
    fuse_blocks(block)
    frozen = copy.deepcopy(block)
    freeze(frozen, ["bn2.*"])
    results(frozen)
    assert fused == [False]
    for other in (copy.deepcopy(block).eval(), copy.deepcopy(block).double()):
        del fused[:]
        results(other)
        assert fused == []
    results(block.to(memory_format=torch.contiguous_format), torch.contiguous_format)
    assert fused == []


class Transposed(nn.Module):
    """Images with rows and columns exchanged, which are not contiguous in channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3)


@pytest.mark.parametrize("other", [Transposed(), nn.AdaptiveAvgPool2d(1)])
def test_a_shortcut_of_another_layout_or_shape_is_not_fused(fused: list[bool], other: nn.Module) -> None:
    block = make("torchvision, basic")
    block.downsample = other
    expected = results(copy.deepcopy(block))
    del fused[:]
    fuse_blocks(block)
    got = results(block)
    assert fused == [False]
    assert torch.allclose(got["output"], expected["output"], rtol=1e-4, atol=1e-4)


def test_compiled_blocks_are_one_graph_without_the_kernels(fused: list[bool]) -> None:
    block = make("torchvision, bottleneck")
    fuse_blocks(block)
    expected = results(copy.deepcopy(block))
    assert len(fused) == 3
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    got = compiled(images(block))
    assert len(fused) == 3
    assert torch.allclose(got, expected["output"], rtol=1e-4, atol=1e-4)
