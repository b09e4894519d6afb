"""How much of the device's arithmetic the training of a model uses: its operations, and what the device can do.

Both are found when a run starts, in a fraction of a second: the first by counting, the second by timing products of
matrices, so that it holds for any device and precision and needs no table of data sheets.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lars_train.training.device import Precision

# A backward pass costs two forward ones: the gradients of inputs and those of weights. That is the count of "model
# FLOPs" of Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B.
_PASSES = 3
# Rows and columns: large enough to come near the most that a device does, small enough to be done at once on a CPU.
_SIDE = {"cpu": 512, "cuda": 4096}
_SECONDS, _LEAST = 0.03, 3


def flops_per_image(network: nn.Module, image_size: int) -> int:
    """Floating-point operations that training on one (3, S, S) image takes: multiplications and additions of the
    convolutions and matrix products, forward and backward. The network stays as it is.
    """
    # The layers' shapes are all that counts, so the copy has no weights and computes little. (On the meta device, which
    # would be the usual way, torch imports its compiler: seconds.)
    nothing = torch.empty(0)
    memo: dict[int, Any] = {id(p): nn.Parameter(nothing) for p in network.parameters()}
    memo |= {id(b): nothing for b in network.buffers()}
    shadow, forward = copy.deepcopy(network, memo), 0

    def convolve(layer: nn.Conv2d, images: Tensor) -> Tensor:
        nonlocal forward
        assert not isinstance(layer.padding, str)
        each = zip(images.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True)
        sides = [(side + 2 * pad - apart * (wide - 1) - 1) // step + 1 for side, pad, apart, wide, step in each]
        taps = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        forward += 2 * layer.out_channels * math.prod(sides) * taps
        return images.new_zeros(1, layer.out_channels, *sides)

    def multiply(layer: nn.Linear, features: Tensor) -> Tensor:
        nonlocal forward
        forward += 2 * layer.in_features * layer.out_features
        return features.new_zeros(1, layer.out_features)

    for module in shadow.modules():
        if isinstance(module, nn.Conv2d):
            module.forward = functools.partial(convolve, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.Linear):
            module.forward = functools.partial(multiply, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.BatchNorm2d):
            module.forward = nn.Identity().forward  # type: ignore[method-assign]
    with torch.no_grad():
        shadow(torch.zeros(1, 3, image_size, image_size))
    return _PASSES * forward


@functools.cache
def peak_flops(precision: Precision, device: torch.device, threads: int) -> float:
    """Floating-point operations per second of square matrix products in `precision.compute`, the best of a few.

    On the CPU with `threads` threads, which the caller has set. The host waits for the device. float32 products are in
    TF32 where the convolutions are, as torch has those by itself: a peak without it would be one that they pass.
    """
    side = _SIDE.get(device.type, _SIDE["cuda"])
    # Of its own, so that a run draws the same numbers whether or not this was measured before.
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(side, side, device=device, generator=draw).to(precision.compute) for _ in range(2))
    best, end, done = float("inf"), time.perf_counter() + _SECONDS, 0
    with _products_as_convolutions():
        while done < _LEAST or time.perf_counter() < end:
            started = time.perf_counter()
            torch.mm(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            # The first call also sets the library up.
            best, done = min(best, time.perf_counter() - started), done + 1
    return 2 * side**3 / best


@contextmanager
def _products_as_convolutions() -> Iterator[None]:
    """Within it, CUDA's float32 products may use TF32 exactly where cuDNN's convolutions may."""
    products = torch.backends.cuda.matmul
    # By the newer names alone: where a process has used those, torch refuses to tell the older ones (`allow_tf32`).
    # They tell what the older ones have set, and do not touch it.
    convolutions: Any = torch.backends.cudnn
    before, wanted = products.fp32_precision, convolutions.conv.fp32_precision
    if before == wanted:  # perhaps because both follow a setting for all, which a value of its own would end
        yield
        return
    products.fp32_precision = wanted
    try:
        yield
    finally:
        products.fp32_precision = before
