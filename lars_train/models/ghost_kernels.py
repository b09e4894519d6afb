"""Apply ghost batch norm to channels_last activations in Triton, with no more memory traffic than plain batch norm.

The activations are a matrix with a row per pixel (C adjacent values); a ghost batch is R rows. A program processes a
block of channels in a chunk of one ghost batch's rows, tile by tile. The number of passes over the activations, each of
which reads or writes every value once:

- `_chunk_moments` reads x (1), `_normalize` reads x and writes the output (2);
- `_chunk_sums` reads dy and x (2), `_input_gradient` reads dy and x and writes the gradient (3): 8 in all.

Between the two kernels of a pair, a small kernel combines the chunks of each ghost batch and block of channels. There
are at most `PROGRAMS` such chunks. So each direction takes three launches for any number of ghost batches. Between load
and store, values are float32. No sum depends on timing (no atomics, no autotuning) or on the number of ghost batches:
results for a ghost batch are bit-identical in any micro-batch of two or more ghost batches.

Importing this module imports triton, which comes with torch for CUDA on Linux; `ghost_norm` works without it.
"""

# Triton allows no type hint in kernels except constexpr. Names of constexpr arguments are in capitals by convention.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

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
    input: Tensor, weight: Tensor | None, bias: Tensor | None, ghosts: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each ghost batch by its own mean and biased variance.

    Args:
        input: (n, C, H, W) of float32, bfloat16 or float16, contiguous in channels_last, n a multiple of
            `ghosts`, each ghost batch with more than one value per channel.
        weight, bias: (C,) of any floating dtype, or both None.

    Returns:
        The output, like `input` and not a view. In float32: the means and unbiased variances, (2, ghosts, C), and
        1 / sqrt(biased variance + eps), (ghosts, C).
    """
    tiling = _tiling(input, ghosts)
    chunks = input.new_empty((2, ghosts, tiling.chunks, tiling.channels), dtype=torch.float32)
    statistics = input.new_empty((2, ghosts, tiling.channels), dtype=torch.float32)
    inverse = torch.empty_like(statistics[0])
    output = torch.empty_like(input)
    _launch(_chunk_moments, tiling, input, chunks)
    _launch(_combine_moments, tiling, chunks, statistics, inverse, eps)
    _launch(_normalize, tiling, input, statistics, inverse, weight, bias, output)
    return output, statistics, inverse


def gradients(
    grad: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the backward pass of `normalize`.

    Args:
        grad: the gradient of the output, (n, C, H, W) of the input's dtype; copied if it is not channels_last.
        input, weight: as passed to `normalize`.
        mean, inverse: (ghosts, C), as returned by `normalize`.

    Returns:
        The input's gradient, like `input`, and two sums over each ghost batch, float32 (2, ghosts, C): of the output's
        gradient, and of that gradient times the normalized input.
    """
    ghosts = len(mean)
    tiling = _tiling(input, ghosts)
    grad = grad.contiguous(memory_format=torch.channels_last)
    chunks = input.new_empty((2, ghosts, tiling.chunks, tiling.channels), dtype=torch.float32)
    sums = input.new_empty((2, ghosts, tiling.channels), dtype=torch.float32)
    grad_input = torch.empty_like(input)
    _launch(_chunk_sums, tiling, grad, input, mean, chunks)
    _launch(_combine_sums, tiling, chunks, inverse, sums)
    _launch(_input_gradient, tiling, grad, input, mean, inverse, sums, weight, grad_input)
    return grad_input, sums


class Tiling(NamedTuple):
    """The division of (ghosts * rows, channels) values into chunks and tiles.

    The sizes of chunks and tiles do not depend on the number of ghost batches.
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


def _launch(kernel: Any, tiling: Tiling, first: Tensor, *others: Tensor | float | None) -> None:
    """Run `kernel` on the current stream. Its arguments are `first` and `others`, then the sizes of `tiling`."""
    # If the compiler knows that the channels are a multiple of 8, it uses loads of 16 bytes for each of the dtypes.
    vector = 8 if tiling.channels % 8 == 0 else 1
    if kernel in (_combine_moments, _combine_sums):
        chunks = _power_of_2(tiling.chunks)
        tile = (chunks, min(COMBINED // chunks, tiling.tile_channels))
        programs = tiling.ghosts
    else:
        tile = (tiling.tile_rows, tiling.tile_channels)
        programs = tiling.ghosts * tiling.chunks
    programs *= _ceil(tiling.channels, tile[1])
    sizes = (tiling.ghosts, tiling.rows, tiling.chunk_rows, tiling.channels // vector)
    with torch.cuda.device_of(first):
        kernel[(programs,)](first, *others, *sizes, vector, *tile, num_warps=WARPS, num_stages=1)


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


# Otherwise Triton would specialize a kernel on its sizes, and compile it again for each layer.
_jit: Any = triton.jit(do_not_specialize=["ghosts", "rows", "chunk_rows", "groups"])


@triton.jit
def _locate_chunk(rows, chunk_rows, channels, TILE: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the chunk of this program (its number over all ghost batches), the ghost batch, the channels, the offset
    of the first row, the number of rows, and the offsets within a tile."""
    blocks = tl.cdiv(channels, CHANNELS)
    chunks = tl.cdiv(rows, chunk_rows)
    chunk = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    ghost = chunk // chunks
    start = chunk % chunks * chunk_rows
    # A micro-batch may have more than 2**31 values; a tile has fewer.
    first = (ghost.to(tl.int64) * rows + start) * channels
    offsets = tl.arange(0, TILE)[:, None] * channels + channel
    return chunk, ghost, channel, first, tl.minimum(rows - start, chunk_rows), offsets


@_jit
def _chunk_moments(
    x, out, ghosts, rows, chunk_rows, groups, VECTOR: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr
):
    """Compute the mean of each chunk, and the sum of squared differences from that mean.

    Use Welford's update (1962, Technometrics 4, 419) at each position of the tile, then combine the positions by the
    formula of Chan, Golub and LeVeque (1979, Stanford report STAN-CS-79-773).
    """
    channels = groups * VECTOR
    chunk, _ghost, channel, first, count, offsets = _locate_chunk(rows, chunk_rows, channels, TILE, CHANNELS)
    row = tl.arange(0, TILE)[:, None]
    # Subtract one of the values first, so that no digits are lost if the mean is large compared with the differences.
    near = tl.load(x + first + channel, mask=channel < channels, other=0).to(tl.float32)
    mean = tl.zeros((TILE, CHANNELS), tl.float32)
    squares = tl.zeros((TILE, CHANNELS), tl.float32)
    for done in range(0, count, TILE):
        mask = (row < count - done) & (channel < channels)
        value = tl.load(x + first + offsets, mask=mask, other=0).to(tl.float32) - near
        difference = tl.where(mask, value - mean, 0.0)
        mean += difference * (1.0 / (done // TILE + 1))
        squares += difference * (value - mean)
        first += TILE * channels
    seen = tl.cdiv(tl.maximum(count - row, 0), TILE).to(tl.float32)
    merged = tl.sum(mean * seen, 0, keep_dims=True) / count
    delta = mean - merged
    squares = tl.sum(squares + seen * delta * delta, 0, keep_dims=True)
    place = out + chunk * channels + channel
    tl.store(place, near + merged, mask=channel < channels)
    tl.store(place + ghosts * tl.cdiv(rows, chunk_rows) * channels, squares, mask=channel < channels)


@triton.jit
def _locate_chunks(rows, chunk_rows, channels, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the ghost batch and channels of this program, the mask of existing chunks, and their values' offsets."""
    blocks = tl.cdiv(channels, CHANNELS)
    ghost = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    chunk = tl.arange(0, CHUNKS)[:, None]
    chunks = tl.cdiv(rows, chunk_rows)
    mask = (chunk < chunks) & (channel < channels)
    return ghost, channel, mask, (ghost * chunks + chunk) * channels + channel


@_jit
def _combine_moments(
    parts,
    statistics,
    out,
    eps,
    ghosts,
    rows,
    chunk_rows,
    groups,
    VECTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute each ghost batch's mean, unbiased variance and 1 / sqrt(biased variance + eps), by Chan's formula."""
    channels = groups * VECTOR
    ghost, channel, mask, offsets = _locate_chunks(rows, chunk_rows, channels, CHUNKS, CHANNELS)
    stride, place = ghosts * channels, ghost * channels + channel
    valid = channel < channels
    # Subtract the mean of the first chunk, for the same reason as in `_chunk_moments`.
    near = tl.load(parts + ghost * tl.cdiv(rows, chunk_rows) * channels + channel, mask=valid, other=0)
    mean = tl.load(parts + offsets, mask=mask, other=0) - near
    squares = tl.load(parts + stride * tl.cdiv(rows, chunk_rows) + offsets, mask=mask, other=0)
    start = tl.arange(0, CHUNKS)[:, None] * chunk_rows
    count = tl.minimum(tl.maximum(rows - start, 0), chunk_rows).to(tl.float32)
    merged = tl.sum(mean * count, 0, keep_dims=True) / rows
    delta = mean - merged
    total = tl.sum(squares + count * delta * delta, 0, keep_dims=True)
    tl.store(statistics + place, near + merged, mask=valid)
    tl.store(statistics + stride + place, total / (rows - 1), mask=valid)
    tl.store(out + place, tl.rsqrt(total / rows + eps), mask=valid)


@_jit
def _normalize(
    x,
    means,
    inverses,
    weight,
    bias,
    out,
    ghosts,
    rows,
    chunk_rows,
    groups,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute (x - mean) * inverse * weight + bias. Subtracting first loses no digits if the mean is large."""
    channels = groups * VECTOR
    _chunk, ghost, channel, first, count, offsets = _locate_chunk(rows, chunk_rows, channels, TILE, CHANNELS)
    valid = channel < channels
    place = ghost * channels + channel
    mean = tl.load(means + place, mask=valid, other=0)
    scale = tl.load(inverses + place, mask=valid, other=0)
    shift = tl.zeros((1, CHANNELS), tl.float32)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=valid, other=0).to(tl.float32)
        shift += tl.load(bias + channel, mask=valid, other=0).to(tl.float32)
    row = tl.arange(0, TILE)[:, None]
    for done in range(0, count, TILE):
        mask = (row < count - done) & valid
        value = tl.load(x + first + offsets, mask=mask, other=0).to(tl.float32)
        tl.store(out + first + offsets, (value - mean) * scale + shift, mask=mask)
        first += TILE * channels


@_jit
def _chunk_sums(
    dy,
    x,
    means,
    out,
    ghosts,
    rows,
    chunk_rows,
    groups,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute each chunk's sums of dy and of dy * (x - mean)."""
    channels = groups * VECTOR
    chunk, ghost, channel, first, count, offsets = _locate_chunk(rows, chunk_rows, channels, TILE, CHANNELS)
    valid = channel < channels
    mean = tl.load(means + ghost * channels + channel, mask=valid, other=0)
    row = tl.arange(0, TILE)[:, None]
    total = tl.zeros((TILE, CHANNELS), tl.float32)
    products = tl.zeros((TILE, CHANNELS), tl.float32)
    for done in range(0, count, TILE):
        mask = (row < count - done) & valid
        slope = tl.load(dy + first + offsets, mask=mask, other=0).to(tl.float32)
        value = tl.load(x + first + offsets, mask=mask, other=0).to(tl.float32)
        total += slope
        products += slope * (value - mean)
        first += TILE * channels
    place = out + chunk * channels + channel
    tl.store(place, tl.sum(total, 0, keep_dims=True), mask=valid)
    products = tl.sum(products, 0, keep_dims=True)
    tl.store(place + ghosts * tl.cdiv(rows, chunk_rows) * channels, products, mask=valid)


@_jit
def _combine_sums(
    parts,
    inverses,
    sums,
    ghosts,
    rows,
    chunk_rows,
    groups,
    VECTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute each ghost batch's sums of dy and of dy * (x - mean) * inverse."""
    channels = groups * VECTOR
    ghost, channel, mask, offsets = _locate_chunks(rows, chunk_rows, channels, CHUNKS, CHANNELS)
    stride, place = ghosts * channels, ghost * channels + channel
    valid = channel < channels
    total = tl.load(parts + offsets, mask=mask, other=0)
    products = tl.load(parts + stride * tl.cdiv(rows, chunk_rows) + offsets, mask=mask, other=0)
    inverse = tl.load(inverses + place, mask=valid, other=0)
    tl.store(sums + place, tl.sum(total, 0, keep_dims=True), mask=valid)
    tl.store(sums + stride + place, tl.sum(products, 0, keep_dims=True) * inverse, mask=valid)


@_jit
def _input_gradient(
    dy,
    x,
    means,
    inverses,
    sums,
    weight,
    out,
    ghosts,
    rows,
    chunk_rows,
    groups,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute weight * inverse * (dy - mean(dy) - normed * mean(dy * normed)), with means over a ghost batch."""
    channels = groups * VECTOR
    _chunk, ghost, channel, first, count, offsets = _locate_chunk(rows, chunk_rows, channels, TILE, CHANNELS)
    stride = ghosts * channels
    valid = channel < channels
    place = ghost * channels + channel
    mean = tl.load(means + place, mask=valid, other=0)
    inverse = tl.load(inverses + place, mask=valid, other=0)
    shift = tl.load(sums + place, mask=valid, other=0) / rows
    factor = tl.load(sums + stride + place, mask=valid, other=0) * inverse / rows
    scale = inverse
    if weight is not None:
        scale *= tl.load(weight + channel, mask=valid, other=0).to(tl.float32)
    row = tl.arange(0, TILE)[:, None]
    for done in range(0, count, TILE):
        mask = (row < count - done) & valid
        slope = tl.load(dy + first + offsets, mask=mask, other=0).to(tl.float32)
        value = tl.load(x + first + offsets, mask=mask, other=0).to(tl.float32)
        tl.store(out + first + offsets, scale * (slope - shift - (value - mean) * factor), mask=mask)
        first += TILE * channels
