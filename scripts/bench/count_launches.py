"""Count the kernel launches of an update and of a bare loop, without a GPU.

    python scripts/bench/count_launches.py [--write docs/performance.md]      # ResNet-50

Each operation that computes counts once; views and bare allocations do not count. On a GPU an operation launches one
kernel or a few, also an operation over lists of tensors (`_foreach_...`). The trainer takes its GPU code paths, without
autocast, which would add a cast for each weight and input not cast yet. In an update of several micro-batches, forward
and backward count once per micro-batch, the optimizer once.

Takes about a minute on any CPU. Figures: docs/performance.md.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__, "count_launches")
    PARSER.add_argument("--model", default="resnet50", metavar="NAME", help="(resnet50)")
    PARSER.add_argument(
        "--size", type=shared.positive_int, default=64, help="side of an image in pixels; does not change counts (64)"
    )
    PARSER.add_argument(
        "--ghosts", type=int, default=4, choices=(2, 4), help="ghost batches per micro-batch of 8 images (4)"
    )
    ARGS = PARSER.parse_args()

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from training_steps import CPU, Case, make_trainer, pixels, plain_network

from lars_train.data.loading.loader import Batch
from lars_train.models import ghost_norm
from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.factory import model_names
from lars_train.optim import fused_sgd, rescale
from lars_train.training.device import choose_precision

IMAGES = 8
FORWARD, BACKWARD, OPTIMIZER, REST = PHASES = ("forward", "backward", "optimizer", "rest")
KERNELS = 3  # per direction of ghost batch norm: `normalize` and `gradients` in lars_train/models/ghost_kernels.py
# These allocate, or change a tensor's shape or storage; no kernel runs.
_FREE = (
    "empty",
    "new_empty",
    "detach",
    "_unsafe_view",
    "_reshape_alias",
    "alias",
    "lift_fresh",
    "set_",
    "resize_",
)
_NOT_ON_DEVICE = ("prim::", "profiler::", "aten::promote_types", "aten::result_type")


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Counts operations by the phase of the update."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.phase: str | None = REST
        self.counts: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        plain = name.partition(".")[0]
        free = func.is_view or plain.startswith(_FREE) or f"{space}::{plain}".startswith(_NOT_ON_DEVICE)
        if self.phase is not None and not free:
            self.counts[self.phase][plain] += 1
        return func(*args, **(kwargs or {}))

    def within(self, phase: str | None, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `call` to count its operations in `phase`, or not at all if None."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return call(*args, **kwargs)
            finally:
                self.phase = before

        return counted

    def as_kernels(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `call` to count as the kernels of ghost_kernels.py, which a GPU runs instead."""
        uncounted = self.within(None, call)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.phase is not None:
                self.counts[self.phase]["kernel of ghost batch norm"] += KERNELS
            return uncounted(*args, **kwargs)

        return counted

    def totals(self) -> dict[str, int]:
        """Return the number of operations in each phase."""
        return {phase: sum(counts.values()) for phase, counts in self.counts.items()}


def bare_loop(case: Case) -> dict[str, int]:
    """Count the operations of a bare loop: forward, backward, and torch's SGD over lists of tensors."""
    model = plain_network(case).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, foreach=True)
    images, labels = pixels(case)
    found = Launches()

    def step() -> None:
        values = images.float()
        loss = found.within(FORWARD, lambda: functional.cross_entropy(model(values), labels))()
        found.within(BACKWARD, torch.autograd.backward)(loss)
        found.within(OPTIMIZER, optimizer.step)()
        optimizer.zero_grad(set_to_none=True)

    step()
    with found:
        step()
    return found.totals()


def update(case: Case, ghosts: int, *, measure: bool = False, triton: bool = True) -> dict[str, int]:
    """Count the operations of a trainer's update of one micro-batch of `ghosts` ghost batches.

    Args:
        measure: include the measurements for a log line.
        triton: count the Triton kernels of ghost batch norm.
    """
    trainer = make_trainer(case, case.images // ghosts, choose_precision("fp32", CPU))
    optimizer = trainer.optimizer
    for group in optimizer.param_groups:
        group["foreach"] = True  # torch's own choice on a GPU
    images, labels = pixels(case)
    with gpu_paths():
        trainer.run_update(iter([Batch(images, labels, ())]), 1, measure=False)
        found = Launches()
        trainer.forward = found.within(FORWARD, trainer.forward)
        step = found.within(OPTIMIZER, optimizer.step)
        with ExitStack() as patches:
            backward = found.within(BACKWARD, torch.autograd.backward)
            patches.enter_context(patch.object(torch.autograd, "backward", backward))
            # The optimizer's step stays: LARS checks that it was not replaced.
            patches.enter_context(patch.object(trainer.scaler, "step", lambda _: step()))
            for name in ("_normalize", "_gradients") if triton else ():
                kernels = found.as_kernels(getattr(ghost_norm, name))
                patches.enter_context(patch.object(ghost_norm, name, kernels))
            patches.enter_context(found)
            trainer.run_update(iter([Batch(images, labels, ())]), 1, measure=measure)
    return found.totals()


@contextmanager
def gpu_paths() -> Iterator[None]:
    """Patch the trainer to take its GPU code paths on the CPU."""

    def at_once(layer: GhostBatchNorm2d, input: Tensor, ghost: int) -> tuple[Tensor, Tensor]:
        alone = len(input) == ghost
        return one_by_one(layer, input, ghost) if alone else layer._at_once(input, len(input) // ghost)

    one_by_one = GhostBatchNorm2d._one_by_one
    with (
        patch.object(fused_sgd, "applies_to", lambda base, rule: False),
        patch.object(rescale, "is_host_tensor", lambda tensor: False),
        patch.object(GhostBatchNorm2d, "_one_by_one", at_once),
    ):
        yield


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Count, print, write."""
    if args.model not in model_names():
        parser.error(f"--model {args.model}: no such network; choose from {', '.join(model_names())}")
    case, ghosts = Case(args.model, IMAGES, args.size, 1000), args.ghosts
    rows = {
        "a bare loop: torch's batch norm, SGD over lists": bare_loop(case),
        "an update, its micro-batch one ghost batch": update(case, 1),
        f"its micro-batch {ghosts} ghost batches": update(case, ghosts),
        "the same before a log line": update(case, ghosts, measure=True),
        f"{ghosts} ghost batches where triton is not installed": update(case, ghosts, triton=False),
    }
    command = shared.command_line(__file__).removeprefix("python ")
    lines = [
        f"Operations of {args.model} that compute (torch {torch.__version__}; `{command}`):",
        "",
        f"| | {' | '.join(PHASES)} | in all |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, totals in rows.items():
        cells = [f"{totals[phase]:,}" for phase in PHASES]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(totals.values()):,} |")
    shared.publish(lines, args.write, "count_launches")


if __name__ == "__main__":
    shared.exit_on_signals()
    main(PARSER, ARGS)
