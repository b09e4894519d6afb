"""Compute the learning rate of every update: linear warm-up, then polynomial, cosine or step decay.

The rate is a pure function of the update's number: no optimizer, no epochs, no state. This module does not import
torch. The classes in `schedulers` apply the rate to an optimizer. In the formulas, u, I, W, b, p and e are the
arguments of `learning_rate`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias, get_args

Form: TypeAlias = Literal["whole", "restart", "mlperf", "cosine", "steps"]

WHOLE: Final = "whole"
"""Decay measured over the whole run, warm-up included: e + (b - e)(1 - u/I)^p.

Caffe's ``poly`` policy, base_lr (1 - iter/max_iter)^power. Intel-Caffe replaces its first updates by a warm-up.
The LARS paper uses it with power 2 (You, Gitman, Ginsburg 2017, https://arxiv.org/abs/1708.03888, sections 5 and 6).
The rate drops at the end of the warm-up.
"""

RESTART: Final = "restart"
"""Decay measured from the end of the warm-up: e + (b - e)(1 - (u - W)/(I - W))^p.

NUS-HPC's ``PolynomialWarmup`` (https://github.com/NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch, utils.py).
"""

MLPERF: Final = "mlperf"
"""Like `RESTART`, over one more update: e + (b - e)(1 - (u - W)/(I - W + 1))^p.

The MLPerf reference, whose ``decay_steps`` is train_steps - warmup_steps + 1
(https://github.com/mlcommons/training, ``image_classification/tensorflow2/lars_util.py``,
``PolynomialDecayWithWarmup``).
"""

COSINE: Final = "cosine"
"""Half a period of the cosine, from the end of the warm-up: e + (b - e)(1 + cos(pi (u - W)/(I - W)))/2.

Loshchilov and Hutter 2016 (https://arxiv.org/abs/1608.03983, equation 5) without restarts. SimCLR, BYOL, Barlow Twins,
SwAV and VICReg use it after a linear warm-up.
"""

STEPS: Final = "steps"
"""The base rate b, multiplied by `factor` at each update in `steps`.

Goyal et al. 2017 (https://arxiv.org/abs/1706.02677, section 5.1): a tenth at epochs 30, 60 and 80.
"""


def learning_rate(
    update: int,
    *,
    total: int,
    warmup: int,
    base: float,
    power: float = 1.0,
    form: Form,
    end: float = 0.0,
    start: float | None = None,
    steps: Sequence[int] = (),
    factor: float = 0.1,
) -> float:
    """Return the learning rate of one update.

    During the warm-up (``update < warmup``) the rate is ``base * (update + 1) / warmup`` if `start` is None: the last
    update of the warm-up has the base rate. With `start`, the rate is ``start + (base - start) * update / warmup``:
    update 0 has the rate `start`, and the line reaches the base rate at the first update after the warm-up. After the
    warm-up the rate follows `form`.

    Args:
        update: the update's number u, counted from 0.
        total: the updates I of the run.
        warmup: the updates W of the warm-up; 0 for no warm-up.
        base: the learning rate b at the end of the warm-up.
        power: the exponent p of the decay; `COSINE` and `STEPS` do not use it.
        form: ``"whole"``, ``"restart"``, ``"mlperf"``, ``"cosine"`` or ``"steps"``.
        end: the learning rate e that a polynomial or cosine decay approaches.
        start: the learning rate of update 0, if there is a warm-up.
        steps: for `STEPS`, the updates, from 0, at which the rate is multiplied by `factor`.
        factor: for `STEPS`, the factor of each step.

    Raises:
        ValueError: `update` is not in [0, total), `warmup` not in [0, total), one of these or of `steps` not a whole
            number, `base`, `power`, `end`, `start` or `factor` negative or not finite, or `form` unknown.
    """
    if form not in get_args(Form):
        raise ValueError(f"form={form!r}: choose one of {', '.join(map(repr, get_args(Form)))}")
    check_counts(update=update, warmup=warmup, total=total)
    check_counts(**{f"steps[{i}]": step for i, step in enumerate(steps)})
    if not 0 <= warmup < total:
        raise ValueError(f"warmup={warmup}: it must be at least 0 and less than the run's {total} updates")
    if not 0 <= update < total:
        raise ValueError(f"update={update}: it must be at least 0 and less than the run's {total} updates")
    check_not_negative(base=base, power=power, end=end, start=start or 0.0, factor=factor)
    if update < warmup:
        if start is None:
            return base * (update + 1) / warmup
        return start + (base - start) * update / warmup
    if form == STEPS:
        return float(base * factor ** sum(update >= step for step in steps))
    # 1 - (u - s)/n, written as (s + n - u)/n to save a rounding.
    first = 0 if form == WHOLE else warmup
    length = total - first + (form == MLPERF)
    left = (first + length - update) / length
    # (1 + cos(pi x))/2 = sin(pi (1 - x)/2)^2, which loses no digits near the end.
    decay = math.sin(math.pi / 2 * left) ** 2 if form == COSINE else left**power
    return float(end + (base - end) * decay)


def check_counts(**counts: Any) -> None:
    """Raise `ValueError` for a value that is not a whole number."""
    for name, value in counts.items():
        try:
            operator.index(value)
        except TypeError:
            raise ValueError(f"{name}={value!r}: give a whole number of updates, e.g. round(0.1 * total)") from None


def check_not_negative(**values: Any) -> None:
    """Raise `ValueError` for a value that is not a finite number of at least 0."""
    for name, value in values.items():
        if isinstance(value, str) or not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value!r}: it must be finite and at least 0")


def scaled_lr(base: float, batch: int, rule: Literal["linear", "sqrt"] = "linear", base_batch: int = 256) -> float:
    """Return the learning rate for a batch of `batch` samples, where `base` is the rate for `base_batch` samples.

    ``"linear"``: ``base * batch / base_batch``. ``"sqrt"``: ``base * sqrt(batch / base_batch)``.

    Source of the linear rule: Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 2.1. Raises `ValueError` for
    an unknown rule, and for a rate or batch that is not finite and above 0.
    """
    if rule not in ("linear", "sqrt"):
        raise ValueError(f"rule={rule!r}: choose 'linear' or 'sqrt'")
    values: dict[str, Any] = {"base": base, "batch": batch, "base_batch": base_batch}
    for name, value in values.items():
        if isinstance(value, str) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r}: it must be a finite number above 0")
    return base * batch / base_batch if rule == "linear" else base * math.sqrt(batch / base_batch)
