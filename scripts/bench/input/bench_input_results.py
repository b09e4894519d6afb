"""Format what bench_input.py found as Markdown: tables, and what they do not show. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from bench_input_contenders import FLOOR, NATIVE, OURS, REFERENCE, TASKS

RAW = "as they are"
LONGEST, SHORTEST = "packed, longer side at most 500", "packed, shorter side 256"

Key = tuple[str, str, str]
"""Contender, task, store."""


class Apart(NamedTuple):
    """How far a contender's pixels are from Pillow's full decode: levels of 255, and views that are not equal."""

    mean: float
    most: int
    views: int
    of: int


@dataclass
class Results:
    """`stores`: mean bytes of a picture by store, what ratios are to first; `contenders`: in the order of the tables.

    `rates`: images per second of CPU time in each round, which is the same one at the same place of every array.
    """

    stores: dict[str, float]
    contenders: list[str]
    rates: dict[Key, npt.NDArray[np.float64]] = field(default_factory=dict)
    apart: dict[Key, Apart] = field(default_factory=dict)

    @property
    def base(self) -> str:
        return next(iter(self.stores))

    @property
    def peers(self) -> list[str]:
        """All but the reference, ours and the floor."""
        return [name for name in self.contenders if name not in (REFERENCE, *OURS, FLOOR)]

    def ratios(self, one: Key, other: Key) -> npt.NDArray[np.float64] | None:
        """In each round; None where one of them was not measured."""
        return self.rates[one] / self.rates[other] if one in self.rates and other in self.rates else None

    def ratio(self, one: Key, other: Key) -> float | None:
        """The median over the rounds."""
        found = self.ratios(one, other)
        return None if found is None else float(np.median(found))


def spread(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The 10th and the 90th percentile."""
    low, high = np.percentile(values, (10, 90))
    return float(low), float(high)


def tables(results: Results) -> Iterator[str]:
    """A table for each store."""
    base = "" if len(results.stores) == 1 else f", {results.base}"
    columns = "".join(
        f" {task}, images/s | ÷ reference{base} (10th to 90th percentile) | ÷ floor | pixels apart: mean, most |"
        for task in TASKS
    )
    for store, size in results.stores.items():
        yield from (f"Pictures {store}, mean {size / 1e3:.0f} kB:", "")
        yield f"| contender |{columns}"
        yield "|---|" + "---:|" * 4 * len(TASKS)
        for name in results.contenders:
            cells = [cell for task in TASKS for cell in _cells(results, name, task, store)]
            yield f"| {' | '.join([name, *cells])} |"
        yield ""


def _cells(results: Results, name: str, task: str, store: str) -> list[str]:
    key = (name, task, store)
    if key not in results.rates:
        return ["-"] * 4
    times = results.ratios(key, (REFERENCE, task, results.base))
    near, apart = results.ratio(key, (FLOOR, task, store)), results.apart.get(key)
    shown = "-" if times is None else "{:.2f} ({:.2f} to {:.2f})".format(np.median(times), *spread(times))
    return [
        f"{np.median(results.rates[key]):,.0f}",
        shown,
        "-" if near is None else f"{near:.2f}",
        "-" if apart is None else f"{apart.mean:.3f}, {apart.most}",
    ]


def comparisons(results: Results) -> Iterator[str]:
    """Yield a line for each comparison of ours, native: with the fastest peer, and with Pillow's pixels."""
    for store in results.stores:
        for task in TASKS:
            yield from _against_peers(results, task, store)
        yield from _pixels(results, store)


def _against_peers(results: Results, task: str, store: str) -> Iterator[str]:
    measured = [name for name in results.peers if (name, task, store) in results.rates]
    if (NATIVE, task, store) not in results.rates or not measured:
        return
    best = max(measured, key=lambda name: float(np.median(results.rates[name, task, store])))
    value = results.ratio((NATIVE, task, store), (best, task, store))
    yield f"- {task}, {store}: {NATIVE} is {value:.2f} times the fastest of the {len(measured)} peers measured, {best}"


def _pixels(results: Results, store: str) -> Iterator[str]:
    found = [results.apart[NATIVE, task, store] for task in TASKS if (NATIVE, task, store) in results.apart]
    if not found:
        return
    mean, most = float(np.mean([one.mean for one in found])), max(one.most for one in found)
    views, of = sum(one.views for one in found), sum(one.of for one in found)
    yield (
        f"- pixels, {store}: {views} of {of} views by {NATIVE} differ from Pillow's, by at most {most} level(s), "
        f"mean difference {mean:.4f}"
    )


def compared(name: str, pairs: Iterable[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]) -> Apart:
    """The difference of views, uint8 (224, 224, 3), two by two. Raises ValueError for those of another shape."""
    mean: list[float] = []
    most = views = 0
    for one, other in pairs:
        if one.shape != other.shape or one.dtype != np.uint8:
            raise ValueError(f"{name} makes {one.dtype} {one.shape}, not uint8 {other.shape}")
        apart = np.abs(one.astype(int) - other)
        mean.append(float(apart.mean()))
        most, views = max(most, int(apart.max())), views + bool(apart.any())
    return Apart(float(np.mean(mean)), most, views, len(mean))
