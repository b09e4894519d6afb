"""Runs command lines of ours one after another in a process that has imported torch once, each in a fork of it.

    python tests/shell.py FOLDER < commands.json

Standard input: a JSON list of lists of words, the first of them lars-train, lars-report or lars-data; standard
output: a JSON list of [exit code, what was said]. It is what a shell would do, without the imports for each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from lars_train import cli
from lars_train.pack import lars_data as stores
from lars_train.report import lars_report as report

PROGRAMS: dict[str, Callable[[], None]] = {"lars-train": cli.main, "lars-report": report.main, "lars-data": stores.main}


def run(words: list[str]) -> tuple[int, str]:
    """Exit code, and standard output and error together."""
    with tempfile.TemporaryFile("w+") as said:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.argv = words
            code: object = 0
            try:
                PROGRAMS[words[0]]()
            except SystemExit as end:
                code = end.code
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else int(code is not None))
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read()


if __name__ == "__main__":
    torch.set_num_threads(1)
    commands = json.load(sys.stdin)
    os.chdir(Path(sys.argv[1]))
    print(json.dumps([run(words) for words in commands]))
