"""Triton kernels of ghost batch norm, with the ReLU and the sum with a shortcut that follow it in residual networks.

The activations are a matrix with a row per pixel (C adjacent values); a ghost batch is R rows. A program processes a
block of channels in a chunk of one ghost batch's rows, tile by tile; `ghost_launch` chooses the sizes.

The numbers below count passes over the activations. A pass reads or writes every value once. Batch norm alone takes:

- `_chunk_moments` reads x (1), `_normalize` reads x and writes the output (2);
- `_chunk_sums` reads dy and x (2), `_input_gradient` reads dy and x and writes the gradient (3): 8 in all.

A ReLU adds no pass: both backward kernels compute the sign of its input again. With a shortcut, `_normalize` also
reads the shortcut (1). `_chunk_sums` also reads the output for its sign (1), and writes the gradient of the ReLU's
input (1), which is the gradient of the shortcut, too: 11 in all. As separate operations ReLU takes 5 passes, and the
sum 3.

Between the two kernels of a pair, a small kernel combines the chunks of each ghost batch and block of channels. So each
direction takes three launches for any number of ghost batches. Between load and store, values are float32. No sum
depends on timing (no atomics, no autotuning) or on the number of ghost batches: results for a ghost batch are
bit-identical in any micro-batch of two or more ghost batches.

Importing this module imports triton, which comes with torch for CUDA on Linux; `ghost_norm` works without it.
"""

# Triton allows no type hint in kernels except constexpr. Names of constexpr arguments are in capitals by convention.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

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
    means,
    variances,
    ghosts,
    rows,
    chunk_rows,
    groups,
    VECTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute each ghost batch's mean and biased variance, by Chan's formula."""
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
    tl.store(means + place, near + merged, mask=valid)
    tl.store(variances + place, total / rows, mask=valid)


@triton.jit
def _add_totals(
    means, variances, sums, counted, chunk, channel, samples, ghosts, rows, channels, CHANNELS: tl.constexpr
):
    """Add the totals of `_normalize`, in one program for each block of channels."""
    if chunk == 0:
        valid = channel < channels
        mean_sum = tl.zeros((1, CHANNELS), tl.float32)
        variance_sum = tl.zeros((1, CHANNELS), tl.float32)
        for number in range(0, ghosts):
            mean_sum += tl.load(means + number * channels + channel, mask=valid, other=0)
            variance_sum += tl.load(variances + number * channels + channel, mask=valid, other=0)
        mean_sum *= samples
        variance_sum *= samples * (rows / (rows - 1))
        tl.store(sums + channel, tl.load(sums + channel, mask=valid, other=0) + mean_sum, mask=valid)
        sums += channels
        tl.store(sums + channel, tl.load(sums + channel, mask=valid, other=0) + variance_sum, mask=valid)
        if tl.program_id(0) == 0:
            tl.store(counted, tl.load(counted) + samples * ghosts)


@_jit
def _normalize(
    x,
    means,
    variances,
    weight,
    bias,
    shortcut,
    out,
    sums,
    counted,
    eps,
    samples,
    ghosts,
    rows,
    chunk_rows,
    groups,
    RELU: tl.constexpr,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute (x - mean) / sqrt(variance + eps) * weight + bias, plus the shortcut if any; with RELU, the sum's ReLU.

    Subtracting first loses no digits if the mean is large. Also add to `sums` the means and unbiased variances of all
    ghost batches, times `samples`, the number of samples in a ghost batch. Add the number of samples in all ghost
    batches to `counted`.
    """
    channels = groups * VECTOR
    chunk, ghost, channel, first, count, offsets = _locate_chunk(rows, chunk_rows, channels, TILE, CHANNELS)
    valid = channel < channels
    place = ghost * channels + channel
    mean = tl.load(means + place, mask=valid, other=0)
    scale = tl.rsqrt(tl.load(variances + place, mask=valid, other=1) + eps)
    shift = tl.zeros((1, CHANNELS), tl.float32)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=valid, other=0).to(tl.float32)
        shift += tl.load(bias + channel, mask=valid, other=0).to(tl.float32)
    row = tl.arange(0, TILE)[:, None]
    for done in range(0, count, TILE):
        mask = (row < count - done) & valid
        value = tl.load(x + first + offsets, mask=mask, other=0).to(tl.float32)
        value = (value - mean) * scale + shift
        if shortcut is not None:
            value += tl.load(shortcut + first + offsets, mask=mask, other=0).to(tl.float32)
        if RELU:
            value = tl.where(value <= 0, 0.0, value)  # keeps NaN, unlike tl.maximum
        tl.store(out + first + offsets, value, mask=mask)
        first += TILE * channels
    if sums is not None:
        _add_totals(means, variances, sums, counted, chunk, channel, samples, ghosts, rows, channels, CHANNELS)


@_jit
def _chunk_sums(
    dy,
    x,
    means,
    variances,
    weight,
    bias,
    output,
    unmasked,
    out,
    eps,
    ghosts,
    rows,
    chunk_rows,
    groups,
    RELU: tl.constexpr,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute each chunk's sums of dy and of dy * (x - mean).

    With RELU, dy is the gradient of the ReLU's output. The sums then use the gradient of the ReLU's input: 0 where that
    input is at most 0, and dy elsewhere. If the forward pass added a shortcut, pass its `output`: this kernel takes the
    sign from `output`, and writes the gradient of the ReLU's input to `unmasked`.
    """
    channels = groups * VECTOR
    chunk, ghost, channel, first, count, offsets = _locate_chunk(rows, chunk_rows, channels, TILE, CHANNELS)
    valid = channel < channels
    place = ghost * channels + channel
    mean = tl.load(means + place, mask=valid, other=0)
    scale = tl.rsqrt(tl.load(variances + place, mask=valid, other=1) + eps)
    shift = tl.zeros((1, CHANNELS), tl.float32)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=valid, other=0).to(tl.float32)
    if bias is not None:
        shift += tl.load(bias + channel, mask=valid, other=0).to(tl.float32)
    row = tl.arange(0, TILE)[:, None]
    total = tl.zeros((TILE, CHANNELS), tl.float32)
    products = tl.zeros((TILE, CHANNELS), tl.float32)
    for done in range(0, count, TILE):
        mask = (row < count - done) & valid
        slope = tl.load(dy + first + offsets, mask=mask, other=0).to(tl.float32)
        value = tl.load(x + first + offsets, mask=mask, other=0).to(tl.float32)
        if RELU:
            if output is not None:
                sign = tl.load(output + first + offsets, mask=mask, other=0).to(tl.float32)
                slope = tl.where(sign <= 0, 0.0, slope)
                tl.store(unmasked + first + offsets, slope, mask=mask)
            else:
                slope = tl.where((value - mean) * scale + shift <= 0, 0.0, slope)
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
    variances,
    sums,
    eps,
    ghosts,
    rows,
    chunk_rows,
    groups,
    VECTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute each ghost batch's sums of dy and of dy * (x - mean) / sqrt(variance + eps)."""
    channels = groups * VECTOR
    ghost, channel, mask, offsets = _locate_chunks(rows, chunk_rows, channels, CHUNKS, CHANNELS)
    stride, place = ghosts * channels, ghost * channels + channel
    valid = channel < channels
    total = tl.load(parts + offsets, mask=mask, other=0)
    products = tl.load(parts + stride * tl.cdiv(rows, chunk_rows) + offsets, mask=mask, other=0)
    inverse = tl.rsqrt(tl.load(variances + place, mask=valid, other=1) + eps)
    tl.store(sums + place, tl.sum(total, 0, keep_dims=True), mask=valid)
    tl.store(sums + stride + place, tl.sum(products, 0, keep_dims=True) * inverse, mask=valid)


@_jit
def _input_gradient(
    dy,
    x,
    means,
    variances,
    sums,
    weight,
    bias,
    out,
    eps,
    ghosts,
    rows,
    chunk_rows,
    groups,
    RELU: tl.constexpr,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute weight * inverse * (dy - mean(dy) - normed * mean(dy * normed)), with means over a ghost batch.

    With RELU, dy is the gradient of the ReLU's output. The formula then uses the gradient of the ReLU's input: 0 where
    that input is at most 0, and dy elsewhere. RELU is only for a forward pass without a shortcut.
    """
    channels = groups * VECTOR
    _chunk, ghost, channel, first, count, offsets = _locate_chunk(rows, chunk_rows, channels, TILE, CHANNELS)
    stride = ghosts * channels
    valid = channel < channels
    place = ghost * channels + channel
    mean = tl.load(means + place, mask=valid, other=0)
    inverse = tl.rsqrt(tl.load(variances + place, mask=valid, other=1) + eps)
    slope_mean = tl.load(sums + place, mask=valid, other=0) / rows
    factor = tl.load(sums + stride + place, mask=valid, other=0) * inverse / rows
    scale = inverse
    shift = tl.zeros((1, CHANNELS), tl.float32)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=valid, other=0).to(tl.float32)
    if bias is not None:
        shift += tl.load(bias + channel, mask=valid, other=0).to(tl.float32)
    row = tl.arange(0, TILE)[:, None]
    for done in range(0, count, TILE):
        mask = (row < count - done) & valid
        slope = tl.load(dy + first + offsets, mask=mask, other=0).to(tl.float32)
        value = tl.load(x + first + offsets, mask=mask, other=0).to(tl.float32)
        if RELU:
            slope = tl.where((value - mean) * scale + shift <= 0, 0.0, slope)
        tl.store(out + first + offsets, scale * (slope - slope_mean - (value - mean) * factor), mask=mask)
        first += TILE * channels
