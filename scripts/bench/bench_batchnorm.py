"""Time ghost batch norm, forward and backward, beside `nn.BatchNorm2d` over the same micro-batch.

    python scripts/bench/bench_batchnorm.py                     # the CPU in one thread
    python scripts/bench/bench_batchnorm.py --device cuda --dtype bfloat16

The shapes are those of ResNet-50 at 224 pixels, in channels_last. On CUDA, ghost batches are normalized three ways: by
Triton kernels (a layer's default), by separate torch operations, and by the same operations compiled. Each round times
every contender once per shape and starts one contender later than the round before. On CUDA a time is the mean of 20
calls, queued without waiting, as in training. Ratios are taken within a round.

Takes about a minute. Figures: docs/same_curve.md.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__)
    PARSER.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(cpu)")
    PARSER.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of activations")
    PARSER.add_argument("--samples", type=shared.positive_int, help="per micro-batch (64, on CUDA 256)")
    PARSER.add_argument("--ghosts", type=shared.positive_int, default=8, help="ghost batches per micro-batch (8)")
    PARSER.add_argument("--rounds", type=shared.positive_int, default=15, help="rounds per shape, at least 2 (15)")
    ARGS = PARSER.parse_args()

import torch
from torch import Tensor, nn

from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.ghost_norm import without_kernels

# Channels, and height and width, of the batch norms of ResNet-50 (He et al. 2016, https://arxiv.org/abs/1512.03385,
# table 1).
SHAPES = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
WARM_UP, CUDA_CALLS = 2, 20
COMPILED = "compiled"
Run = Callable[[], None]


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Check the arguments, measure, and print the table row by row."""
    cuda = args.device == "cuda"
    samples = args.samples or (256 if cuda else 64)
    if samples % args.ghosts or args.rounds < 2:
        parser.error(f"--samples {samples} must be a multiple of --ghosts {args.ghosts}, and --rounds at least 2")
    shared.require_cuda(parser, args.device)
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if cuda else f"{shared.cpu_name()}, one thread"
    print(f"{where}, torch {torch.__version__}, {args.dtype}.")
    print(f"{samples} samples, {args.ghosts} ghost batches; {args.rounds} rounds; median (10th to 90th).\n")
    totals: dict[str, float] = {}
    for channels, side in SHAPES:
        x = torch.randn(samples, channels, side, side, device=args.device).to(getattr(torch, args.dtype))
        runs = contenders(x.contiguous(memory_format=torch.channels_last), args.ghosts)
        times = measure(runs, args.rounds, CUDA_CALLS if cuda else 1)
        plain = times.pop("plain")
        if not totals:
            print(f"| C, H x W | plain, ms | {' | '.join(f'{name}, ratio' for name in times)} |")
            print("|---" * (2 + len(times)) + "|")
        cells = [spread([1e3 * t for t in plain])]
        cells += [spread([t / p for t, p in zip(own, plain, strict=True)]) for own in times.values()]
        print(f"| {channels}, {side} x {side} | {' | '.join(cells)} |", flush=True)
        for name, own in {"plain": plain, **times}.items():
            totals[name] = totals.get(name, 0.0) + statistics.median(own)
    sums = [f"{name} {total / totals['plain']:.2f}" for name, total in totals.items() if name != "plain"]
    print(f"\nSums of the medians, times plain: {', '.join(sums)}.")


def contenders(x: Tensor, ghosts: int) -> dict[str, Run]:
    """Return functions that run forward and backward over `x`, by contender."""
    samples, channels = x.shape[:2]
    grad = torch.randn_like(x)

    def run(layer: nn.Module, *, kernels: bool = True) -> Run:
        layer.to(x.device).train()

        def forward_and_backward() -> None:
            layer.zero_grad()
            with nullcontext() if kernels else without_kernels():
                layer(x.detach().requires_grad_()).backward(grad)

        return forward_and_backward

    def ghost(count: int, *, compiled: bool = False) -> nn.Module:
        layer = GhostBatchNorm2d(channels, ghost_batch=samples // count)
        if compiled:
            layer.compile(dynamic=False)
        return layer

    runs = {
        "plain": run(nn.BatchNorm2d(channels)),
        "one ghost batch": run(ghost(1)),
        "ghost batches": run(ghost(ghosts)),
    }
    if x.device.type == "cuda":
        runs["by torch's operations"] = run(ghost(ghosts), kernels=False)
        runs[COMPILED] = run(ghost(ghosts, compiled=True))
        try:
            runs[COMPILED]()
        except Exception as error:  # anything that a compiler raises
            print(f"torch.compile fails here: {shared.first_line(error)}", file=sys.stderr)
            del runs[COMPILED]
    return runs


def measure(runs: dict[str, Run], rounds: int, calls: int) -> dict[str, list[float]]:
    """Return the seconds of a call of each contender in each round."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARM_UP + rounds):
        for position in range(len(names)):
            name = names[(number + position) % len(names)]
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                runs[name]()
            synchronize()
            if number >= WARM_UP:
                times[name].append((time.perf_counter() - start) / calls)
    return times


def synchronize() -> None:
    """Wait for a GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> str:
    """Format the median and the 10th to 90th percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return f"{tenths[4]:.2f} ({tenths[0]:.2f} to {tenths[8]:.2f})"


if __name__ == "__main__":
    main(PARSER, ARGS)
