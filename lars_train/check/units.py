"""Sizes and rates as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in a unit of 10**6 or 10**9 of them."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def rate(per_s: float) -> str:
    """Whole numbers, and of small ones what they are made of."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"
