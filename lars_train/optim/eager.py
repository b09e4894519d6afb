"""Optimizers of torch without torch's compiler, the import of which takes up to two seconds of a start."""

from __future__ import annotations

from torch.optim import Optimizer


def leave_compiler_out() -> None:
    """Let the methods of torch's optimizers that are not to be compiled run as they are.

    torch 2.14 wraps them (`torch._disable_dynamo`), and a wrapper imports ``torch._dynamo`` at its first call, to make
    what it then calls; that it finds here already. The steps of torch's own classes import it nevertheless; those of
    LARS over SGD on the CPU do not come to them. For optimizers that are called outside of what is compiled. A torch
    that does it in another way is left as it is.
    """
    for name in dir(Optimizer):
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            method.__dynamo_disable = method
