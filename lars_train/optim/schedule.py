"""Compute the learning rate of every update: linear warm-up, then polynomial, cosine or step decay.

The rate is a pure function of the update's number: no optimizer, no epochs, no state. This module does not import
torch. The classes in `schedulers` apply the rate to an optimizer. In the formulas, u, I, W, b, p and e are the
arguments of `learning_rate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, get_args

Form: TypeAlias = Literal["whole", "restart", "mlperf", "cosine", "steps"]

WHOLE: Final = "whole"
"""Decay measured over the whole run, warm-up included: e + (b - e)(1 - u/I)^p.

Caffe's ``poly`` policy, base_lr (1 - iter/max_iter)^power, whose first updates Intel-Caffe replaces by a warm-up.
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
        update: the update's number, from 0, u.
        total: updates of the run, I.
        warmup: updates of the warm-up, W; 0 for no warm-up.
        base: the learning rate at the end of the warm-up, b.
        power: the exponent of the decay, p; `COSINE` and `STEPS` do not use it.
        form: ``"whole"``, ``"restart"``, ``"mlperf"``, ``"cosine"`` or ``"steps"``.
        end: the learning rate that a polynomial or cosine decay approaches, e.
        start: the learning rate of update 0, if there is a warm-up.
        steps: for `STEPS`, the updates, from 0, at which the rate is multiplied by `factor`.
        factor: for `STEPS`, the factor of each step.

    Raises:
        ValueError: `update` is not in [0, total), `warmup` not in [0, total), `base`, `power`, `end`, `start` or
            `factor` is negative or not finite, or `form` is unknown.
    """
    if form not in get_args(Form):
        raise ValueError(f"form={form!r}: choose one of {', '.join(map(repr, get_args(Form)))}")
    if not 0 <= warmup < total:
        raise ValueError(f"warmup={warmup}: it must be at least 0 and less than the run's {total} updates")
    if not 0 <= update < total:
        raise ValueError(f"update={update}: it must be at least 0 and less than the run's {total} updates")
    for name, value in (("base", base), ("power", power), ("end", end), ("start", start or 0.0), ("factor", factor)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value}: it must be finite and at least 0")
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


def scaled_lr(base: float, batch: int, rule: Literal["linear", "sqrt"] = "linear", base_batch: int = 256) -> float:
    """Return the learning rate for a batch of `batch` samples, where `base` is the rate for `base_batch` samples.

    ``"linear"``: ``base * batch / base_batch``. ``"sqrt"``: ``base * sqrt(batch / base_batch)``.

    Source of the linear rule: Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 2.1. Raises `ValueError` for
    an unknown rule, and for a rate or batch that is not finite and above 0.
    """
    if rule not in ("linear", "sqrt"):
        raise ValueError(f"rule={rule!r}: choose 'linear' or 'sqrt'")
    for name, value in (("base", base), ("batch", batch), ("base_batch", base_batch)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value}: it must be finite and above 0")
    return base * batch / base_batch if rule == "linear" else base * math.sqrt(batch / base_batch)
