"""lars-train: large-batch training of ResNets on ImageNet with LARS, at batches of 256 to 64K.

The public API is that of `lars_train.optim`: the optimizer `LARS`, `parameter_groups` and `split_parameters` for its
parameters, the `learning_rate` schedule with the schedulers `WarmupCosine`, `WarmupPoly` and `WarmupSteps`, and
`scaled_lr`. Each can be used alone. They are imported on first use, so that the command line prints ``--help`` without
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lars_train import optim
from lars_train.optim import __version__ as __version__

if TYPE_CHECKING:
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
    "WarmupCosine",
    "WarmupPoly",
    "WarmupSteps",
    "__version__",
    "learning_rate",
    "parameter_groups",
    "scaled_lr",
    "split_parameters",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(optim, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
