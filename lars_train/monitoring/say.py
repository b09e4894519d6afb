"""Lines for the person who started the program: of several processes, the first one speaks.

Whatever the text holds, a terminal shows it and does nothing else with it.
"""

from __future__ import annotations

import os
import sys

from lars_train.text import printable_lines


def first_process() -> bool:
    """Whether this is the process that speaks, as far as the launcher's environment tells."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def say(text: str) -> None:
    """Print `text` once over all processes."""
    if first_process():
        print(printable_lines(text), flush=True)


def complain(text: str) -> None:
    """Print `text` to stderr once on each machine: what is wrong may be wrong on one of them only."""
    if first_process() or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        print(f"lars-train: {printable_lines(text)}", file=sys.stderr, flush=True)
