"""Write docs/metrics.md from the fields of the log (lars_train/monitoring/fields.py).

    python scripts/dev/make_metrics_reference.py

Takes a second. Figures: none; it writes docs/metrics.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before lars_train is imported, so that --help answers at once
    shared.make_parser(__doc__).parse_args()

from lars_train.monitoring.fields import FIELDS, RATIO_FIELDS

HEAD = """# Metrics: the fields of metrics.jsonl

A run writes one JSON object per line: every `log_every` updates, at each epoch's end, at the last update, and per
evaluation. A line has `update`, `epoch`, and the fields that were measured. A number that is not finite is `null`. A
resumed run removes the lines after its checkpoint, so nothing appears twice. Names, units and meanings are stable;
fields may be added. [Monitoring](monitoring.md) shows them in TensorBoard. `scripts/dev/make_metrics_reference.py`
writes this page from `lars_train/monitoring/fields.py`.
"""
RATIOS = """
## trust_ratios.jsonl

One JSON object per log line, if the optimizer is LARS. `trust_ratios.fields.json` has the names of the `layers`.
"""


def field_list(fields: dict[str, tuple[str, str]]) -> list[str]:
    """Return `fields` as a list of names, units and meanings, which a phone shows whole."""
    return ["", *(f"- `{name}`{f' ({unit})' if unit else ''}: {meaning}" for name, (unit, meaning) in fields.items())]


def page() -> str:
    """Return the whole page."""
    return HEAD + "\n".join(field_list(FIELDS)) + "\n" + RATIOS + "\n".join(field_list(RATIO_FIELDS)) + "\n"


if __name__ == "__main__":
    (shared.ROOT / "docs" / "metrics.md").write_text(page())
