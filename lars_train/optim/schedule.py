"""The learning rate of every update: linear warm-up, then polynomial decay to zero.

A pure function of the update's number. It knows no optimizer, no epochs and no state; no torch is imported.
"""

from __future__ import annotations

import math
from typing import Final, Literal, TypeAlias, get_args

Form: TypeAlias = Literal["whole", "restart"]

WHOLE: Final = "whole"
"""Decay measured over the whole run, warm-up included: b(1 - u/I)^p.

Caffe's ``poly`` policy, base_lr (1 - iter/max_iter)^power, of which Intel-Caffe only replaces the first
updates by a warm-up. The LARS paper trains with it, power 2 (You, Gitman, Ginsburg 2017,
https://arxiv.org/abs/1708.03888, sections 5 and 6). The rate steps down where the warm-up ends.
"""

RESTART: Final = "restart"
"""Decay measured from the end of the warm-up: b(1 - (u - W)/(I - W))^p.

The MLPerf reference (https://github.com/mlcommons/training, ``image_classification/tensorflow2``,
``PolynomialDecayWithWarmup``), but for its end: the reference decays to 1e-4 over I - W + 1 updates,
this to zero over I - W.
"""


def learning_rate(update: int, *, total: int, warmup: int, base: float, power: float, form: Form) -> float:
    """The learning rate of one update.

    ``update < warmup``: ``base * (update + 1) / warmup``, so that the last update of the warm-up has the
    base rate. After it: `form`, `WHOLE` or `RESTART`.

    Args:
        update: the update's number, from 0.
        total: updates of the run, I.
        warmup: updates of the warm-up, W; 0 for none.
        base: the learning rate at the end of the warm-up, b.
        power: the exponent of the decay, p.
        form: ``"whole"`` or ``"restart"``.

    Raises:
        ValueError: `update` is not in [0, total), `warmup` not in [0, total), `base` or `power` is negative
            or not finite, or `form` is neither of the two.
    """
    if form not in get_args(Form):
        raise ValueError(f"form={form!r}: choose {WHOLE!r} or {RESTART!r}")
    if not 0 <= warmup < total:
        raise ValueError(f"warmup={warmup}: it must be at least 0 and less than the run's {total} updates")
    if not 0 <= update < total:
        raise ValueError(f"update={update} is not in a run of {total} updates, numbered from 0")
    for name, value in (("base", base), ("power", power)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value}: it must be finite and at least 0")
    if update < warmup:
        return base * (update + 1) / warmup
    # 1 - (u - s)/(I - s) = (I - u)/(I - s), rounded once less.
    start = 0 if form == WHOLE else warmup
    return float(base * ((total - update) / (total - start)) ** power)
