"""Define the options of LARS, their defaults and checks, and the presets of other implementations.

To add an option, add a field to `Options` and a keyword to `LARS`. If it is also a config key, add a field to
`OptimizerConfig` and `RowConfig`. This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of LARS with their defaults. `LARS` describes each of them.

    Raises:
        ValueError: an option is out of range or not one of its choices, or two options conflict.
    """

    eps: float = 1e-8
    trust_coef: float = 0.001
    ratio_of: Literal["gradient", "step"] = "gradient"
    denominator: Literal["split", "combined"] = "split"
    clip: Literal["lr"] | tuple[float, float] | None = None
    zero_norm: Literal["decay", "skip"] = "decay"
    zero_decay: Literal["adapt", "skip"] = "adapt"
    weight_decay: Literal["coupled", "base"] = "coupled"
    ratio_placement: Literal["inside", "outside"] = "inside"
    lr_placement: Literal["outside", "inside"] = "outside"
    clamp: float | None = None

    def __post_init__(self) -> None:
        check_options(vars(self))
        clip: Any = self.clip
        if isinstance(clip, list):  # from a state dict or a config
            object.__setattr__(self, "clip", tuple(clip))


# Pairs of options that no known rule combines.
_CONFLICTS = (
    (("ratio_placement", "outside"), ("lr_placement", "inside")),
    (("weight_decay", "base"), ("ratio_placement", "outside")),
    (("weight_decay", "base"), ("lr_placement", "inside")),
    # With ratio_of="step", the weight decay is part of the step, and the ratio is outside the momentum.
    (("ratio_of", "step"), ("denominator", "combined")),
    (("ratio_of", "step"), ("zero_norm", "skip")),
    (("ratio_of", "step"), ("weight_decay", "base")),
    (("ratio_of", "step"), ("ratio_placement", "outside")),
    (("ratio_of", "step"), ("lr_placement", "inside")),
)


def _as_keyword(name: str, value: Any) -> str:
    return f"{name}={value!r}"


def check_options(options: Mapping[str, Any], setting: Callable[[str, Any], str] = _as_keyword) -> None:
    """Raise `ValueError` if an option is out of range or not one of its choices, or if two options conflict.

    Args:
        options: the value of every option, by name.
        setting: formats an option's name and value for messages, as the user would write them.
    """
    for name in ("eps", "trust_coef", "clamp"):
        value = options[name]
        if not _is_number(value) and not (name == "clamp" and value is None):
            raise ValueError(f"{setting(name, value)}: it must be a number")
    eps, trust_coef, clamp = options["eps"], options["trust_coef"], options["clamp"]
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{setting('eps', eps)}: it must be finite and at least 0")
    if not (math.isfinite(trust_coef) and trust_coef > 0):
        raise ValueError(f"{setting('trust_coef', trust_coef)}: it must be finite and above 0")
    if clamp is not None and not clamp > 0:
        raise ValueError(f"{setting('clamp', clamp)}: give a number above 0, or {setting('clamp', None)}")
    for name, choices in CHOICES.items():
        if options[name] not in choices:
            raise ValueError(f"{setting(name, options[name])}: choose one of {', '.join(map(repr, choices))}")
    clip = options["clip"]
    if clip is not None and clip != "lr" and not _are_bounds(clip):
        raise ValueError(
            f"{setting('clip', clip)}: give {setting('clip', None)}, {setting('clip', 'lr')}, or two bounds such as "
            f"{setting('clip', (0, 50))}"
        )
    clamped_step = (("ratio_of", "step"), ("clamp", clamp))
    for pair in _CONFLICTS if clamp is None else (*_CONFLICTS, clamped_step):
        if all(options[name] == value for name, value in pair):
            one, other = (setting(name, value) for name, value in pair)
            raise ValueError(f"{one} conflicts with {other}: no known rule combines them; change one of them")


def _are_bounds(clip: Any) -> bool:
    return isinstance(clip, tuple | list) and len(clip) == 2 and all(map(_is_number, clip)) and 0 <= clip[0] <= clip[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


CHOICES: Final[dict[str, tuple[str, ...]]] = {
    name: get_args(hint) for name, hint in get_type_hints(Options).items() if get_origin(hint) is Literal
}
"""The allowed values of each option that is a word."""

DEFAULTS: Final[dict[str, Any]] = asdict(Options())

# Learning rate, momentum and weight decay are settings of the base optimizer: torch's AdamW for lamb, SGD for the rest.
# Parameters that an implementation does not adapt belong in groups with exclude=True; each entry names them.
PRESETS: Final[dict[str, dict[str, Any]]] = {
    # https://github.com/kakaobrain/torchlars: the defaults of `LARS`.
    "torchlars": {},
    # https://github.com/mlcommons/training, image_classification/tensorflow2/lars_optimizer.py. Batch norm and
    # biases: exclude=True, weight_decay=0. An epsilon of 0 there means Keras's default, 1e-7.
    "mlperf": {"eps": 1e-7, "lr_placement": "inside"},
    # https://github.com/huggingface/pytorch-image-models, timm/optim/lars.py. Its always_adapt=True is
    # zero_decay="adapt" here, its trust_clip=True is clip="lr".
    "timm": {"zero_decay": "skip"},
    # https://github.com/NVIDIA/apex, apex/parallel/LARC.py (removed in 2025), with its default clip=True. Its
    # clip=False is clip=None here.
    "larc": {"trust_coef": 0.02, "clip": "lr", "zero_norm": "skip"},
    # https://github.com/google-deepmind/optax, optax.lars. Parameter groups replace its trust_ratio_mask and
    # weight_decay_mask.
    "optax": {"eps": 0.0, "denominator": "combined", "lr_placement": "inside"},
    # https://github.com/NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch, lars.py. Batch norm and biases: exclude=True,
    # weight_decay=0. That implementation also clamps the gradients of batch norm and biases to [-10, 10]; this
    # preset leaves those gradients unchanged.
    "nus-hpc": {"eps": 1e-5, "clip": (0.0, 50.0), "ratio_placement": "outside", "clamp": 10.0},
    # https://pypi.org/project/open-lars 0.1.1. Vectors: exclude=True.
    "open-lars": {"lr_placement": "inside"},
    # https://pypi.org/project/torch-optimizer 0.3.0, LARS.
    "torch-optimizer": {"trust_coef": 0.01, "zero_norm": "skip", "zero_decay": "skip"},
    # https://pypi.org/project/pytorch-optimizer 4.1.0, LARS. Vectors: exclude=True, weight_decay=0. If only the
    # gradient is zero, that implementation's ratio is trust_coef / wd; here the ratio is 1.
    "pytorch-optimizer": {"eps": 0.0},
    # https://github.com/Lightning-Universe/lightning-bolts 0.7, pl_bolts/optimizers/lars.py. The package lightly has a
    # copy (https://pypi.org/project/lightly, lightly/utils/lars.py).
    "bolts": {"zero_norm": "skip", "zero_decay": "skip"},
    # https://github.com/facebookresearch/moco-v3, moco/optimizer.py, as in https://github.com/facebookresearch/barlowtwins,
    # main.py. Vectors: exclude=True, weight_decay=0.
    "moco-v3": {"eps": 0.0, "denominator": "combined"},
    # https://github.com/facebookresearch/swav, main_swav.py: apex's LARC with trust_coefficient=0.001, clip=False.
    # https://github.com/vturrisi/solo-learn, solo/utils/lars.py, has the same rule: clip_lr=True there is clip="lr"
    # here, exclude_bias_n_norm=True is exclude=True, weight_decay=0 for vectors.
    "swav": {"zero_norm": "skip"},
    # https://github.com/open-mmlab/mmpretrain 1.2, mmpretrain/engine/optimizers/lars.py. Its lars_exclude=True is
    # exclude=True here.
    "mmpretrain": {"lr_placement": "inside"},
    # You et al. 2020, https://arxiv.org/abs/1904.00962, Algorithm 2, over AdamW, whose eps is 1e-6 there. timm's Lamb
    # has zero_decay="skip" unless always_adapt=True; its trust_clip=True is clip=(0, 1).
    "lamb": {"eps": 0.0, "trust_coef": 1.0, "ratio_of": "step"},
}
# Other libraries with the same rules. VISSL (https://github.com/facebookresearch/vissl) has SwAV's rule with
# use_larc; its class LARS has the rule of Barlow Twins.
PRESETS["lightly"] = PRESETS["bolts"]
PRESETS["barlowtwins"] = PRESETS["moco-v3"]
PRESETS["vissl"] = PRESETS["solo-learn"] = PRESETS["swav"]
