"""Residual networks for 32 x 32 images (He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2).

6n + 2 layers: a 3 x 3 convolution, three stages of n blocks with 16, 32 and 64 channels, global average
pooling, a linear layer. Modules are named as in torchvision's ResNets. The ImageNet networks are
torchvision's own (see `factory`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from lars_train.models.fused_blocks import norm_relu

NormLayer = Callable[[int], nn.Module]
"""Creates a normalization layer for the given number of channels."""

_WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a parameter-free shortcut (the paper's option A).

    The input is (n, in_planes, H, W), the output (n, planes, ceil(H / stride), ceil(W / stride)). If the shape changes,
    the shortcut takes every `stride`-th pixel and appends channels of zeros.
    """

    def __init__(self, in_planes: int, planes: int, stride: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_planes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes, 1)
        self.bn2 = norm_layer(planes)
        self.stride = stride
        self.new_planes = planes - in_planes

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_planes, H, W) activations to the input of the next block."""
        out = self.conv2(norm_relu(self.bn1, self.relu, self.conv1(x)))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_planes:
            x = functional.pad(x, (0, 0, 0, 0, 0, self.new_planes))
        return norm_relu(self.bn2, self.relu, out, x)


class CifarResNet(nn.Module):
    """A network of 6 * `blocks` + 2 layers, from (n, 3, H, W) images to (n, `num_classes`) logits.

    With `stem_stride` 2, which is not in the paper, all stages work on a quarter of the pixels, at a quarter of the
    cost.

    Convolutions are initialized as in He et al. 2015 (https://arxiv.org/abs/1502.01852, section 2.2), cited in section
    4.2 of the paper: normal with variance 2 / (k * k * output channels).
    """

    def __init__(
        self, blocks: int, *, num_classes: int, norm_layer: NormLayer = nn.BatchNorm2d, stem_stride: int = 1
    ) -> None:
        super().__init__()
        first, second, third = _WIDTHS
        self.conv1 = _conv3x3(3, first, stem_stride)
        self.bn1 = norm_layer(first)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(first, first, blocks, 1, norm_layer)
        self.layer2 = _stage(first, second, blocks, 2, norm_layer)
        self.layer3 = _stage(second, third, blocks, 2, norm_layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, 3, H, W) images to (n, num_classes) logits."""
        x = norm_relu(self.bn1, self.relu, self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _conv3x3(in_planes: int, planes: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)


def _stage(in_planes: int, planes: int, blocks: int, stride: int, norm_layer: NormLayer) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride, norm_layer)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1, norm_layer) for _ in range(blocks - 1)))
