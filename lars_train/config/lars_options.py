"""Map the options, choices and presets of LARS to config keys. This module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lars_train.errors import ConfigError, did_you_mean
from lars_train.optim import options
from lars_train.optim.options import DEFAULTS, PRESETS

if TYPE_CHECKING:
    from lars_train.config.schema import OptimizerConfig

# IEEE 754 binary32: the largest number, and the smallest above 0.
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
FLOAT32_MIN = 2.0**-149
NONE: Final = "none"
"""The value of `clip` and `clamp` that stands for None. A null would be filled in from the recipe's row."""

# The option `weight_decay` has the key `decay_placement`, because `optimizer.weight_decay` is the amount of decay.
_NAMES: Final = {name: "decay_placement" if name == "weight_decay" else name for name in DEFAULTS}
LARS_OPTIONS: Final = tuple(_NAMES.values())

CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "optimizer.preset": tuple(PRESETS),
    **{f"optimizer.{_NAMES[name]}": words for name, words in options.CHOICES.items()},
}


def options_of(preset: str, where: str) -> dict[str, Any]:
    """Return all options of the preset as config values, by config key.

    Raises `ConfigError` if there is no such preset; the message begins with `where`.
    """
    if preset not in PRESETS:
        raise ConfigError(
            f"{where}: unknown preset; choose one of {', '.join(PRESETS)}.{did_you_mean(preset, PRESETS)}"
        )
    return {_NAMES[name]: _as_config(value) for name, value in {**DEFAULTS, **PRESETS[preset]}.items()}


def lars_keywords(config: OptimizerConfig) -> dict[str, Any]:
    """Return the keywords of `LARS` that a config sets."""
    keywords = {name: value for name, key in _NAMES.items() if (value := getattr(config, key)) is not None}
    for name in ("clip", "clamp"):
        if keywords.get(name) == NONE:
            keywords[name] = None
    return {name: tuple(value) if isinstance(value, list) else value for name, value in keywords.items()}


def changed_options(config: OptimizerConfig) -> list[str]:
    """Return the options of LARS that differ from the config's preset, as ``key=value``."""
    preset = options_of(config.preset or "torchlars", "optimizer.preset")
    values = {key: getattr(config, key) for key in LARS_OPTIONS}
    return [f"{key}={value}" for key, value in values.items() if value is not None and value != preset[key]]


def check_lars_options(config: OptimizerConfig) -> None:
    """Raise `ConfigError` for options that `LARS` would reject, and for numbers above the largest float32."""
    keywords = {**DEFAULTS, **lars_keywords(config)}
    try:
        options.check_options(keywords, _setting)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    for name in ("eps", "trust_coef", "clip", "clamp"):
        value = keywords[name]
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int | float) and number > FLOAT32_MAX for number in numbers):
            raise ConfigError(f"{_setting(name, value)}: it must be at most {FLOAT32_MAX:.4g}, the largest float32.")


def _setting(name: str, value: Any) -> str:
    """Return an option in the syntax of the command line: ``optimizer.clip=[0,50]``."""
    return f"optimizer.{_NAMES[name]}={_as_config(value)}".replace(" ", "")


def _as_config(value: Any) -> Any:
    return NONE if value is None else list(value) if isinstance(value, tuple) else value
