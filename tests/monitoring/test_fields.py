"""The fields of metrics.jsonl are written, and the charts show them. tests/test_docs.py checks their page."""

from __future__ import annotations

import re
from pathlib import Path

from lars_train.monitoring.fields import FIELDS, LAYOUT_DEPENDENT_FIELDS, TIMING_FIELDS
from lars_train.monitoring.tensorboard import layout

ROOT = Path(__file__).parents[2]


def test_every_documented_field_is_written() -> None:
    """The opposite, that no undocumented field is written, is tested in test_log.py."""
    sources = "".join(
        p.read_text() for p in (ROOT / "lars_train").rglob("*.py") if p.name not in ("fields.py", "tensorboard.py")
    )
    unwritten = {name for name in FIELDS if f'"{name}"' not in sources}
    assert unwritten == set()


def test_varying_fields_are_fields() -> None:
    assert TIMING_FIELDS < LAYOUT_DEPENDENT_FIELDS < FIELDS.keys()


def test_every_chart_shows_a_logged_field() -> None:
    stages = [f"stage_{what}/stem" for what in ("trust_ratio", "layer_lr", "update_ratio", "weight_norm", "grad_norm")]
    for charts in layout().values():
        for title, (kind, tags) in charts.items():
            assert kind == "Multiline"
            for tag in tags:
                assert any(re.match(tag, name) for name in (*FIELDS, *stages)), (title, tag)


def test_charts_other_than_stages_have_a_single_field() -> None:
    charts = [
        chart for heading, charts in layout().items() if heading != "Layers, by stage" for chart in charts.values()
    ]
    for _, tags in charts:
        assert len([name for name in FIELDS if any(re.match(tag, name) for tag in tags)]) == 1, tags
