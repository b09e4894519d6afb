"""The options of LARS as config keys: their names, their words, the presets' values. No torch is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lars_train.errors import ConfigError, nearest
from lars_train.optim import options
from lars_train.optim.options import DEFAULTS, PRESETS

if TYPE_CHECKING:
    from lars_train.config.schema import OptimizerConfig

# IEEE 754 binary32: the largest number, and the smallest above 0.
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
FLOAT32_MIN = 2.0**-149
NONE: Final = "none"
"""How a config says None for `clip` and `clamp`: null means "as the recipe's row says"."""

# `weight_decay` is a number's name in the config already.
_NAMES: Final = {name: "decay_placement" if name == "weight_decay" else name for name in DEFAULTS}
LARS_OPTIONS: Final = tuple(_NAMES.values())

CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "optimizer.preset": tuple(PRESETS),
    **{f"optimizer.{_NAMES[name]}": words for name, words in options.CHOICES.items()},
}


def options_of(preset: str, where: str) -> dict[str, Any]:
    """All options of the preset by their config keys, as config values. Raises `ConfigError`, which names `where`."""
    if preset not in PRESETS:
        raise ConfigError(
            f"{where}: there is no such preset; there are {', '.join(PRESETS)}.{nearest(preset, PRESETS)}"
        )
    return {_NAMES[name]: _as_config(value) for name, value in {**DEFAULTS, **PRESETS[preset]}.items()}


def lars_keywords(config: OptimizerConfig) -> dict[str, Any]:
    """The keywords of `LARS` that a config asks for; those that it leaves open are not among them."""
    keywords = {name: value for name, key in _NAMES.items() if (value := getattr(config, key)) is not None}
    for name in ("clip", "clamp"):
        if keywords.get(name) == NONE:
            keywords[name] = None
    return {name: tuple(value) if isinstance(value, list) else value for name, value in keywords.items()}


def changed_options(config: OptimizerConfig) -> list[str]:
    """The options of LARS, as ``key=value``, that are not as the config's preset has them."""
    preset = options_of(config.preset or "torchlars", "optimizer.preset")
    values = {key: getattr(config, key) for key in LARS_OPTIONS}
    return [f"{key}={value}" for key, value in values.items() if value is not None and value != preset[key]]


def check_lars_options(config: OptimizerConfig) -> None:
    """Raise `ConfigError` for a `clip` or `clamp` that is none, and for options that do not go together."""
    clip, clamp = config.clip, config.clamp
    if clip is not None and clip not in (NONE, "lr") and not _are_bounds(clip):
        raise ConfigError(f"optimizer.clip={clip}: give {NONE}, lr, or two bounds such as [0,50].")
    if clamp is not None and clamp != NONE and not (_is_number(clamp) and clamp > 0):
        raise ConfigError(f"optimizer.clamp={clamp}: give {NONE}, or a number above 0.")
    if config.ratio_placement == "outside" and config.lr_placement == "inside":
        raise ConfigError(
            "optimizer.ratio_placement=outside does not go with optimizer.lr_placement=inside: "
            "no known rule combines them so; change one of them."
        )
    if config.decay_placement == "base" and (config.ratio_placement, config.lr_placement) != ("inside", "outside"):
        raise ConfigError(
            "optimizer.decay_placement=base goes with optimizer.ratio_placement=inside and "
            "optimizer.lr_placement=outside only; change one of them."
        )


def _are_bounds(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and 0 <= value[0] <= value[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def _as_config(value: Any) -> Any:
    return NONE if value is None else list(value) if isinstance(value, tuple) else value
