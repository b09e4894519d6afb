"""LARS around any torch optimizer, with learning-rate schedules and parameter groups.

The distribution ``torch-lars`` contains this folder alone, under the import name ``torch_lars``. The folder therefore
imports only one module from outside: `extensions`, which loads the C kernels. Without `extensions`, LARS uses torch's
kernels. The public names are imported on first use, so that `schedule` can be used without torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lars import LARS as LARS
    from .param_groups import parameter_groups as parameter_groups
    from .param_groups import split_parameters as split_parameters
    from .schedule import learning_rate as learning_rate
    from .schedule import scaled_lr as scaled_lr
    from .schedulers import WarmupCosine as WarmupCosine
    from .schedulers import WarmupPoly as WarmupPoly
    from .schedulers import WarmupSteps as WarmupSteps

try:
    __version__ = version("torch-lars" if __name__ == "torch_lars" else "lars-train")
except PackageNotFoundError:
    __version__ = "0+unknown"

_LAZY = {
    "LARS": "lars",
    "WarmupCosine": "schedulers",
    "WarmupPoly": "schedulers",
    "WarmupSteps": "schedulers",
    "learning_rate": "schedule",
    "parameter_groups": "param_groups",
    "scaled_lr": "schedule",
    "split_parameters": "param_groups",
}
__all__ = [
    "LARS",
    "WarmupCosine",
    "WarmupPoly",
    "WarmupSteps",
    "__version__",
    "learning_rate",
    "parameter_groups",
    "scaled_lr",
    "split_parameters",
]


def __dir__() -> list[str]:
    return list(__all__)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
