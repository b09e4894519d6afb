"""Measures ghost batch norm, forward and backward, beside `nn.BatchNorm2d` over the same micro-batch.

    python scripts/bench/bench_batchnorm.py                     # the CPU in one thread, a minute; prints Markdown
    python scripts/bench/bench_batchnorm.py --device cuda --dtype bfloat16
    python scripts/bench/bench_batchnorm.py --device cuda --dtype bfloat16 --graph

The shapes are those of ResNet-50 at 224 pixels, in channels_last. On CUDA ghost batches are normalised three ways: by
the Triton kernels, which a layer takes, by torch's operations one after another, and by those compiled. All contenders
run in one process; a round times each of them once per shape, one after another, starting one contender further on than
the last round did. On CUDA a time is a share of several calls, which the host queues without waiting, as in training.
Where the host is the slower of the two it is the host's time; `--graph` replays CUDA graphs, and it is the device's.
Ratios are taken within a round. The median and the 10th to 90th percentile over the rounds are printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from page import cpu_name
from torch import Tensor, nn

from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.ghost_norm import without_kernels

# Channels, and height and width, of the batch norms of ResNet-50 (He et al. 2016, https://arxiv.org/abs/1512.03385,
# table 1).
SHAPES = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
WARM_UP = 2
COMPILED = "compiled"


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for the device asked for."""
    args = arguments(argv)
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    dtype: torch.dtype = getattr(torch, args.dtype)
    print(f"{described(device)}, torch {torch.__version__}, {args.dtype}{', CUDA graphs' if args.graph else ''}.")
    print(f"{args.samples} samples, {args.ghosts} ghost batches; {args.rounds} rounds; median (10th to 90th).\n")
    totals: dict[str, float] = {}
    for channels, side in SHAPES:
        x = torch.randn(args.samples, channels, side, side, device=device).to(dtype)
        runs = contenders(x.contiguous(memory_format=torch.channels_last), args.ghosts)
        if COMPILED in runs and (why := fault(runs[COMPILED])):
            print(f"torch.compile does not work here: {why}", file=sys.stderr)
            del runs[COMPILED]
        if args.graph:
            runs = {name: graphed(run) for name, run in runs.items()}
        times = rounds(runs, args.rounds, args.calls, device)
        plain = times.pop("plain")
        if not totals:
            print(f"| C, H x W | plain, ms | {' | '.join(f'{name}, ratio' for name in times)} |")
            print("|---" * (2 + len(times)) + "|")
        cells = [spread(plain, 1e3), *(ratio(taken, plain) for taken in times.values())]
        print(f"| {channels}, {side} x {side} | {' | '.join(cells)} |", flush=True)
        for name, taken in {"plain": plain, **times}.items():
            totals[name] = totals.get(name, 0.0) + statistics.median(taken)
    sums = [f"{name} {total / totals['plain']:.2f}" for name, total in totals.items() if name != "plain"]
    print(f"\nSums of the medians, times plain: {', '.join(sums)}.")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of activations")
    parser.add_argument("--samples", type=int, help="samples of the micro-batch (default: 64, on CUDA 256)")
    parser.add_argument("--ghosts", type=int, default=8, help="ghost batches of the micro-batch (default: 8)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds per shape (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU (default: 1)")
    parser.add_argument("--calls", type=int, help="that a time is taken over (default: 1, on CUDA 20)")
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs")
    args = parser.parse_args(argv)
    cuda = torch.device(args.device).type == "cuda"
    args.samples = args.samples or (256 if cuda else 64)
    args.calls = args.calls or (20 if cuda else 1)
    if min(args.samples, args.ghosts, args.threads, args.calls) < 1 or args.samples % args.ghosts:
        parser.error(
            f"--samples {args.samples} must be a multiple of --ghosts {args.ghosts}, and all numbers at least 1"
        )
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: percentiles want at least 2")
    if args.graph and not cuda:
        parser.error("--graph wants --device cuda")
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    return args


def contenders(x: Tensor, ghosts: int) -> dict[str, Callable[[], None]]:
    """Forward and backward of plain batch norm, of one ghost batch, and of `ghosts`, each over `x`."""
    samples, channels = x.shape[:2]
    grad = torch.randn_like(x)

    def run(layer: nn.Module, *, compiled: bool = False, kernels: bool = True) -> Callable[[], None]:
        layer.to(x.device).train()
        if compiled:
            layer.compile(dynamic=False)

        def forward_and_backward() -> None:
            layer.zero_grad()
            with nullcontext() if kernels else without_kernels():
                layer(x.detach().requires_grad_()).backward(grad)

        return forward_and_backward

    def ghost(count: int) -> nn.Module:
        return GhostBatchNorm2d(channels, ghost_batch=samples // count)

    runs = {"plain": run(nn.BatchNorm2d(channels)), "one ghost batch": run(ghost(1))}
    if x.device.type != "cuda":
        return runs | {"ghost batches": run(ghost(ghosts))}
    return runs | {
        "ghost batches": run(ghost(ghosts)),
        "by torch's operations": run(ghost(ghosts), kernels=False),
        COMPILED: run(ghost(ghosts), compiled=True),
    }


def fault(run: Callable[[], None]) -> str | None:
    """Why `run` fails, in a line; None if it does not."""
    try:
        run()
    except Exception as error:  # whatever a compiler raises
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def graphed(run: Callable[[], None]) -> Callable[[], None]:
    """`run` as the replay of a CUDA graph."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def rounds(runs: dict[str, Callable[[], None]], count: int, calls: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each of `runs` in each round."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARM_UP + count):
        for position in range(len(names)):
            name = names[(number + position) % len(names)]
            taken = seconds(runs[name], calls, device)
            if number >= WARM_UP:
                times[name].append(taken)
    return times


def seconds(run: Callable[[], None], calls: int, device: torch.device) -> float:
    """Wall time of one of `calls` runs, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


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
    return f"{cpu_name()}, {torch.get_num_threads()} thread(s)"


if __name__ == "__main__":
    main()
