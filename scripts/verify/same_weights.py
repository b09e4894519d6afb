"""Run the same short commands in two checkouts and compare the results bit for bit.

    git worktree add ../before HEAD~1
    python scripts/verify/same_weights.py ../before
    python scripts/verify/same_weights.py ../before --only zip evaluate

The script compares its own checkout with the other one: weights, the lines of metrics.jsonl except times, rates and
memory, and the output of evaluations, exports and packing. A checkout without C extensions borrows those of the other
if their sources are equal; if neither has any, both use the installed package's. The exit code is 1 if a result
differs, and 2 if a command fails.

Takes about four minutes on two cores. Figures: none. docs/index.md lists the pages.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from zipfile import ZipFile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

_EXTENSIONS = ("lars_train/**/*.so", "lars_train/**/*.c")
# Fields of metrics.jsonl that depend on the clock or the machine.
_MACHINE_FIELDS = re.compile("seconds|kwh|images_per_s|mfu|wait_share|^memory/")
_LIMIT_S = 300.0

ALL = "log_every=1 launch.threads=1 device=cpu run.name=r"
SMALL = (
    "data=synthetic data.train_count=640 data.val_count=101 data.num_classes=4 data.image_size=16 "
    "data.augment=pad_crop model=tiny model.ghost_batch=8 batch.size=64 optimizer.lr=2 schedule.warmup_epochs=0.5 "
    "epochs=2"
)
FOLDER = (
    "data=folder data.image_size=24 model=tiny model.ghost_batch=8 batch.size=16 optimizer.lr=1 epochs=2 "
    "schedule.warmup_epochs=0 precision=fp32 data.workers=1"
)
# Commands by name. The commands of a case run one after another in their own folder. A program with a ! is killed at
# its fourth log line.
CASES = {
    "default": ["lars-train max_updates=6"],
    "batch=256": ["lars-train batch=256 max_updates=6"],
    "two ranks": [f"lars-train {SMALL} precision=fp32 launch.nproc=2"],
    "killed and resumed": [
        f"lars-train! {SMALL} precision=fp32 checkpoint.every_updates=2",
        f"lars-train {SMALL} precision=fp32 checkpoint.every_updates=2",
    ],
    "bf16": [f"lars-train {SMALL} precision=bf16"],
    "fp64": [f"lars-train {SMALL} precision=fp64"],
    "recipe=mlperf": ["lars-train recipe=mlperf batch=32k max_updates=6"],
    "recipe=nus": ["lars-train recipe=nus batch=8k max_updates=6"],
    "LARS over AdamW": [f"lars-train {SMALL} precision=fp32 optimizer=lars optimizer.base=AdamW optimizer.lr=0.01"],
    "zip": [f"lars-train {FOLDER} data.root=../images.zip"],
    "folder, decoder in C": [f"lars-train {FOLDER} data.root=../images data.decoder=native"],
    "packed": [
        "lars-data pack ../images store --shards 2",
        "lars-data verify store",
        f"lars-train {FOLDER} data.root=store",
    ],
    "streamed": [
        "lars-data pack ../images store --shards 2",
        f"lars-train {FOLDER} data.root=file://{{folder}}/store data.order=shards data.cache_dir=cache",
    ],
    "evaluate": [
        f"lars-train {SMALL} precision=fp32",
        "lars-train mode=evaluate checkpoint.path=runs/r evaluate.report=found",
    ],
    "export": [
        f"lars-train {SMALL} precision=fp32",
        "lars-train mode=export checkpoint.path=runs/r export.path=network.pth",
    ],
}


def main() -> None:
    """Run, compare, and print a verdict for each case."""
    parser = shared.make_parser(__doc__)
    parser.add_argument("other", type=Path, help="the root of the other checkout")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    args = parser.parse_args()
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        roots = (("a", args.other), ("b", shared.ROOT))
        checkouts = [copy_checkout(root.resolve(), Path(folder) / side) for side, root in roots]
        if not lend_extensions(*checkouts):
            parser.error(
                f"{args.other}: the C sources differ, and a checkout has no extensions; run pip install -e . in it"
            )
        for checkout in checkouts:
            write_images(checkout.parent / "work")
        for name in args.only:
            began = time.monotonic()
            before, after = (outcome(checkout, CASES[name]) for checkout in checkouts)
            faults = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
            differing += bool(faults)
            verdict = f"DIFFERS: {', '.join(faults[:6])}" if faults else f"equal ({len(after)} results)"
            print(f"{name}: {verdict}, {time.monotonic() - began:.0f} s", flush=True)
            for key in faults[:3]:
                print(f"    {key}: {str(before.get(key))[:200]} | {str(after.get(key))[:200]}")
    sys.exit(min(differing, 1))


def copy_checkout(root: Path, place: Path) -> Path:
    """Copy the package of a checkout, so that nothing else of the checkout is imported or written."""
    checkout = place / "checkout"
    for part in ("lars_train", "configs"):
        shutil.copytree(root / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", checkout)
    return checkout


def lend_extensions(one: Path, other: Path) -> bool:
    """Copy C extensions to a checkout that has none. Return False if the sources differ."""
    built, sources = ([sorted(root.glob(pattern)) for root in (one, other)] for pattern in _EXTENSIONS)
    if all(built):
        return True
    if [path.read_bytes() for path in sources[0]] != [path.read_bytes() for path in sources[1]]:
        return False
    borrower = one if built[1] else other
    for path in built[0] or built[1]:
        # Next to the source file, which may have moved.
        (source,) = borrower.glob(f"lars_train/**/{path.name.split('.')[0].lstrip('_')}.c")
        shutil.copy(path, source.parent / path.name)
    return True


def write_images(folder: Path) -> None:
    """Write 20 training and 4 validation JPEGs of three classes, as a tree and in a zip, always the same."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 4)):
        for label in ("ant", "bee", "cat"):
            place = folder / "images" / split / label
            place.mkdir(parents=True)
            for number in range(count):
                coarse = generator.integers(0, 256, (4, 5, 3), np.uint8)
                size = (int(generator.integers(30, 60)), int(generator.integers(30, 60)))
                Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(place / f"{number}.jpg", quality=90)
    with ZipFile(folder / "images.zip", "w") as archive:
        for path in sorted((folder / "images").rglob("*.jpg")):
            archive.write(path, path.relative_to(folder / "images"))


def outcome(checkout: Path, commands: Sequence[str]) -> dict[str, str]:
    """Run the commands; return their output and files by name."""
    work = checkout.parent / "work" / "case"
    work.mkdir()
    own = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(work / "cache")}
    environment = {**os.environ, **own}
    found: dict[str, str] = {}
    for number, line in enumerate(commands):
        program, *arguments = line.format(folder=work).split()
        if program.startswith("lars-train") and "mode=" not in line:
            arguments += ALL.split()
        command = [sys.executable, "-c", entry_point(checkout, program.rstrip("!")), *arguments]
        if program.endswith("!"):
            run_and_kill(command, work, environment)
            continue
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
        if done.returncode:
            fail(f"{checkout}: {line}\n{done.stdout}{done.stderr}")
        if program != "lars-train" or "mode=" in line:
            found[f"output {number}"] = re.sub(r"[\d,.]+ (images/s|MB/s|s)\b", "", done.stdout)
    files = [path for path in sorted(work.rglob("*")) if path.is_file() and "cache" not in path.relative_to(work).parts]
    found |= {str(path.relative_to(work)): content(path) for path in files}
    shutil.rmtree(work)
    return {key: value for key, value in found.items() if value}


def entry_point(checkout: Path, program: str) -> str:
    """Return Python code that runs a program of the checkout, from the table in its pyproject.toml."""
    table = (checkout / "pyproject.toml").read_text().partition("[project.scripts]")[2]
    entry = re.search(rf'^{program} *= *"([\w.]+):(\w+)"', table, re.MULTILINE)
    assert entry is not None, program
    return f"import sys; sys.argv[0] = {program!r}; from {entry[1]} import {entry[2]}; {entry[2]}()"


def run_and_kill(command: Sequence[str], work: Path, environment: dict[str, str]) -> None:
    """Start a command and kill it after its fourth log line."""
    log, end = work / "runs/r/metrics.jsonl", time.monotonic() + _LIMIT_S
    with subprocess.Popen(command, cwd=work, env=environment, stdout=subprocess.DEVNULL) as process:
        while not log.is_file() or log.read_bytes().count(b"\n") < 4:
            if process.poll() is not None or time.monotonic() > end:
                fail(f"{command}: ended or timed out before its fourth log line")
            time.sleep(0.01)
        process.kill()


def fail(what: str) -> NoReturn:
    """Print an error and exit with code 2."""
    print(what, file=sys.stderr)
    sys.exit(2)


def content(path: Path) -> str:
    """Return the comparable content of a file; empty for files that are not compared."""
    if path.name == "final.json":
        return str(json.loads(path.read_text())["weights_sha256"])
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{key: value for key, value in line.items() if not _MACHINE_FIELDS.search(key)} for line in lines]
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    if path.name == "trust_ratios.jsonl" or path.suffix in {".csv", ".tar"}:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.name == "network.pth":
        import torch

        digest = hashlib.sha256()
        for name, tensor in torch.load(path, weights_only=True).items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()
    return ""


if __name__ == "__main__":
    main()
