"""Learning-rate schedulers for any torch optimizer, per update: a warm-up, then a decay.

They set the rates that `learning_rate` computes. With `LARS`, pass LARS or its base: they share their parameter groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .schedule import COSINE, STEPS, check_counts, check_not_negative, learning_rate


class _WarmupScheduler(LRScheduler):
    """Set the lr of each group by `learning_rate`, with the group's initial lr as its base rate.

    `end_factor` and `start_factor` are relative to the initial lr, so groups with different lrs keep their proportion.
    `settings` are further arguments of `learning_rate`. Without `total`, the schedule has no end.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int,
        total: int | None,
        end_factor: float,
        start_factor: float | None,
        last_epoch: int,
        **settings: Any,
    ) -> None:
        check_counts(warmup=warmup, **({} if total is None else {"total": total}))
        check_not_negative(end_factor=end_factor, start_factor=start_factor or 0.0)
        self.warmup, self.total, self.end_factor, self.start_factor = warmup, total, end_factor, start_factor
        self.settings = settings
        self._rate(0, 1.0)  # raises for bad settings
        super().__init__(optimizer, last_epoch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a scheduler, arguments included. Raises `ValueError` for that of another class."""
        if state_dict.get("settings", {}).keys() != self.settings.keys():
            raise ValueError(f"the state dict is not of {type(self).__name__}: load it into the class that saved it")
        super().load_state_dict(state_dict)

    def get_lr(self) -> list[Any]:
        """Return the lr of each group for the coming update, ``last_epoch``, counted from 0."""
        update = self.last_epoch
        return [
            base * self._rate(update, 1.0) if isinstance(base, Tensor) else self._rate(update, base)
            for base in self.base_lrs
        ]

    def _rate(self, update: int, base: float) -> float:
        if self.total is not None and update >= self.total > self.warmup:
            return base * self.end_factor
        return learning_rate(
            update,
            total=max(update, self.warmup) + 1 if self.total is None else self.total,
            warmup=self.warmup,
            base=base,
            end=base * self.end_factor,
            start=None if self.start_factor is None else base * self.start_factor,
            **self.settings,
        )


class WarmupCosine(_WarmupScheduler):
    """Raise the lr linearly during a warm-up, then lower it along half a period of the cosine.

    Call ``step()`` after each update of the optimizer. After `total` updates the lr keeps its final value. The peak of
    each parameter group is the lr that the group had when the scheduler was created. The scheduler resumes from its
    `state_dict`, arguments included.

    Args:
        optimizer: any torch optimizer; LARS or its base.
        warmup: updates of the warm-up, W; 0 for no warm-up.
        total: updates of the run, warm-up included; more than `warmup`.
        end_factor: the lr after `total` updates, as a fraction of the peak. The last update has a slightly higher lr.
        start_factor: the lr of update 0, as a fraction of the peak, which the lr reaches at update W. None: update u
            has (u + 1) / W of the peak, so the lr of update 0 is above 0.
        last_epoch: torch's name for the number of the last update made, from 0; -1 for a new schedule.

    Raises:
        ValueError: an argument is out of range, or a number of updates is not whole.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int,
        total: int,
        *,
        end_factor: float = 0.0,
        start_factor: float | None = None,
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, warmup, total, end_factor, start_factor, last_epoch, form=COSINE)


class WarmupPoly(_WarmupScheduler):
    """Raise the lr linearly during a warm-up, then lower it as a power of the share of the run that is left.

    The other arguments are those of `WarmupCosine`.

    Args:
        power: the exponent of the decay.
        form: ``"whole"``: the share is of the whole run, warm-up included, so the lr drops at the end of the warm-up
            (the LARS paper). ``"restart"``: the share is of the updates after the warm-up (NUS-HPC; also MLPerf, whose
            `total` is larger by 1).

    Raises:
        ValueError: an argument is out of range, or a number of updates is not whole.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int,
        total: int,
        power: float,
        form: Literal["whole", "restart"],
        *,
        end_factor: float = 0.0,
        start_factor: float | None = None,
        last_epoch: int = -1,
    ) -> None:
        if form not in ("whole", "restart"):
            raise ValueError(f"form={form!r}: choose 'whole' or 'restart'")
        super().__init__(optimizer, warmup, total, end_factor, start_factor, last_epoch, form=form, power=power)


class WarmupSteps(_WarmupScheduler):
    """Raise the lr linearly during a warm-up, then multiply it by `factor` at each update in `steps`.

    The schedule has no end. The other arguments are those of `WarmupCosine`.

    Args:
        steps: updates, counted from 0, in increasing order, none before the end of the warm-up.
        factor: the factor of each step.

    Raises:
        ValueError: an argument is out of range, or a number of updates is not whole.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int,
        steps: Sequence[int],
        factor: float = 0.1,
        *,
        start_factor: float | None = None,
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(steps, Iterable):
            raise ValueError(f"steps={steps!r}: give a list of updates, e.g. [{steps!r}]")
        check_counts(warmup=warmup, **{f"steps[{i}]": step for i, step in enumerate(steps)})
        if not all(before < after for before, after in pairwise([warmup - 1, *steps, math.inf])):
            raise ValueError(f"steps={list(steps)}: give updates in increasing order, none before warmup={warmup}")
        settings = {"form": STEPS, "steps": list(steps), "factor": factor}
        super().__init__(optimizer, warmup, None, 0.0, start_factor, last_epoch, **settings)
