from __future__ import annotations

from typing import Any

import pytest

from lars_train.monitoring.table import HEADER, row, table

FULL = {
    "batch": "32k",
    "nominal_batch": 32768,
    "global_batch": 32768,
    "raised": False,
    "optimizer": "lars",
    "base": "SGD",
    "power": 2.0,
    "lr": 29.0,
    "warmup_epochs": 5.0,
    "epochs": 90,
    "epochs_done": 90.0,
    "updates": 3510,
    "planned_updates": 3510,
    "best_top1": 72.264,
    "final_top1": 72.0,
    "published_top1": 72.26,
}


def cells(**changes: Any) -> dict[str, str]:
    return dict(zip(HEADER, row({**FULL, **changes}), strict=True))


def test_a_full_run_makes_the_published_row() -> None:
    assert cells() == {
        "batch": "32k",
        "LR policy": "LARS + poly(2)",
        "lr": "29",
        "warm-up epochs": "5",
        "epochs": "90",
        "best top-1 %": "72.26",
        "final top-1 %": "72.00",
        "published": "72.26 (ImageNet)",
    }


@pytest.mark.parametrize(
    ("changes", "column", "text"),
    [
        ({"global_batch": 1280}, "batch", "32k (scaled: 1,280)"),
        ({"batch": "256", "nominal_batch": 256, "global_batch": 8, "raised": True}, "batch", "256 (scaled: 8, raised)"),
        ({"batch": "96", "nominal_batch": 96, "global_batch": 96, "published_top1": None}, "batch", "96"),
        ({"published_top1": None}, "published", "-"),
        ({"optimizer": "sgd"}, "LR policy", "poly(2)"),
        ({"base": "AdamW", "power": 0.5}, "LR policy", "LARS + AdamW + poly(0.5)"),
        ({"updates": 100, "epochs_done": 2.564}, "epochs", "2.56 of 90"),
        ({"warmup_epochs": 0.4444444}, "warm-up epochs", "0.444444"),
        ({"lr": 12.8}, "lr", "12.8"),
    ],
)
def test_what_differs_from_the_published_run_stands_in_the_row(changes: dict[str, Any], column: str, text: str) -> None:
    assert cells(**changes)[column] == text


def test_the_table_is_aligned_markdown() -> None:
    text = table([row(FULL), row({**FULL, "global_batch": 1280})])
    first, rule, *rows = text.split("\n")
    assert len(rows) == 2
    assert {len(line) for line in (first, rule, *rows)} == {len(first)}
    assert [cell.strip() for cell in first.strip("|").split("|")] == list(HEADER)
    assert set(rule) == {"|", "-"}
    assert rule.count("|") == first.count("|") == len(HEADER) + 1
    assert [cell.strip() for cell in rows[1].strip("|").split("|")] == list(row({**FULL, "global_batch": 1280}))


def test_a_decay_by_steps_is_told_as_such_and_an_older_record_by_its_power() -> None:
    steps = {**FULL, "policy": "x0.1 at epochs 30, 60, 80", "power": None}
    assert row(steps)[1] == "LARS + x0.1 at epochs 30, 60, 80"
    assert "policy" not in FULL
    assert row(FULL)[1] == "LARS + poly(2)"
