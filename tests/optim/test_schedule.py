"""The schedule against the table's rows, computed by hand as exact fractions."""

from __future__ import annotations

import decimal
import math
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lars_train.optim.schedule import RESTART, WHOLE, Form, learning_rate, scaled_lr

IMAGES, EPOCHS = 1_281_167, 90

# (batch, updates per epoch, warm-up epochs, base rate): the published rows, 90 epochs, power 2.
ROWS = [
    (8192, 156, 5, "12.8"),
    (16384, 78, 5, "25.0"),
    (32768, 39, 5, "29.0"),
    (256, 5004, 0, "0.2"),
]


@pytest.mark.parametrize(("batch", "per_epoch", "warmup_epochs", "base"), ROWS)
def test_rows_of_the_table_have_the_lr_computed_by_hand(
    batch: int, per_epoch: int, warmup_epochs: int, base: str
) -> None:
    assert IMAGES // batch == per_epoch
    total, warmup, peak = per_epoch * EPOCHS, per_epoch * warmup_epochs, Fraction(base)
    whole = {
        # After 5 of 90 epochs 17/18 of the run remain; at half time 1/2; at the last update one update.
        warmup: peak * (Fraction(17, 18) ** 2 if warmup else 1),
        total // 2: peak / 4,
        total - 1: peak / total**2,
    }
    restart = {
        # The middle is 45 of the 85 epochs that follow the warm-up.
        warmup: peak,
        total // 2: peak * (Fraction(45, 85) ** 2 if warmup else Fraction(1, 4)),
        total - 1: peak / (total - warmup) ** 2,
    }
    if warmup:
        start = {0: peak / warmup, warmup // 2: peak * (warmup // 2 + 1) / warmup, warmup - 1: peak}
        whole |= start
        restart |= start
    forms: list[tuple[Form, dict[int, Fraction]]] = [(WHOLE, whole), (RESTART, restart)]
    for form, expected in forms:
        for update, rate in expected.items():
            got = learning_rate(update, total=total, warmup=warmup, base=float(base), power=2.0, form=form)
            assert got == pytest.approx(float(rate), rel=1e-14, abs=0), (form, update)


def test_the_32k_row_has_the_documented_lr() -> None:
    def rate(update: int) -> float:
        return learning_rate(update, total=3510, warmup=195, base=29.0, power=2.0, form="whole")

    assert rate(0) == pytest.approx(0.148717948717948)
    assert rate(194) == 29.0
    assert rate(195) == pytest.approx(25.867283950617283)
    assert rate(1755) == pytest.approx(7.25)
    assert rate(3509) == pytest.approx(2.353876999326e-06)


@given(data=st.data(), power=st.sampled_from([0.5, 1.0, 2.0]), form=st.sampled_from(["whole", "restart"]))
def test_the_lr_rises_to_the_base_then_falls_but_stays_positive(data: st.DataObject, power: float, form: Form) -> None:
    total = data.draw(st.integers(1, 300))
    warmup = data.draw(st.integers(0, total - 1))
    rates = [learning_rate(u, total=total, warmup=warmup, base=3.0, power=power, form=form) for u in range(total)]
    up, down = rates[:warmup], rates[warmup:]
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert 0 < min(rates) <= max(rates) <= 3.0
    if warmup:
        assert rates[warmup - 1] == 3.0


def test_without_warm_up_whole_and_restart_are_equal() -> None:
    for update in range(20):
        values = {
            learning_rate(update, total=20, warmup=0, base=0.2, power=2.0, form=form) for form in (WHOLE, RESTART)
        }
        assert len(values) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update": -1}, "update=-1"),
        ({"update": 10}, "update=10"),
        ({"warmup": 10}, "warmup=10"),
        ({"warmup": -1}, "warmup=-1"),
        ({"total": 0}, "0 updates"),
        ({"base": -1.0}, "base=-1.0"),
        ({"base": float("nan")}, "base=nan"),
        ({"power": -2.0}, "power=-2.0"),
        ({"power": float("inf")}, "power=inf"),
        ({"form": "cos"}, "form='cos'"),
        ({"warmup": 0.1}, "warmup=0.1: give a whole number of updates"),
        ({"update": "3"}, "update='3': give a whole number of updates"),
        ({"base": "1"}, "base='1': it must be finite"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"update": 3, "total": 10, "warmup": 2, "base": 1.0, "power": 2.0, "form": "whole"}
    with pytest.raises(ValueError, match=message):
        learning_rate(**(good | arguments))


def test_a_cosine_equals_its_formula_and_ends_above_its_limit() -> None:
    def rate(update: int) -> float:
        return learning_rate(update, total=1000, warmup=100, base=4.8, form="cosine", end=0.0048)

    with decimal.localcontext(prec=40):
        pi = Decimal("3.141592653589793238462643383279502884197")
        for update in (101, 400, 550, 999):
            angle = pi * (update - 100) / 900
            cosine = sum((-1) ** k * angle ** (2 * k) / math.factorial(2 * k) for k in range(30))
            exact = Decimal("0.0048") + (Decimal("4.8") - Decimal("0.0048")) * (1 + cosine) / 2
            assert rate(update) == pytest.approx(float(exact), rel=1e-14)
    assert rate(99) == rate(100) == 4.8
    assert rate(550) == pytest.approx((4.8 + 0.0048) / 2)
    assert 0.0048 < rate(999) < 0.0049


# The learning rates that the methods' papers and programs state for a batch (docs/own_loop.md).
PUBLISHED = [
    (0.3, 4096, "linear", 256, 4.8),  # SimCLR
    (0.075, 4096, "sqrt", 1, 4.8),  # SimCLR
    (0.2, 4096, "linear", 256, 3.2),  # BYOL, TiCo
    (0.2, 2048, "linear", 256, 1.6),  # Barlow Twins, VICReg
    (0.6, 256, "linear", 256, 0.6),  # SwAV
]


@pytest.mark.parametrize(("base", "batch", "rule", "base_batch", "expected"), PUBLISHED)
def test_scaled_lr_gives_the_published_rates(
    base: float, batch: int, rule: Any, base_batch: int, expected: float
) -> None:
    assert scaled_lr(base, batch, rule, base_batch) == pytest.approx(expected, rel=1e-15)
    assert scaled_lr(base, batch) == base * batch / 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "square"}, "rule='square': choose 'linear' or 'sqrt'"),
        ({"batch": 0}, "batch=0"),
        ({"base_batch": -1}, "base_batch=-1"),
        ({"base": float("nan")}, "base=nan"),
        ({"base": "0.3"}, "base='0.3': it must be a finite number above 0"),
    ],
)
def test_scaled_lr_refuses_a_bad_argument_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaled_lr(**({"base": 0.3, "batch": 4096} | arguments))


def test_the_schedule_does_not_import_torch() -> None:
    code = "import sys, lars_train.optim.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
