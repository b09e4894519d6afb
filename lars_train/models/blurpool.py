"""Antialiased downsampling: blur the input of strided convolutions (Zhang 2019, https://arxiv.org/abs/1904.11486).

The form is that of FFCV: `BlurPoolConv2d` and `apply_blurpool` in
https://github.com/libffcv/ffcv-imagenet/blob/main/train_imagenet.py. The paper blurs after the convolution, which then
has stride 1 and costs four times as much. Max pooling stays unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# FFCV's condition, which excludes the first convolution, because its input is the image.
_LEAST_CHANNELS = 16


class BlurPoolConv2d(nn.Conv2d):
    """A convolution whose (n, C, H, W) input is blurred first. The state dict is that of `nn.Conv2d`.

    The blur multiplies 3 x 3 pixels of a channel, with zeros around the image, by (1, 2, 1) x (1, 2, 1) / 16.

    Args:
        conv: the layer to replace, whose parameters this layer takes over.
    """

    blur_taps = 9
    """Multiplications of the blur for each pixel of a channel."""
    blur_filter: Tensor
    """(C, 1, 3, 3)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
        )
        self.weight, self.bias = conv.weight, conv.bias
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("blur_filter", torch.outer(row, row).repeat(self.in_channels, 1, 1, 1), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the blurred `input`."""
        return super().forward(functional.conv2d(input, self.blur_filter, padding=1, groups=self.in_channels))


def add_blurpool(model: nn.Module) -> None:
    """Replace the strided convolutions of `model` with at least 16 input channels by `BlurPoolConv2d`, in place."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= _LEAST_CHANNELS:
                setattr(parent, name, BlurPoolConv2d(child))


def has_blurpool(model: nn.Module) -> bool:
    """Return True if `model` has a `BlurPoolConv2d`."""
    return any(isinstance(module, BlurPoolConv2d) for module in model.modules())
