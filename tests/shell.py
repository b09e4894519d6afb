"""Run the programs of this package in forks of a process that has imported torch once.

    python tests/shell.py < requests.jsonl > answers.jsonl

A request is a line of JSON, and so is its answer:

    {"begin": {"words": [...], "folder": ..., "environment": {...}, "timeout": seconds, "log": file or null}}: its id
    {"end": [process id, seconds]}: [exit code, standard output, standard error], or null if it is still running then

The first word is lars-train, lars-report, lars-data, torchrun, or python, which takes a file, or -c and code. The
workers of torchrun, the ranks of lars-train, and each lars-train that a file starts are forks, too.
`log`: a file for both outputs.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import multiprocessing.context
import os
import runpy
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

POLL_S = 0.01


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


def become(words: Sequence[str], environment: dict[str, str]) -> None:
    """Turn this fork into the process that ``words`` would start in a new session, run it, and exit.

    The fork skips the interpreter's own shutdown, which takes a second.
    """
    os.setsid()
    # As exec does. A child must not keep its parent's connections open.
    os.closerange(3, 4096)
    restore_signals()
    # In a shell's background job, such as CI, SIGINT is ignored. Restore the default, as on a terminal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = None
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(words)
    os._exit(call(PROGRAMS[words[0]]))


def restore_signals() -> None:
    """Remove the handlers of the parent process."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def begin(request: dict[str, Any]) -> tuple[int, list[BinaryIO]]:
    """Start a program in a fork, and return its process id and output files."""
    if request["log"]:
        files: list[BinaryIO] = [open(request["log"], "wb")] * 2  # noqa: PTH123, SIM115
    else:
        files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115
    child = os.fork()
    if child == 0:
        signal.alarm(request["timeout"])
        for file, number in ((open(os.devnull), 0), (files[0], 1), (files[1], 2)):  # noqa: PTH123, SIM115
            os.dup2(file.fileno(), number)
        os.chdir(request["folder"])
        become(request["words"], request["environment"])
    return child, files


def end(child: int, seconds: float) -> tuple[int, str, str] | None:
    """Wait for a program at most `seconds`. Return its exit code, standard output and standard error."""
    limit = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > limit:
            return None
        time.sleep(POLL_S)
    texts = []
    for file in OUTPUTS.pop(child):
        if file.readable():
            file.seek(0)
            texts.append(file.read().decode(errors="surrogateescape"))
        file.close()
    out, error = texts or ("", "")
    return os.waitstatus_to_exitcode(status), out, error


def python() -> None:
    """Do what ``python -c CODE ARGUMENT ...`` and ``python FILE ARGUMENT ...`` do."""
    if sys.argv[1] == "-c":
        _, _, code, *arguments = sys.argv
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        return
    del sys.argv[0]
    sys.path[:0] = [os.path.dirname(sys.argv[0]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]  # noqa: PTH120
    contexts = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    contexts["spawn"] = contexts["fork"]
    new_process = subprocess.Popen._execute_child  # type: ignore[attr-defined]

    def fork(self: Any, words: Any, *rest: Any) -> None:
        """Start ``python -m lars_train`` in a fork, and other programs as usual."""
        if list(words[:3]) != [sys.executable, "-m", "lars_train"]:
            new_process(self, words, *rest)
            return
        folder, environment, pipes = rest[4], rest[5], rest[9:15]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for number, file in enumerate((pipes[0], pipes[3], pipes[5])):
                if file != -1:
                    os.dup2(file, number)
            os.chdir(folder or ".")
            become(["lars-train", *words[3:]], dict(os.environ if environment is None else environment))
        self._child_created = True
        self._close_pipe_fds(*pipes)

    subprocess.Popen._execute_child = fork  # type: ignore[attr-defined]
    runpy.run_path(sys.argv[0], run_name="__main__")


class Worker(subprocess.Popen[bytes]):
    """A worker of torchrun, in a fork."""

    def __init__(self, words: Sequence[str], environment: dict[str, str]) -> None:
        self._words, self._environment = words, environment
        super().__init__(words)

    def _execute_child(self, *arguments: object) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            # Without ``python -u -m lars_train``.
            become(["lars-train", *self._words[4:]], self._environment)
        self._child_created = True


def torchrun() -> None:
    """Do what ``python -m torch.distributed.run`` does, with forks as workers of ``-m lars_train``."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda self, words, environment: Worker(words, environment)  # type: ignore[method-assign]
    run.main(sys.argv[1:])


def rank(number: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Call `work` as in a process that was spawned: without the parent's connections and handlers."""
    for file in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(file)).st_mode):
                os.close(int(file))
    restore_signals()
    atexit._clear()
    try:
        work(number, *arguments)
    finally:
        atexit._run_exitfuncs()


def with_forks(start: Callable[..., Any]) -> Callable[..., Any]:
    """Return `torch.multiprocessing.start_processes` with forks instead of new processes."""

    def fork(work: Callable[..., None], arguments: tuple[Any, ...], **options: Any) -> Any:
        return start(rank, (work, arguments), **options | {"start_method": "fork"})

    return fork


def lars_train() -> None:
    """Do what ``python -m lars_train`` does, with forks as its ranks."""
    import torch.multiprocessing as processes

    from lars_train import cli

    processes.start_processes = with_forks(processes.start_processes)
    cli.main()


OUTPUTS: dict[int, list[BinaryIO]] = {}
PROGRAMS: dict[str, Callable[[], None]] = {"python": python, "torchrun": torchrun}


def main() -> None:
    # The slow imports of a run. Not matplotlib: the first fork to end would remove its temporary folder.
    # They are in `main` because a spawned process imports this file and does not need them.
    for name in (
        *("torch._dynamo", "torch.utils.tensorboard.writer", "torchvision.models", "torch.distributed.run"),
        "lars_train.commands",
    ):
        importlib.import_module(name)
    from hydra._internal.hydra import Hydra
    from tiny import TINY, composed

    from lars_train.config import resolve
    from lars_train.pack import lars_data
    from lars_train.report import lars_report

    # Warm the caches of Hydra's parsers, and of the schema.
    resolve(composed(*TINY))
    # Hydra composes a command's config first to find hydra.mode, which no test sets, and then again to run it.
    Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    gc.freeze()
    PROGRAMS.update({"lars-train": lars_train, "lars-data": lars_data.main, "lars-report": lars_report.main})
    answer: object
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "begin" in request:
            answer, OUTPUTS[answer] = begin(request["begin"])
        else:
            answer = end(*request["end"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
