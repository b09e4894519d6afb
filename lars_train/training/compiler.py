"""Whether a run's network goes through torch.compile: decided once, by trying, where the run is long enough for it.

What compiled code computes differs from eager code in the rounding alone, as another device's does.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lars_train.config import AUTO
from lars_train.data.index_cache import cache_directory
from lars_train.errors import ConfigError
from lars_train.training.device import Precision

WORTH_SECONDS = 3600.0
"""The least that a run takes for which ``compile=auto`` tries. Compiling a ResNet-50 takes one or two minutes, of each
process at each start, and the step gains a few hundredths by it on the devices measured so far (docs/performance.md).
"""

# The share of the device's peak (utilisation.py) that training reaches at most, for a first guess at a run's time.
_EFFICIENCY = 0.5
# Relative differences of outputs and gradients (as one vector) that rounding may make in a network of 50 layers.
_APART = {torch.float64: 1e-6, torch.float32: 2e-2, torch.bfloat16: 0.3, torch.float16: 0.1}
_TIMED = 2
_COST = "a minute or two, less where it was before"


@dataclass(frozen=True)
class Trial:
    """Seconds of a forward and backward pass, eager and compiled; the relative difference of what they compute."""

    eager: float
    compiled: float
    apart: float


def shortest_time(images: float, flops_per_image: float, peak_flops: float) -> float:
    """Seconds that a device needs for so many images at least, with what it can do at its best."""
    return images * flops_per_image / (_EFFICIENCY * peak_flops)


def decide(
    wanted: bool | str,
    kept: bool | None,
    seconds: float,
    attempt: Callable[[], Trial],
    *,
    missing: str | None,
    compute: torch.dtype,
    say: Callable[[str], None],
) -> bool:
    """Whether to compile, for one rank; says what it does before it does it, and why.

    Args:
        wanted: ``compile`` of the config.
        kept: what the run has decided before; None for a new one.
        seconds: that the run takes at least.
        attempt: a trial; it may raise anything.
        missing: `missing_tool` of the device.
        compute: in which the products are computed.

    Raises `ConfigError` where ``compile=true`` cannot be done.
    """
    if wanted is True and missing is not None:
        raise ConfigError(f"compile=true: torch.compile wants {missing}, which is not here; compile=auto does without.")
    if wanted is True or (wanted == AUTO and kept):
        say(f"compile        on: each size of a micro-batch is compiled when it first comes, {_COST}")
        return True
    if wanted is False or kept is False or seconds < WORTH_SECONDS or missing is not None:
        return False
    say(f"compile        trying torch.compile, {_COST}")
    try:
        trial = attempt()
    except Exception as error:  # whatever the compiler, or the compiler's compiler, raises
        reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        say(f"compile        off: torch.compile does not work here ({reason})")
        return False
    if not trial.apart <= _APART[compute]:
        say(f"compile        off: what it computes is {trial.apart:.2g} off, more than rounding")
        return False
    faster = trial.compiled < trial.eager
    times = f"{trial.compiled:.3g} s a micro-batch, {trial.eager:.3g} s without"
    say(f"compile        {'on' if faster else 'off'}: {times}")
    return faster


def missing_tool(device: torch.device) -> str | None:
    """What torch.compile wants of this machine for the device, and does not find; None where all is there."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton"
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    return None if any(map(shutil.which, compilers)) else "a C++ compiler"


def attempt(network: nn.Module, samples: int, image_size: int, precision: Precision, device: torch.device) -> Trial:
    """A forward and backward pass of `samples` images by a copy of `network` in training, both ways; the host waits."""
    shadow = copy.deepcopy(network).train()
    draw = torch.Generator(device).manual_seed(0)
    images = torch.randn(samples, 3, image_size, image_size, generator=draw, device=device, dtype=precision.weights)
    (weight, *_) = (p for p in shadow.parameters() if p.dim() == 4)
    if weight.is_contiguous(memory_format=torch.channels_last):
        images = images.contiguous(memory_format=torch.channels_last)
    eager, expected = _timed(shadow, shadow, images, precision, device)
    compiled, got = _timed(compiled_of(shadow), shadow, images, precision, device)
    apart = max(
        float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))
        for ours, theirs in zip(got, expected, strict=True)
    )
    return Trial(eager, compiled, apart)


def compiled_of(network: nn.Module) -> Any:
    """The network through torch.compile: its parameters, other code. Each number of images is compiled apart.

    Few numbers occur in a run, and code for any number of images is slower.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_directory()))
    return torch.compile(network, dynamic=False)


def compiled_directory() -> Path:
    """Where compiled code is kept from run to run: beside the indexes, or where ``TORCHINDUCTOR_CACHE_DIR`` says."""
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or cache_directory().parent / "compiled")


def _timed(
    forward: Any, network: nn.Module, images: Tensor, precision: Precision, device: torch.device
) -> tuple[float, tuple[Tensor, Tensor]]:
    """Seconds of the quickest pass after a first one; outputs and gradients of the first, float64."""
    best, found = float("inf"), None
    for _ in range(1 + _TIMED):
        network.zero_grad(set_to_none=True)
        started = time.perf_counter()
        with precision.autocast(device):
            outputs = forward(images)
        torch.autograd.backward(outputs.to(precision.weights).square().mean())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if found is None:
            gradients = [p.grad.detach().flatten().double() for p in network.parameters() if p.grad is not None]
            found = outputs.detach().double(), torch.cat(gradients)
        else:
            best = min(best, time.perf_counter() - started)
    assert found is not None
    return best, found
