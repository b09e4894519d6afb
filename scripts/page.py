"""What the scripts that measure have in common: the machine's name, and a page's part that a script writes."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """The processor's name, as well as the system tells it."""
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def between_markers(text: str, name: str, lines: list[str]) -> str:
    """`text` with `lines` between the two marker comments of `name`, in place of what was there.

    Raises:
        ValueError: it does not have both, in order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, found_too, after = rest.partition(end)
    if not (found and found_too):
        raise ValueError(f"{begin} and {end} are not there")
    return "\n".join([before + begin, "", *lines, "", end + after])
