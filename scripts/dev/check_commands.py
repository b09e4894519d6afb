"""Check commands that need a GPU on a machine without one.

    python scripts/dev/check_commands.py < COMMANDS      # one command a line, `python ...`, quoted as for a shell

Each command runs in its own process, in which torch finds no CUDA device. It must fail for that reason: then its files
exist, its imports work and its arguments are valid. pytest must collect a test instead. The script prints a verdict for
each command; the exit code is 1 if a command is wrong.

Takes about a minute. Figures: none; gpu_check.sh --dry-run runs it (docs/performance.md).
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

NO_DEVICE = re.compile("no CUDA device")


@dataclass(frozen=True)
class Started:
    """A command that runs in the process `pid` and writes to `output`."""

    words: list[str]
    pid: int
    output: TextIO

    def outcome(self) -> tuple[bool, str]:
        """Return True if the command is right, and its last line of output."""
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self.output.seek(0)
        text = self.output.read().strip()
        self.output.close()
        right = code == 0 if is_pytest(self.words) else code == 2 and NO_DEVICE.search(text) is not None
        return right, f"{next(reversed(text.splitlines()), 'no output')} (exit code {code})"


def is_pytest(words: list[str]) -> bool:
    """Return True for ``python -m pytest``."""
    return words[1:3] == ["-m", "pytest"]


def start(words: list[str]) -> Started:
    """Start a command in a fork of this process, which has imported torch already."""
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed when it is read)
    pid = os.fork()
    if pid == 0:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        code = 1
        try:
            code = exit_code(words)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Started(words, pid, output)


def exit_code(words: list[str]) -> int:
    """Run a ``python`` command in this process; return its exit code."""
    _, first, *rest = words + (["--collect-only", "-q"] if is_pytest(words) else [])
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            sys.path.insert(0, str(Path(first).resolve().parent))
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> int:
    """Check the commands of standard input."""
    shared.make_parser(__doc__).parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch  # noqa: F401 (for the forks)

    commands = [shlex.split(line) for line in sys.stdin]
    wrong = 0
    for command in [start(words) for words in commands]:
        right, why = command.outcome()
        wrong += not right
        print(f"{'right' if right else 'WRONG'}: {shlex.join(command.words)}\n       {why}", flush=True)
    return 1 if wrong or not commands else 0


if __name__ == "__main__":
    sys.exit(main())
