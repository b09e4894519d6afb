"""Run the programs of this package in forks of a process that has imported torch once.

    python tests/shell.py < requests.jsonl > answers.jsonl

A line of requests is a list of programs that run at the same time: {"words": [...], "folder": ..., "environment":
{...}, "timeout": seconds}. The first word is lars-train, lars-report, lars-data or python, which takes -c and code.
The answer is a list of [exit code, standard output, standard error].
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO


def call(program: Callable[[], None]) -> int:
    """Run a program with its exit handlers, as if the process ended, and return its exit code."""
    code: object = 0
    try:
        program()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def begin(programs: dict[str, Callable[[], None]], request: dict[str, Any]) -> tuple[int, list[BinaryIO]]:
    """Start a program in a fork, and return its process id and output files.

    The fork skips the interpreter's own shutdown, which takes a second.
    """
    files: list[BinaryIO] = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115
    child = os.fork()
    if child == 0:
        signal.alarm(request["timeout"])
        for file, number in ((open(os.devnull), 0), (files[0], 1), (files[1], 2)):  # noqa: PTH123, SIM115
            os.dup2(file.fileno(), number)
        tempfile.tempdir = None
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = request["words"]
        os._exit(call(programs[sys.argv[0]]))
    return child, files


def end(child: int, files: list[BinaryIO]) -> tuple[int, str, str]:
    """Wait for a program. Return its exit code, standard output and standard error."""
    _, status = os.waitpid(child, 0)
    texts = []
    for file in files:
        with file:
            file.seek(0)
            texts.append(file.read().decode(errors="surrogateescape"))
    return os.waitstatus_to_exitcode(status), texts[0], texts[1]


def python() -> None:
    """Do what ``python -c CODE ARGUMENT ...`` does."""
    _, _, code, *arguments = sys.argv
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def main() -> None:
    # The slow imports of a run. Not matplotlib: the first fork to end would remove its temporary folder.
    # They are in `main` because a spawned process imports this file and does not need them.
    for name in ("torch._dynamo", "torch.utils.tensorboard.writer", "torchvision.models", "lars_train.commands"):
        importlib.import_module(name)
    from tiny import TINY, composed

    from lars_train import cli
    from lars_train.pack import lars_data
    from lars_train.report import lars_report

    # Warm the caches of Hydra's parsers.
    composed(*TINY)
    gc.freeze()
    programs = {"lars-train": cli.main, "lars-data": lars_data.main, "lars-report": lars_report.main}
    programs["python"] = python
    while line := sys.stdin.readline():
        begun = [begin(programs, request) for request in json.loads(line)]
        print(json.dumps([end(*program) for program in begun]), flush=True)


if __name__ == "__main__":
    main()
