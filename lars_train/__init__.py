"""lars-train: ResNet-50 on ImageNet with batches of 256 to 64K, at the accuracy of batch 256.

The public API: the optimizer `LARS`, `split_parameters` for its parameter groups, and the `learning_rate` schedule.
Each can be used alone. They are imported on first use, so that the command line prints ``--help`` without torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lars_train.optim.lars import LARS as LARS
    from lars_train.optim.param_groups import split_parameters as split_parameters
    from lars_train.optim.schedule import learning_rate as learning_rate

try:
    __version__ = version("lars-train")
except PackageNotFoundError:
    __version__ = "0+unknown"

_LAZY = {
    "LARS": "lars_train.optim.lars",
    "learning_rate": "lars_train.optim.schedule",
    "split_parameters": "lars_train.optim.param_groups",
}
__all__ = ["LARS", "__version__", "learning_rate", "split_parameters"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
