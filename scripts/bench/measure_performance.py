"""Everything that docs/performance.md tells in figures, one script after another.

    python scripts/bench/measure_performance.py [--write docs/performance.md]      # about an hour, on an idle machine

Each part is a script that may be run by itself: bench_step.py, bench_trainer.py, profile_step.py, bench_reduction.py,
bench_startup.py and long_haul.py. What each finds goes between its markers of the page.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from child import GRACE_S, end_on_signals, run
from page import between_markers, check_page, cpu_name, writable_page

from lars_train.pack.processes import cores

PARTS = ("bench_step", "bench_trainer", "profile_step", "bench_reduction", "bench_startup", "long_haul")
MARKED = "measure_performance"


def main() -> int:
    """Measure, print, write; 1 if a script failed, whose part of the page stays as it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these alone")
    parser.add_argument(
        "--write", type=writable_page(MARKED), metavar="PAGE", help="put what they find between the page's markers"
    )
    args = parser.parse_args()
    if args.write:
        try:
            check_page(args.write, *args.only)
        except ValueError as error:
            parser.error(f"argument --write: {error}")
    scripts = Path(__file__).resolve().parents[1]
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            print(f"{part} ...", file=sys.stderr, flush=True)
            scratch = Path(folder) / f"{part}.md"
            scratch.write_text(between_markers(empty(part), part, []))
            # A part that is asked to end waits itself for what it has started.
            code = run(
                [sys.executable, str(next(scripts.glob(f"*/{part}.py"))), "--write", str(scratch)],
                grace=2 * GRACE_S,
                stdout=subprocess.DEVNULL,
            )
            lines = within(scratch.read_text(), part)
            if not lines:
                failed.append(f"{part}.py ended with code {code}")
                continue
            print("\n".join([*lines, ""]), flush=True)
            if args.write:
                args.write.write_text(between_markers(args.write.read_text(), part, lines))
    where = [
        f"`python scripts/bench/measure_performance.py` on {machine()}; Python {platform.python_version()}, torch "
        f"{version('torch')}."
    ]
    print("\n".join([*where, *failed]))
    if args.write:
        args.write.write_text(between_markers(args.write.read_text(), MARKED, where))
    return 1 if failed else 0


def machine() -> str:
    """The processor, and what of it decides how fast steps are: cores, and instructions for bfloat16."""
    described = Path("/proc/cpuinfo")
    flags = set(described.read_text().split()) if described.exists() else set()
    has = [name for name, flag in (("AMX", "amx_bf16"), ("AVX-512 bf16", "avx512_bf16")) if flag in flags]
    return f"{cpu_name()}, {cores()} cores, {has[0] if has else 'no bf16 instructions known of'}"


def empty(part: str) -> str:
    """A page with nothing but the markers of `part`."""
    return f"<!-- {part}: begin -->\n<!-- {part}: end -->\n"


def within(page: str, part: str) -> list[str]:
    """The lines between the markers of `part`, less empty ones around them."""
    _, _, rest = page.partition(f"<!-- {part}: begin -->")
    return rest.partition(f"<!-- {part}: end -->")[0].strip().splitlines()


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
