"""Step torch's optimizers without importing torch's compiler, which takes up to two seconds at start-up."""

from __future__ import annotations

from torch.optim import Optimizer


def avoid_dynamo_import() -> None:
    """Keep the methods of torch's optimizers that are excluded from compilation from importing ``torch._dynamo``.

    torch 2.14 wraps these methods (`torch._disable_dynamo`). At its first call a wrapper imports ``torch._dynamo`` to
    create the function that it calls from then on; this function provides the unwrapped method instead. The steps of
    torch's own classes still import it, but LARS over SGD on the CPU does not call them. Use this only for optimizers
    that are called outside of compiled code. It does nothing if torch wraps the methods in another way.
    """
    for name in dir(Optimizer):
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            method.__dynamo_disable = method
