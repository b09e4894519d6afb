"""A script stopped by a signal leaves no process and no temporary folder."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from tiny import alive_in_group, environment

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
# A program that ignores SIGTERM.
IGNORES_SIGTERM = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
)


def left_over(group: int) -> list[int]:
    """Return the processes of a group that still run after five seconds.

    Python's tracker of semaphores ends a little after its process.
    """
    end = time.monotonic() + 5
    while (alive := alive_in_group(group)) and time.monotonic() < end:
        time.sleep(0.05)
    return alive


def signal_script(command: list[str], number: int, folder: Path, sign: str) -> tuple[int, str]:
    """Signal only the script when a file `sign` exists in `folder`. Return its exit code and output.

    Assert that no process and no file remains.
    """
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, *command],
        env=environment(TMPDIR=str(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # In a background job, such as CI, SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            end = time.monotonic() + 120
            while not any(folder.rglob(sign)):
                assert process.poll() is None, process.stdout and process.stdout.read()
                assert time.monotonic() < end
                time.sleep(0.05)
            assert len(alive_in_group(process.pid)) > 1
            os.kill(process.pid, number)
            text, _ = process.communicate(timeout=60)
            assert left_over(process.pid) == []
            assert list(folder.iterdir()) == []
        finally:
            for pid in alive_in_group(process.pid):
                os.kill(pid, signal.SIGKILL)
    return process.returncode, text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number"),
    [
        (["verify/long_haul.py"], signal.SIGTERM),
        (["bench/bench_startup.py", "--model", "tiny"], signal.SIGINT),
    ],
)
def test_a_signal_ends_child_processes_and_removes_folders(
    command: list[str], number: signal.Signals, tmp_path: Path
) -> None:
    script = [str(SCRIPTS / command[0]), *command[1:]]
    code, text = signal_script(script, number, tmp_path / "scratch", "run.json")
    assert code == 128 + number
    assert "Traceback" not in text


@pytest.mark.slow
def test_two_ranks_end_with_their_script(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "verify/measure_float32_bound.py"), "--world", "1", "2"],
        env=environment(TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    # Four processes: the script, the tracker of semaphores and two ranks.
    while len(alive_in_group(process.pid)) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    process.terminate()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "Traceback" not in text
    assert "checkpoint" not in text
    assert left_over(process.pid) == []


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("shared")


@pytest.mark.parametrize("error", [SystemExit(143), ValueError("odd")])
def test_an_exception_terminates_the_running_process(shared: ModuleType, error: BaseException) -> None:
    with (
        pytest.raises(type(error)) as raised,
        shared.running([sys.executable, "-c", "import time; time.sleep(600)"]) as process,
    ):
        raise error
    assert raised.value is error
    assert process.returncode == -signal.SIGTERM


def test_a_process_that_ignores_sigterm_is_killed(shared: ModuleType) -> None:
    with subprocess.Popen([sys.executable, "-c", IGNORES_SIGTERM], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        shared.stop(process, 0.2)
    assert process.returncode == -signal.SIGKILL
