"""Define the schema of recipes and their rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional


@dataclass
class RowConfig:
    """One row of a recipe. Each field sets the key of the same name in its group; `flip_evaluation` sets
    ``evaluate.flip``.

    `None` for an option of LARS: use the preset's value. `by_epochs`: other values for runs of certain lengths, by the
    number of epochs. `source`: the publication, if it is not the recipe's. `lacks`: what the source has, but lars-train
    lacks; a run prints it at its start.
    """

    optimizer: str = "lars"
    base: str = "SGD"
    kwargs: dict[str, Any] = field(default_factory=dict)
    lr: Optional[float] = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_norm_bias: bool = True
    adapt_norm_bias: bool = True
    preset: str = "torchlars"
    eps: Optional[float] = None
    trust_coef: Optional[float] = None
    ratio_of: Optional[str] = None
    denominator: Optional[str] = None
    clip: Any = None
    zero_norm: Optional[str] = None
    zero_decay: Optional[str] = None
    decay_placement: Optional[str] = None
    ratio_placement: Optional[str] = None
    lr_placement: Optional[str] = None
    clamp: Any = None
    warmup_epochs: float = 0.0
    warmup_start: Any = "step"
    form: str = "whole"
    power: float = 2.0
    end_lr: float = 0.0
    steps: list[float] = field(default_factory=list)
    step_factor: float = 0.1
    epochs: int = 90
    label_smoothing: float = 0.0
    loss: str = "cross_entropy"
    bce_threshold: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    auto: str = "none"
    randaugment_ops: int = 2
    randaugment_magnitude: int = 9
    zero_gamma: bool = False
    min_crop: float = 0.08
    train_size: Optional[int] = None
    eval_size: Optional[int] = None
    size_schedule: Optional[list[int]] = None
    eval_resize: Optional[int] = None
    ghost_batch: int = 32
    blurpool: bool = False
    flip_evaluation: bool = False
    published_top1: Optional[float] = None
    source: Optional[str] = None
    by_epochs: dict[str, Any] = field(default_factory=dict)
    lacks: list[str] = field(default_factory=list)


@dataclass
class RecipeConfig:
    """A published set of hyper-parameters: values common to all batches, and one row per batch."""

    name: str = "torchlars"
    """The name of the recipe."""
    source: str = ""
    """The publication that gives the values."""
    common: dict[str, Any] = field(default_factory=dict)
    """Values for all rows."""
    rows: dict[str, Any] = field(default_factory=dict)
    """One row per batch, by `batch.name`."""

    def row(self, name: str, epochs: Optional[int] = None) -> dict[str, Any]:
        """Return the values that the recipe gives row `name` for a run of `epochs` epochs (None: the row's length)."""
        values = {**self.common, **self.rows[name]}
        lengths = values.pop("by_epochs", {})
        return {**values, **lengths.get(str(epochs or values.get("epochs")), {})}
