"""How many operations an update hands to a device, beside a bare loop's: a GPU's launches, counted without one.

    python scripts/bench/count_launches.py [--write docs/performance.md]      # ResNet-50, a minute on any CPU

Each operation that computes counts once, views and bare allocations not at all. On a GPU an operation is one kernel or
a few; those over lists of tensors (`_foreach_...`) are few for all the tensors. The trainer takes the ways that it has
for a GPU, without autocast, which adds a cast for each weight and input that it has not cast yet. An update of several
micro-batches has the first two columns once for each, and the optimizer's once.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from arguments import count
from bench_step import CPU, Case, pixels, plain_network, trainer_of
from child import end_on_signals
from page import between_markers, command_line, writable_page
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lars_train.data.loading.loader import Batch
from lars_train.models import ghost_norm
from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.factory import model_names
from lars_train.optim import fused_sgd, rescale
from lars_train.training.device import choose_precision

FORWARD, BACKWARD, OPTIMIZER, REST = "forward", "backward", "optimizer", "rest"
PHASES = (FORWARD, BACKWARD, OPTIMIZER, REST)
KERNELS = 3  # of each direction of ghost batch norm: `normalize` and `gradients` in lars_train/models/ghost_kernels.py
# They give a tensor another shape or place; no kernel runs.
_NOTHING = ("empty", "new_empty", "detach", "_unsafe_view", "_reshape_alias", "alias", "lift_fresh", "set_", "resize_")
_NOT_OF_A_DEVICE = ("prim::", "profiler::", "aten::promote_types", "aten::result_type")


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Counts operations, by the phase of the update that they are called in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.phase: str | None = REST
        self.counts: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        plain = name.partition(".")[0]
        nothing = func.is_view or plain.startswith(_NOTHING) or f"{space}::{plain}".startswith(_NOT_OF_A_DEVICE)
        if self.phase is not None and not nothing:
            self.counts[self.phase][plain] += 1
        return func(*args, **(kwargs or {}))

    def within(self, phase: str | None, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose operations count to `phase`; None: to none."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return call(*args, **kwargs)
            finally:
                self.phase = before

        return counted

    def as_kernels(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, which is that many kernels of ghost_kernels.py where there is a GPU."""

        uncounted = self.within(None, call)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.phase is not None:
                self.counts[self.phase]["kernel of ghost batch norm"] += KERNELS
            return uncounted(*args, **kwargs)

        return counted

    def totals(self) -> dict[str, int]:
        """The number of each phase."""
        return {phase: sum(counts.values()) for phase, counts in self.counts.items()}


def bare(case: Case) -> dict[str, int]:
    """A loop of forward, backward and torch's SGD over lists of tensors."""
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


def of_the_trainer(case: Case, ghosts: int, *, measure: bool = False, triton: bool = True) -> dict[str, int]:
    """An update of one micro-batch of so many ghost batches.

    `measure`: one at whose end a log line is due. `triton`: with the kernels of ghost batch norm.
    """
    trainer = trainer_of(case, case.images // ghosts, choose_precision("fp32", CPU))
    optimizer = trainer.optimizer
    for group in optimizer.param_groups:
        group["foreach"] = True  # torch's own choice on a GPU
    images, labels = pixels(case)
    with as_on_a_gpu():
        trainer.run_update(iter([Batch(images, labels, ())]), 1, measure=False)
        found = Launches()
        trainer.forward = found.within(FORWARD, trainer.forward)
        backward = found.within(BACKWARD, torch.autograd.backward)
        step = found.within(OPTIMIZER, optimizer.step)
        with ExitStack() as patches:
            patches.enter_context(patch.object(torch.autograd, "backward", backward))
            # Not of the optimizer itself: LARS looks whether anybody has replaced a step.
            patches.enter_context(patch.object(trainer.scaler, "step", lambda _: step()))
            for name in ("_normalize", "_gradients") if triton else ():
                made = found.as_kernels(getattr(ghost_norm, name))
                patches.enter_context(patch.object(ghost_norm, name, made))
            patches.enter_context(found)
            trainer.run_update(iter([Batch(images, labels, ())]), 1, measure=measure)
    return found.totals()


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The ways that are taken where to read a value is to wait, and where a loop over ghost batches costs launches."""

    def at_once(layer: GhostBatchNorm2d, input: Tensor, ghost: int) -> tuple[Tensor, Tensor]:
        alone = len(input) == ghost
        return one_by_one(layer, input, ghost) if alone else layer._at_once(input, len(input) // ghost)

    one_by_one = GhostBatchNorm2d._one_by_one
    with ExitStack() as patches:
        patches.enter_context(patch.object(fused_sgd, "applies_to", lambda base, rule: False))
        patches.enter_context(patch.object(rescale, "is_host_tensor", lambda tensor: False))
        patches.enter_context(patch.object(GhostBatchNorm2d, "_one_by_one", at_once))
        yield


def rows(case: Case, ghosts: int) -> dict[str, dict[str, int]]:
    """What is counted, by name."""
    return {
        "a bare loop: torch's batch norm, SGD over lists": bare(case),
        "an update, its micro-batch one ghost batch": of_the_trainer(case, 1),
        f"its micro-batch {ghosts} ghost batches": of_the_trainer(case, ghosts),
        "the same before a log line": of_the_trainer(case, ghosts, measure=True),
        f"{ghosts} ghost batches where triton is not installed": of_the_trainer(case, ghosts, triton=False),
    }


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=model_names(), default="resnet50", metavar="NAME", help="(resnet50)")
    parser.add_argument("--images", type=count, default=8, help="in a micro-batch; changes no count (8)")
    parser.add_argument("--size", type=count, default=64, help="their side in pixels; changes no count (64)")
    parser.add_argument("--ghosts", type=count, default=4, help="ghost batches in a micro-batch of several (4)")
    parser.add_argument(
        "--write", type=writable_page("count_launches"), metavar="PAGE", help="put the table between the page's markers"
    )
    args = parser.parse_args()
    if args.images % args.ghosts or args.images // args.ghosts < 2:
        parser.error(f"--ghosts {args.ghosts}: --images {args.images} must be so many times 2 or more")
    case = Case(args.model, args.images, args.size, 1000)
    command = command_line(__file__).removeprefix("python ")
    lines = [
        f"Operations of {args.model} that compute (torch {torch.__version__}; `{command}`):",
        "",
        f"| | {' | '.join(PHASES)} | in all |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, totals in rows(case, args.ghosts).items():
        cells = [f"{totals[phase]:,}" for phase in PHASES]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(totals.values()):,} |")
    print("\n".join(lines))
    if args.write:
        args.write.write_text(between_markers(args.write.read_text(), "count_launches", lines))


if __name__ == "__main__":
    end_on_signals()
    main()
