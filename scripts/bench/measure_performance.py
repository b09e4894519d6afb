"""Run every CPU measurement of docs/performance.md, one after another.

    python scripts/bench/measure_performance.py [--write docs/performance.md]      # about an hour on two idle cores

Each part is a script with its own markers on the page, and can run alone: the step, compared with bare loops and timm
(bench_step.py); the trainer around the step (bench_trainer.py); the step by kind of operation (profile_step.py); the
gradient all-reduce (bench_reduction.py); start-up (bench_startup.py); a long run (long_haul.py). With ``--write`` the
results of each part appear on the page as soon as the part ends.

Takes about an hour. Figures: docs/performance.md.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

PARTS = ("bench_step", "bench_trainer", "profile_step", "bench_reduction", "bench_startup", "long_haul")
MARKER = "measure_performance"


def main() -> int:
    """Measure, print, write. Return 1 if a script failed; its part of the page stays unchanged."""
    parser = shared.make_parser(__doc__, MARKER)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="run only these")
    args = parser.parse_args()
    shared.require_page(parser, args.write, *args.only)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            print(f"{part} ...", file=sys.stderr, flush=True)
            page = Path(folder) / f"{part}.md"
            page.write_text(f"<!-- {part}: begin -->\n<!-- {part}: end -->\n")
            (script,) = shared.SCRIPTS.glob(f"*/{part}.py")
            command = [sys.executable, str(script), "--write", str(page)]
            # A stopped part waits for its own children.
            code = shared.run(command, grace=2 * shared.GRACE_S, stdout=subprocess.DEVNULL)
            lines = page.read_text().strip().splitlines()[2:-2]
            if not lines:
                failed.append(f"{part}.py ended with code {code}")
                continue
            shared.publish(lines, args.write, part)
            print(flush=True)
    where = f"`{shared.command_line(__file__, [])}` on {machine()}; {shared.software()}."
    shared.publish([where, *failed], args.write, MARKER)
    return 1 if failed else 0


def machine() -> str:
    """Return the processor, its number of cores, and its instructions for bfloat16."""
    from lars_train.pack.processes import cores

    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    has = [name for name, flag in (("AMX", "amx_bf16"), ("AVX-512 bf16", "avx512_bf16")) if flag in flags]
    return f"{shared.cpu_name()}, {cores()} cores, {has[0] if has else 'no bf16 instructions known'}"


if __name__ == "__main__":
    shared.exit_on_signals()
    sys.exit(main())
