"""Launch the kernels of `ghost_kernels`: choose the sizes of chunks and tiles, and allocate the results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lars_train.models import ghost_kernels

# The approximate number of programs per ghost batch, for layers with enough tiles. A GPU with 132 multiprocessors that
# each run 4 programs or more runs at least 528 at once, so 8 ghost batches take at most 8 rounds.
PROGRAMS = 512
# Each of the 128 threads of a program makes four loads of 16 bytes, the widest load: 8 KiB in all. 64 channels in half
# precision are a cache line of 128 bytes.
TILE_BYTES = 8192
TILE_CHANNELS = 64
# The number of values that a program reads to combine chunks: chunks times channels.
COMBINED = 4096
WARPS = 4


def normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ghosts: int,
    eps: float,
    *,
    shortcut: Tensor | None = None,
    relu: bool = False,
    totals: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each ghost batch by its own mean and biased variance.

    Args:
        input: (n, C, H, W) of float32, bfloat16 or float16, contiguous in channels_last, n a multiple of
            `ghosts`, each ghost batch with more than one value per channel.
        weight, bias: (C,) of any floating dtype, or both None.
        shortcut: added to the output; like `input`.
        relu: apply ReLU to the output, after the shortcut.
        totals: (2, C) and (1,). The ghost batches' means and unbiased variances, weighted by samples, are added to the
            first tensor, and the number of samples to the second.

    Returns:
        The output, like `input` and not a view; in float32 the means and biased variances, (ghosts, C).
    """
    tiling = _tiling(input, ghosts)
    chunks = input.new_empty((2, ghosts, tiling.chunks, tiling.channels), dtype=torch.float32)
    mean, variance = input.new_empty((2, ghosts, tiling.channels), dtype=torch.float32).unbind()
    _launch(ghost_kernels._chunk_moments, tiling, input, chunks)
    _launch(ghost_kernels._combine_moments, tiling, chunks, mean, variance)
    output = torch.empty_like(input)
    sums, counted = totals or (None, None)
    samples = float(len(input) // ghosts)
    arguments = (input, mean, variance, weight, bias, shortcut, output, sums, counted, eps, samples)
    _launch(ghost_kernels._normalize, tiling, *arguments, flags=(relu,))
    return output, mean, variance


def gradients(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    *,
    output: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the backward pass of `normalize`.

    Args:
        grad: the gradient of the output, (n, C, H, W) of the input's dtype; copied if it is not channels_last.
        input, weight, bias, eps, relu: as passed to `normalize`. Only a ReLU without a shortcut needs the bias.
        mean, variance: (ghosts, C), as returned by `normalize`.
        output: the output of `normalize`, if there was a shortcut.

    Returns:
        The input's gradient, like `input`; two sums over each ghost batch, float32 (2, ghosts, C): of the gradient
        before the ReLU, and of that gradient times the normalized input; and the shortcut's gradient, if there was one.
    """
    ghosts = len(mean)
    tiling = _tiling(input, ghosts)
    grad = grad.contiguous(memory_format=torch.channels_last)
    chunks = input.new_empty((2, ghosts, tiling.chunks, tiling.channels), dtype=torch.float32)
    sums = input.new_empty((2, ghosts, tiling.channels), dtype=torch.float32)
    grad_input = torch.empty_like(input)
    unmasked = None if output is None else torch.empty_like(output)
    arguments = (grad, input, mean, variance, weight, bias, output, unmasked, chunks, eps)
    _launch(ghost_kernels._chunk_sums, tiling, *arguments, flags=(relu,))
    _launch(ghost_kernels._combine_sums, tiling, chunks, variance, sums, eps)
    if unmasked is not None:
        grad, relu = unmasked, False
    kernel = ghost_kernels._input_gradient
    _launch(kernel, tiling, grad, input, mean, variance, sums, weight, bias, grad_input, eps, flags=(relu,))
    return grad_input, sums, unmasked


class Tiling(NamedTuple):
    """The division of (ghosts * rows, channels) values into chunks and tiles.

    The sizes of chunks and tiles do not depend on the number of ghost batches. There are at most about `PROGRAMS`
    chunks of a ghost batch.
    """

    ghosts: int
    rows: int
    channels: int
    chunk_rows: int
    tile_rows: int
    tile_channels: int

    @property
    def chunks(self) -> int:
        """The number of chunks per ghost batch."""
        return _ceil(self.rows, self.chunk_rows)


def _tiling(input: Tensor, ghosts: int) -> Tiling:
    channels = input.shape[1]
    rows = input.numel() // (ghosts * channels)
    tile_channels = min(TILE_CHANNELS, _power_of_2(channels))
    tile_rows = TILE_BYTES // (tile_channels * input.element_size())
    tiles = _ceil(rows * _ceil(channels, tile_channels), PROGRAMS * tile_rows)
    return Tiling(ghosts, rows, channels, tiles * tile_rows, tile_rows, tile_channels)


def _launch(
    kernel: Any, tiling: Tiling, first: Tensor, *others: Tensor | float | None, flags: tuple[bool, ...] = ()
) -> None:
    """Run `kernel` on the current stream: its arguments are `first`, `others`, the sizes of `tiling`, and `flags`."""
    # If the compiler knows that the channels are a multiple of 8, it uses loads of 16 bytes for each of the dtypes.
    vector = 8 if tiling.channels % 8 == 0 else 1
    if kernel in (ghost_kernels._combine_moments, ghost_kernels._combine_sums):
        chunks = _power_of_2(tiling.chunks)
        tile = (chunks, min(COMBINED // chunks, tiling.tile_channels))
        programs = tiling.ghosts
    else:
        tile = (tiling.tile_rows, tiling.tile_channels)
        programs = tiling.ghosts * tiling.chunks
    programs *= _ceil(tiling.channels, tile[1])
    sizes = (tiling.ghosts, tiling.rows, tiling.chunk_rows, tiling.channels // vector)
    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        kernel[(programs,)](first, *others, *sizes, *flags, vector, *tile, num_warps=WARPS, num_stages=1)


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()
