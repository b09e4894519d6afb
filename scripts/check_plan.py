"""Compares the update time that a plan foretells with that of real runs of one and two processes on this CPU.

    python scripts/check_plan.py [--updates 30]

First short measurements, in as many processes as the run will have: images per second of forward, backward and step,
and the seconds of a small and a large all-reduce by gloo. Then ``lars-train`` with the same network, on made-up images.
Prints both and the error of each. Says nothing of GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from page import cpu_name

from lars_train.cost import Machine, update_seconds
from lars_train.models.factory import build_model

GHOST, MICRO, BATCH, SIZE, CLASSES = 32, 64, 256, 32, 10
SMALL, LARGE = 1024, 1 << 23


def calibrate(rank: int, world: int, folder: str) -> None:
    """Measure in one of `world` processes at once; the first writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    network = build_model("small", num_classes=CLASSES, ghost_batch=GHOST, zero_gamma=False)
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    images = torch.rand(MICRO, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)

    def update() -> None:
        for _ in range(BATCH // world // MICRO):
            network(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def seconds(work: object, times: int) -> float:
        assert callable(work)
        work()
        dist.barrier()
        started = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - started) / times

    found = {"rate": BATCH / world / seconds(update, 6)}
    for name, size in (("small", SMALL), ("large", LARGE)):
        values = torch.zeros(size // 4)
        found[name] = seconds(lambda values=values: dist.all_reduce(values), 10)
    found["bytes"] = 4.0 * sum(p.numel() for p in network.parameters())
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured(world: int, updates: int, folder: str) -> float:
    """Seconds of an update of a real run, from its log, without its first ten updates."""
    run = Path(folder, f"run{world}")
    keys = [
        "data=synthetic", "model=small", f"data.image_size={SIZE}", f"data.num_classes={CLASSES}",
        "data.train_count=65536", "data.val_count=8", f"batch.size={BATCH}", "batch.scaled=false",
        f"micro_batch={MICRO}", f"model.ghost_batch={GHOST}", "optimizer=sgd", "optimizer.lr=0.01", "precision=fp32",
        "device=cpu", "launch.threads=1", f"launch.nproc={world}", "log_every=10", f"max_updates={updates}",
        f"run.dir={run}", "epochs=1", "schedule.warmup_epochs=0",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "lars_train", *keys], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [e["train/images_per_s"] for e in logged if e.get("update", 0) > 10 and "train/images_per_s" in e]
    print(f"  metrics.jsonl: {(run / 'metrics.jsonl').stat().st_size / len(logged):.0f} bytes a line")
    return float(BATCH * sum(1 / rate for rate in rates) / len(rates))


def main() -> None:
    """Measure, plan, run and compare, for one process and for two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=30)
    asked = parser.parse_args()
    print(f"{cpu_name()}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2):
            mp.spawn(calibrate, (world, folder), nprocs=world)  # type: ignore[attr-defined, no-untyped-call]
            found = json.loads(Path(folder, f"{world}.json").read_text())
            bandwidth = (LARGE - SMALL) / max(found["large"] - found["small"], 1e-9)
            # Gloo sums by a ring: at two ranks, two messages and the bytes once.
            machine = Machine(found["rate"], None, found["small"] / 2, bandwidth, 0.0, "ring")
            plan = update_seconds(machine, world, samples=BATCH // world, last=MICRO, size=int(found["bytes"]))
            real = measured(world, asked.updates, folder)
            print(
                f"{world} process(es): planned {plan.seconds:.3f} s (compute {plan.compute:.3f}, network "
                f"{plan.network:.4f}), measured {real:.3f} s, error {100 * (plan.seconds / real - 1):+.0f} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
