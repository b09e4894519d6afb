"""Who speaks, and that nobody need listen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lars_train.monitoring.say import complain, first_process, say

LAUNCHERS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID")


@pytest.mark.parametrize(
    ("environment", "says", "complains"),
    [
        ({}, True, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True, True),
        ({"RANK": "3", "LOCAL_RANK": "3"}, False, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False, True),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True, True),
        ({"SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, False, False),
        ({"SLURM_PROCID": "8", "SLURM_LOCALID": "0"}, False, True),
    ],
)
def test_one_process_speaks_and_one_on_each_machine_complains(
    environment: dict[str, str],
    says: bool,
    complains: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    say("a line")
    complain("a fault")
    said = capsys.readouterr()
    assert first_process() is says
    assert said.out == ("a line\n" if says else "")
    assert said.err == ("lars-train: a fault\n" if complains else "")


def test_a_reader_who_goes_away_ends_nothing() -> None:
    code = (
        "import os, sys\n"
        "from lars_train.monitoring.progress import Progress\n"
        "from lars_train.monitoring.say import complain, say\n"
        "sys.stdin.read()\n"
        "say('a line')\n"
        "Progress(shown=True, epochs=1).say('another')\n"
        "complain('a fault')\n"
        "os._exit(7)\n"
    )
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()
        process.stdin.close()
    assert process.returncode == 7


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_streams_that_the_caller_has_closed_are_opened_to_nowhere(closed: tuple[int, ...]) -> None:
    code = (
        "import os, sys\n"
        "from lars_train.monitoring.say import complain, open_standard_streams, say\n"
        "open_standard_streams()\n"
        "say('a line'), complain('a fault'), sys.stdout.isatty(), sys.stderr.isatty()\n"
        "with open(os.devnull) as file:\n"
        "    os._exit(7 if file.fileno() > 2 else 1)\n"
    )

    def close() -> None:
        for number in closed:
            os.close(number)

    assert subprocess.run([sys.executable, "-c", code], preexec_fn=close, check=False).returncode == 7
