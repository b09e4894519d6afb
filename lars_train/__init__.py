"""lars-train: large-batch training of ResNets on ImageNet with LARS, at batches of 256 to 64K.

The public API: `train`, `evaluate` and `plan` do what the command line does. `lars_train.optim` can be used alone. It
has the optimizer `LARS`; `parameter_groups` and `split_parameters` for its parameters; the `learning_rate` schedule
with the schedulers `WarmupCosine`, `WarmupPoly` and `WarmupSteps`; and `scaled_lr`. All are imported on first use, so
that the command line prints ``--help`` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lars_train import optim
from lars_train.optim import __version__ as __version__

if TYPE_CHECKING:
    from lars_train.api import evaluate as evaluate
    from lars_train.api import plan as plan
    from lars_train.api import train as train
    from lars_train.errors import ConfigError as ConfigError
    from lars_train.errors import DataError as DataError
    from lars_train.errors import Diverged as Diverged
    from lars_train.errors import Stopped as Stopped
    from lars_train.optim import LARS as LARS
    from lars_train.optim import WarmupCosine as WarmupCosine
    from lars_train.optim import WarmupPoly as WarmupPoly
    from lars_train.optim import WarmupSteps as WarmupSteps
    from lars_train.optim import learning_rate as learning_rate
    from lars_train.optim import parameter_groups as parameter_groups
    from lars_train.optim import scaled_lr as scaled_lr
    from lars_train.optim import split_parameters as split_parameters

__all__ = [
    "LARS",
    "ConfigError",
    "DataError",
    "Diverged",
    "Stopped",
    "WarmupCosine",
    "WarmupPoly",
    "WarmupSteps",
    "__version__",
    "evaluate",
    "learning_rate",
    "parameter_groups",
    "plan",
    "scaled_lr",
    "split_parameters",
    "train",
]
_MODULES = {
    **dict.fromkeys(("evaluate", "plan", "train"), "lars_train.api"),
    **dict.fromkeys(("ConfigError", "DataError", "Diverged", "Stopped"), "lars_train.errors"),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name in __all__:
        return getattr(optim, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
