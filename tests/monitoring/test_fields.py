"""The page that documents metrics.jsonl against what is written."""

from __future__ import annotations

import html
import re
from pathlib import Path

from lars_train.monitoring.fields import FIELDS, LAYOUT_DEPENDENT_FIELDS, TIMING_FIELDS
from lars_train.monitoring.tensorboard import layout

ROOT = Path(__file__).parents[2]


def test_the_page_has_every_field_with_its_unit_and_meaning_and_no_other() -> None:
    section = (ROOT / "docs" / "monitoring.md").read_text().partition("## metrics.jsonl")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)
    assert len(rows) == section.count("\n| `")
    documented = {name: (unit, html.unescape(meaning)) for name, unit, meaning in rows}
    assert documented == FIELDS


def test_no_field_is_documented_that_nothing_writes() -> None:
    """That none is written without being documented, `RunLog.write` sees to; see test_log.py."""
    sources = "".join(
        p.read_text() for p in (ROOT / "lars_train").rglob("*.py") if p.name not in ("fields.py", "tensorboard.py")
    )
    unwritten = {name for name in FIELDS if f'"{name}"' not in sources}
    assert unwritten == set()


def test_what_varies_between_equal_runs_is_a_field() -> None:
    assert TIMING_FIELDS < LAYOUT_DEPENDENT_FIELDS < FIELDS.keys()


def test_every_chart_of_the_page_shows_something_that_is_logged() -> None:
    stages = [f"stage_{what}/stem" for what in ("trust_ratio", "layer_lr", "update_ratio", "weight_norm", "grad_norm")]
    for charts in layout().values():
        for title, (kind, tags) in charts.items():
            assert kind == "Multiline"
            for tag in tags:
                assert any(re.match(tag, name) for name in (*FIELDS, *stages)), (title, tag)


def test_no_chart_draws_two_fields_in_one_color_on_one_scale() -> None:
    charts = [
        chart for heading, charts in layout().items() if heading != "Layers, by stage" for chart in charts.values()
    ]
    for _, tags in charts:
        assert len([name for name in FIELDS if any(re.match(tag, name) for tag in tags)]) == 1, tags
