"""A curve in plain characters, for a terminal or a log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_WIDTH, _HEIGHT = 60, 8


def text_plot(points: Sequence[tuple[float, float]], ends: tuple[str, str]) -> Iterator[str]:
    """Lines that show `points` (x, y), x rising: y from 0 or the least upwards, labelled; below, `ends` of x.

    Every point has a star. Points that share a column have all of theirs.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(0.0, *ys), max(ys)
    height, width = (high - low) or 1.0, (xs[-1] - xs[0]) or 1.0
    raster = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for x, y in points:
        column = round((x - xs[0]) / width * (_WIDTH - 1))
        row = round((high - y) / height * (_HEIGHT - 1))
        raster[row][column] = "*"
    for number, row_of in enumerate(raster):
        value = high - number / (_HEIGHT - 1) * height
        label = f"{value:.3g}" if number in (0, _HEIGHT // 2, _HEIGHT - 1) else ""
        yield f"{label:>8} |{''.join(row_of).rstrip()}".rstrip()
    yield f"{'':8} +{'-' * _WIDTH}"
    yield f"{'':8}  {ends[0]}{ends[1]:>{_WIDTH - len(ends[0])}}"
