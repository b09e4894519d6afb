"""How much of the device's arithmetic the training of a model uses: its operations, and what the device can do.

Both are found when a run starts, in a fraction of a second: the first by counting on the meta device, the second by
timing products of matrices, so that it holds for any device and precision and needs no table of data sheets.
"""

from __future__ import annotations

import copy
import functools
import time

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
    shadow = copy.deepcopy(network).to("meta").eval()
    forward = 0

    # By hand, for torch's counter brings in all of its compiler, a quarter of a second.
    def count(module: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal forward
        assert isinstance(module.weight, Tensor)
        forward += 2 * output.numel() * module.weight[0].numel()

    for module in shadow.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        shadow(torch.empty(1, 3, image_size, image_size, device="meta"))
    return _PASSES * forward


@functools.cache
def peak_flops(precision: Precision, device: torch.device, threads: int) -> float:
    """Floating-point operations per second of square matrix products in `precision.compute`, the best of a few.

    On the CPU with `threads` threads, which the caller has set. The host waits for the device.
    """
    side = _SIDE.get(device.type, _SIDE["cuda"])
    # Of its own, so that a run draws the same numbers whether or not this was measured before.
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(side, side, device=device, generator=draw).to(precision.compute) for _ in range(2))
    best, end, done = float("inf"), time.perf_counter() + _SECONDS, 0
    while done < _LEAST or time.perf_counter() < end:
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The first call also sets the library up.
        best, done = min(best, time.perf_counter() - started), done + 1
    return 2 * side**3 / best
