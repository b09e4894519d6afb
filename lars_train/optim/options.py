"""The options of LARS: names, defaults and checks, and the values with which other implementations compute.

A new option is a field of `Options` and a keyword of `LARS`; a key of the config is also a field of `OptimizerConfig`
and `RowConfig`. No torch is imported.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of LARS with their defaults; every one is described in `LARS`.

    Raises:
        ValueError: an option is none of its choices or out of range, or two do not go together.
    """

    eps: float = 1e-8
    trust_coef: float = 0.001
    denominator: Literal["split", "combined"] = "split"
    clip: Literal["lr"] | tuple[float, float] | None = None
    zero_norm: Literal["decay", "skip"] = "decay"
    zero_decay: Literal["adapt", "skip"] = "adapt"
    weight_decay: Literal["coupled", "base"] = "coupled"
    ratio_placement: Literal["inside", "outside"] = "inside"
    lr_placement: Literal["outside", "inside"] = "outside"
    clamp: float | None = None

    def __post_init__(self) -> None:
        for name in ("eps", "trust_coef", "clamp"):
            value = getattr(self, name)
            if not isinstance(value, int | float) and not (name == "clamp" and value is None):
                raise ValueError(f"{name}={value!r}: it must be a number")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps={self.eps}: it must be finite and at least 0")
        if not (math.isfinite(self.trust_coef) and self.trust_coef > 0):
            raise ValueError(f"trust_coef={self.trust_coef}: it must be finite and above 0")
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"clamp={self.clamp}: it must be above 0, or None")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, choices))}")
        self._check_clip()
        if self.ratio_placement == "outside" and self.lr_placement == "inside":
            raise ValueError("the ratio outside the momentum and the lr inside it: no known rule combines them so")
        if self.weight_decay == "base" and (self.ratio_placement, self.lr_placement) != ("inside", "outside"):
            raise ValueError("weight_decay='base' goes with ratio_placement='inside' and lr_placement='outside' only")

    def _check_clip(self) -> None:
        if self.clip is None or self.clip == "lr":
            return
        bounds = self.clip
        if (
            not isinstance(bounds, tuple | list)
            or len(bounds) != 2
            or not _are_numbers(bounds)
            or not 0 <= bounds[0] <= bounds[1]
        ):
            raise ValueError(f"clip={bounds!r}: give None, 'lr', or a pair of bounds such as (0, 50)")
        # State dicts and configs bring lists.
        object.__setattr__(self, "clip", tuple(bounds))


def _are_numbers(values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


CHOICES: Final[dict[str, tuple[str, ...]]] = {
    name: get_args(hint) for name, hint in get_type_hints(Options).items() if get_origin(hint) is Literal
}
"""The options that are one of a few words, and the words."""

DEFAULTS: Final[dict[str, Any]] = asdict(Options())

# Learning rate, momentum and weight decay are the base optimizer's, torch's SGD in all of these. Parameters that a rule
# leaves out belong in groups with exclude=True, as each entry says.
PRESETS: Final[dict[str, dict[str, Any]]] = {
    # https://github.com/kakaobrain/torchlars: the defaults of `LARS`.
    "torchlars": {},
    # https://github.com/mlcommons/training, image_classification/tensorflow2/lars_optimizer.py. Batch norm and
    # biases: exclude=True, weight_decay=0. An epsilon of 0 there means Keras's own, 1e-7.
    "mlperf": {"eps": 1e-7, "lr_placement": "inside"},
    # https://github.com/huggingface/pytorch-image-models, timm/optim/lars.py; always_adapt=True there is
    # zero_decay="adapt" here, trust_clip=True is clip="lr".
    "timm": {"zero_decay": "skip"},
    # https://github.com/NVIDIA/apex, apex/parallel/LARC.py (gone since 2025), with its default clip=True;
    # clip=False there is clip=None here.
    "larc": {"trust_coef": 0.02, "clip": "lr", "zero_norm": "skip"},
    # https://github.com/google-deepmind/optax, optax.lars; its trust_ratio_mask and weight_decay_mask are groups.
    "optax": {"eps": 0.0, "denominator": "combined", "lr_placement": "inside"},
    # https://github.com/NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch, lars.py. Batch norm and biases: exclude=True,
    # weight_decay=0; it clamps the elements of their gradients to [-10, 10] too, which is left out here.
    "nus-hpc": {"eps": 1e-5, "clip": (0.0, 50.0), "ratio_placement": "outside", "clamp": 10.0},
    # https://pypi.org/project/open-lars 0.1.1. Vectors: exclude=True.
    "open-lars": {"lr_placement": "inside"},
    # https://pypi.org/project/torch-optimizer 0.3.0, LARS.
    "torch-optimizer": {"trust_coef": 0.01, "zero_norm": "skip", "zero_decay": "skip"},
    # https://pypi.org/project/pytorch-optimizer 4.1.0, LARS. Vectors: exclude=True, weight_decay=0. Where only the
    # gradient is zero its ratio is trust_coef / wd, here 1.
    "pytorch-optimizer": {"eps": 0.0},
}
