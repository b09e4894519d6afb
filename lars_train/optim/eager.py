"""Step torch's optimizers without importing torch's compiler, which takes up to two seconds at start-up."""

from __future__ import annotations

from torch.optim import Optimizer


def avoid_dynamo_import() -> None:
    """Stop torch's optimizers from importing ``torch._dynamo`` when their methods are first called.

    torch 2.14 wraps the methods that are excluded from compilation (`torch._disable_dynamo`). On its first call, a
    wrapper imports ``torch._dynamo`` and caches the function to call. `avoid_dynamo_import` puts the unwrapped method
    into that cache. The steps of torch's own classes still import ``torch._dynamo``, but LARS over SGD on the CPU does
    not call them. Use this function only if the optimizers run outside compiled code. If torch wraps the methods in
    another way, the function does nothing.
    """
    for name in dir(Optimizer):
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            method.__dynamo_disable = method
