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

# The share of the device's peak (utilisation.py) that training reaches at least, where it is not of tiny networks.
_LEAST_EFFICIENCY = 0.02
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


def longest_time(images: float, flops_per_image: float, peak_flops: float) -> float:
    """Seconds that a device needs for so many images at most, at a fiftieth of its peak."""
    return images * flops_per_image / (_LEAST_EFFICIENCY * peak_flops)


def decide(
    wanted: bool | str,
    kept: bool | None,
    at_most: float,
    *,
    timed: Callable[[], float],
    attempt: Callable[[], Trial],
    problem: Callable[[], str | None],
    compute: torch.dtype,
    say: Callable[[str], None],
) -> bool:
    """Whether to compile, for one rank; says what it does before it does it, and why.

    Args:
        wanted: ``compile`` of the config.
        kept: what the run has decided before; None for a new one.
        at_most: seconds that the run takes at most, a first guess.
        timed: the same as the device is timed; asked where the guess is long enough.
        attempt: a trial; it may raise anything.
        problem: what keeps torch.compile from working here, None if nothing does; it may take some seconds.
        compute: in which the products are computed.

    Raises `ConfigError` where ``compile=true`` cannot be done.
    """
    if wanted is False or (wanted == AUTO and not kept and at_most < WORTH_SECONDS):
        return False
    if wanted is True or kept:
        say(f"compile        on: each size of a micro-batch is compiled when it first comes, {_COST}")
        reason = problem()
        if reason is None:
            return True
        if wanted is True:
            raise ConfigError(f"compile=true: {reason}; compile=auto does without.")
        say(f"compile        off: {reason}; the run was compiled until now")
        return False
    if kept is False:
        say("compile        off, as in this run so far; compile=true has the rest of it compiled")
        return False
    seconds = timed()
    if seconds < WORTH_SECONDS:
        return False
    reason = problem()
    if reason is not None:
        say(f"compile        off: {reason}")
        return False
    say(f"compile        trying torch.compile for a run of {seconds / 3600:,.0f} hours or so, {_COST}")
    try:
        trial = attempt()
    except Exception as error:  # whatever the compiler, or the compiler's compiler, raises
        say(f"compile        off: {_broken(error)}")
        return False
    if not trial.apart <= _APART[compute]:
        say(f"compile        off: what it computes is {trial.apart:.2g} off, more than rounding")
        return False
    faster = trial.compiled < trial.eager
    times = f"{trial.compiled:.3g} s a micro-batch, {trial.eager:.3g} s without"
    say(f"compile        {'on' if faster else 'off'}: {times}")
    return faster


def problem(device: torch.device) -> str | None:
    """Why torch.compile does not work on the device, in words; None if it does. Compiles a line of code to know."""
    missing = missing_tool(device)
    if missing is not None:
        return f"torch.compile wants {missing}, which is not here"
    try:
        _keep_compiled()
        torch.compile(_little, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # as above
        return _broken(error)
    return None


def _little(values: Tensor) -> Tensor:
    return values.relu() + 1


def _broken(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"torch.compile does not work here ({type(error).__name__}: {line})"


def missing_tool(device: torch.device) -> str | None:
    """What torch.compile wants of this machine for the device, and does not find; None where all is there."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton"
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    return None if any(map(shutil.which, compilers)) else "a C++ compiler"


def attempt(network: nn.Module, samples: int, image_size: int, precision: Precision, device: torch.device) -> Trial:
    """A forward and backward pass of `samples` images by a copy of `network` in training, both ways; the host waits."""
    shadow, images = _shadow(network, samples, image_size, precision, device)
    eager, expected = _timed(shadow, shadow, images, precision, device)
    compiled, got = _timed(compiled_of(shadow), shadow, images, precision, device)
    apart = max(
        float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))
        for ours, theirs in zip(got, expected, strict=True)
    )
    return Trial(eager, compiled, apart)


def timed_samples(device: torch.device, ghost_batch: int, micro_batch: int) -> int:
    """How many images to time a pass of, so that it tells the pace of a run whose micro-batches have `micro_batch`.

    On a CPU those of one ghost batch, which take it no longer each. A GPU is not busy with so few: on an H100 an image
    of ResNet-50 took three times as long among 32 as among 256 (docs/performance.md).
    """
    return ghost_batch if device.type == "cpu" else micro_batch


def eager_time(network: nn.Module, samples: int, image_size: int, precision: Precision, device: torch.device) -> float:
    """Seconds of an image in a forward and backward pass of `samples` by a copy of `network`; the host waits."""
    shadow, images = _shadow(network, samples, image_size, precision, device)
    return _timed(shadow, shadow, images, precision, device, times=1)[0] / samples


def _shadow(
    network: nn.Module, samples: int, image_size: int, precision: Precision, device: torch.device
) -> tuple[nn.Module, Tensor]:
    shadow = copy.deepcopy(network).train()
    draw = torch.Generator(device).manual_seed(0)
    images = torch.randn(samples, 3, image_size, image_size, generator=draw, device=device, dtype=precision.weights)
    (weight, *_) = (p for p in shadow.parameters() if p.dim() == 4)
    if weight.is_contiguous(memory_format=torch.channels_last):
        images = images.contiguous(memory_format=torch.channels_last)
    return shadow, images


def compiled_of(network: nn.Module) -> Any:
    """The network through torch.compile: its parameters, other code. Each number of images is compiled apart.

    Few numbers occur in a run, and code for any number of images is slower.
    """
    _keep_compiled()
    return torch.compile(network, dynamic=False)


def _keep_compiled() -> None:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_directory()))


def compiled_directory() -> Path:
    """Where compiled code is kept from run to run: beside the indexes, or where ``TORCHINDUCTOR_CACHE_DIR`` says."""
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or cache_directory().parent / "compiled")


def _timed(
    forward: Any, network: nn.Module, images: Tensor, precision: Precision, device: torch.device, times: int = _TIMED
) -> tuple[float, tuple[Tensor, Tensor]]:
    """Seconds of the quickest pass after a first one; outputs and gradients of the first, float64."""
    best, found = float("inf"), None
    for _ in range(1 + times):
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
