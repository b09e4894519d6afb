"""Sizes and rates as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes, in three digits and a unit of 10**3, 10**6, 10**9 or 10**12 of them."""
    for unit, of_it in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= 0.9995 * of_it:  # what rounds to it
            return f"{count / of_it:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def rate(per_s: float) -> str:
    """Whole numbers, and of small ones what they are made of."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"
