"""Measures ghost batch norm, forward and backward, beside `nn.BatchNorm2d` over the same micro-batch.

    python scripts/bench_batchnorm.py                     # the CPU in one thread, a minute; prints Markdown
    python scripts/bench_batchnorm.py --device cuda --dtype bfloat16
    python scripts/bench_batchnorm.py --device cuda --dtype bfloat16 --compile

The shapes are those of ResNet-50 at 224 pixels, in channels_last. All contenders run in one process; a round times
each of them once per shape, one after another, starting one contender further on than the last round did. Ratios are
taken within a round. The median and the 10th to 90th percentile over the rounds are printed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lars_train.models.batchnorm import GhostBatchNorm2d

# Channels, and height and width, of the batch norms of ResNet-50 (He et al. 2016, https://arxiv.org/abs/1512.03385,
# table 1).
SHAPES = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
WARM_UP = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for the device asked for."""
    args = arguments(argv)
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    dtype: torch.dtype = getattr(torch, args.dtype)
    print(f"{described(device)}, torch {torch.__version__}, {args.dtype}{', compiled' if args.compile else ''}.")
    print(f"{args.samples} samples, {args.ghosts} ghost batches; {args.rounds} rounds; median (10th to 90th).\n")
    print("| C, H x W | plain, ms | one ghost batch, ratio | ghost batches, ms | ghost batches, ratio |")
    print("|---|---|---|---|---|")
    totals = [0.0, 0.0]
    for channels, side in SHAPES:
        x = torch.randn(args.samples, channels, side, side, device=device).to(dtype)
        runs = contenders(x.contiguous(memory_format=torch.channels_last), args.ghosts, args.compile)
        plain, one, ghosts = rounds(runs, args.rounds, device)
        cells = [spread(plain, 1e3), ratio(one, plain), spread(ghosts, 1e3), ratio(ghosts, plain)]
        print(f"| {channels}, {side} x {side} | {' | '.join(cells)} |", flush=True)
        totals = [total + statistics.median(times) for total, times in zip(totals, (plain, ghosts), strict=True)]
    print(f"\nSum of the medians: {totals[1] / totals[0]:.2f} times plain.")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of activations")
    parser.add_argument("--samples", type=int, default=64, help="samples of the micro-batch (default: 64)")
    parser.add_argument("--ghosts", type=int, default=8, help="ghost batches of the micro-batch (default: 8)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds per shape (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU (default: 1)")
    parser.add_argument("--compile", action="store_true", help="torch.compile each contender")
    args = parser.parse_args(argv)
    if min(args.samples, args.ghosts, args.threads) < 1 or args.samples % args.ghosts:
        parser.error(f"--samples {args.samples} must be a multiple of --ghosts {args.ghosts}, and all at least 1")
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: percentiles want at least 2")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    return args


def contenders(x: Tensor, ghosts: int, compiled: bool) -> list[Callable[[], None]]:
    """Forward and backward of plain batch norm, of one ghost batch, and of `ghosts`, each over `x`."""
    samples, channels = x.shape[:2]
    layers: list[nn.Module] = [
        nn.BatchNorm2d(channels),
        GhostBatchNorm2d(channels, ghost_batch=samples),
        GhostBatchNorm2d(channels, ghost_batch=samples // ghosts),
    ]
    grad = torch.randn_like(x)

    def run(layer: nn.Module) -> Callable[[], None]:
        layer.to(x.device).train()
        if compiled:
            layer.compile(dynamic=False)

        def forward_and_backward() -> None:
            layer.zero_grad()
            layer(x.detach().requires_grad_()).backward(grad)

        return forward_and_backward

    return [run(layer) for layer in layers]


def rounds(runs: Sequence[Callable[[], None]], count: int, device: torch.device) -> list[list[float]]:
    """Seconds of each of `runs` in each round."""
    times: list[list[float]] = [[] for _ in runs]
    for number in range(WARM_UP + count):
        for position in range(len(runs)):
            which = (number + position) % len(runs)
            taken = seconds(runs[which], device)
            if number >= WARM_UP:
                times[which].append(taken)
    return times


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Wall time of one run, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def ratio(times: Sequence[float], plain: Sequence[float]) -> str:
    """The spread of the ratios, each taken within a round."""
    return spread([t / p for t, p in zip(times, plain, strict=True)])


def spread(values: Sequence[float], unit: float = 1.0) -> str:
    """Median and 10th to 90th percentile, times `unit`."""
    tenths = statistics.quantiles([v * unit for v in values], n=10, method="inclusive")
    return f"{tenths[4]:.2f} ({tenths[0]:.2f} to {tenths[8]:.2f})"


def described(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"


if __name__ == "__main__":
    main()
