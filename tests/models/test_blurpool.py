"""Antialiased downsampling is that of FFCV, and keeps the names and values of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from lars_train.errors import ConfigError
from lars_train.export import write_onnx, write_torch
from lars_train.models.blurpool import BlurPoolConv2d
from lars_train.models.factory import build_model
from lars_train.models.resnet_cifar import CifarResNet
from lars_train.models.weights import load_weights
from lars_train.training.metrics import flops_per_image


def build(name: str, blurpool: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, num_classes=10, ghost_batch=4, zero_gamma=False, blurpool=blurpool)


def blurred(images: Tensor) -> Tensor:
    """Return `images` (n, C, H, W) with each pixel replaced by the weighted mean of 3 x 3 pixels, zeros outside."""
    height, width = images.shape[2:]
    padded, total = F.pad(images, (1, 1, 1, 1)), torch.zeros_like(images)
    for row, of_row in enumerate((1, 2, 1)):
        for column, of_column in enumerate((1, 2, 1)):
            total += of_row * of_column / 16 * padded[:, :, row : row + height, column : column + width]
    return total


def blur_before_strided_convolutions(model: nn.Module) -> nn.Module:
    """Let the layers that FFCV replaces blur their input: stride above 1, and 16 channels or more."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1 and layer.in_channels >= 16:
            layer.register_forward_pre_hook(lambda layer, inputs: (blurred(inputs[0]),))
    return model


@pytest.mark.parametrize("name", ["resnet18", "tiny"])
def test_blurpool_blurs_the_input_of_strided_convolutions(name: str) -> None:
    ours = build(name).double()
    plain = torchvision.models.resnet18(num_classes=10)
    theirs = plain if name == "resnet18" else CifarResNet(1, num_classes=10, stem_stride=2)
    theirs.load_state_dict(build(name, blurpool=False).state_dict(), strict=True)
    theirs = blur_before_strided_convolutions(theirs).double()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for training in (False, True):
        found, expected = ours.train(training)(images), theirs.train(training)(images)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        found.square().sum().backward()
        expected.square().sum().backward()
        for (key, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9, msg=key)


def test_the_first_convolution_and_the_weights_stay_unchanged() -> None:
    for name, layers in (("resnet50", ("conv2", "downsample.0")), ("tiny", ("conv1",))):
        ours, plain = build(name), build(name, blurpool=False)
        replaced = {key for key, module in ours.named_modules() if isinstance(module, BlurPoolConv2d)}
        stages = (2, 3, 4) if name == "resnet50" else (2, 3)
        assert replaced == {f"layer{stage}.0.{layer}" for stage in stages for layer in layers}
        assert list(ours.state_dict()) == list(plain.state_dict())
        assert all(torch.equal(value, ours.state_dict()[key]) for key, value in plain.state_dict().items())


def test_a_blurred_layer_keeps_channels_last_under_autocast() -> None:
    layer = build("small").get_submodule("layer2.0.conv1").to(memory_format=torch.channels_last)
    images = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(images)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.float(), layer(images), rtol=0.05, atol=0.05)


def test_the_blur_counts_as_nine_multiplications_per_value() -> None:
    extra = sum(2 * 9 * channels * side**2 for channels, side in ((16, 32), (32, 16)))
    assert flops_per_image(build("small"), 32) - flops_per_image(build("small", blurpool=False), 32) == 3 * extra


def test_weights_with_blurpool_load_only_with_blurpool(tmp_path: Path) -> None:
    for stated in (True, False):
        path = tmp_path / f"{stated}.pth"
        write_torch(path, build("small"), {"model": "small", "blurpool": stated, "classes": list("0123456789")})
        load_weights(build("small", blurpool=stated), path)
        with pytest.raises(ConfigError, match=rf"model\.blurpool={str(stated).lower()}; any other value gives wrong"):
            load_weights(build("small", blurpool=not stated), path)
    # Files of other programs do not say which network they are for.
    torch.save(build("small").state_dict(), tmp_path / "plain.pth")
    load_weights(build("small"), tmp_path / "plain.pth")
    load_weights(build("small", blurpool=False), tmp_path / "plain.pth")


@pytest.mark.slow
def test_an_onnx_export_contains_the_blur(tmp_path: Path) -> None:
    runtime, images = pytest.importorskip("onnxruntime"), torch.randn(1, 3, 16, 16)
    logits = []
    for blurpool in (True, False):
        path = tmp_path / f"{blurpool}.onnx"
        about = {"image_size": 16, "blurpool": blurpool}
        # `write_onnx` compares the graph with the network.
        assert "logits match the network's" in write_onnx(path, build("small", blurpool=blurpool), about)
        logits.append(runtime.InferenceSession(str(path)).run(None, {"images": images.numpy()})[0])
    assert abs(logits[0] - logits[1]).max() > 1e-3
