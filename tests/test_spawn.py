"""`start_processes`: the environment of each rank, signals, and the report of a failed rank."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import at_work
import pytest
import torch.multiprocessing as processes
from shell import with_forks

from lars_train.errors import ConfigError, DataError, Diverged, Stopped
from lars_train.launch import WorkerError, start_processes

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _at_most_a_minute() -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise AssertionError("the launcher did not return within a minute")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def _forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the ranks forks of this process, which saves the seconds of their imports."""
    monkeypatch.setattr(processes, "start_processes", with_forks(processes.start_processes))


def test_each_rank_has_its_variables_and_rank_0_returns() -> None:
    assert start_processes(at_work.rank_variables, (), 2) == ("0", "2", "0", "2")


@pytest.mark.usefixtures("_forks")
def test_the_killed_rank_is_reported_not_its_failing_peer() -> None:
    with pytest.raises(WorkerError, match=r"rank 1: process \d+ was killed by SIGKILL"):
        start_processes(at_work.kill_rank_1_and_fail_the_other, (), 2)


@pytest.mark.usefixtures("_forks")
def test_a_rank_killed_after_its_work_does_not_hang_the_launcher() -> None:
    with pytest.raises(WorkerError, match=r"rank 1: .*SIGKILL"):
        start_processes(at_work.kill_rank_1_after_its_work, (), 2)


@pytest.mark.usefixtures("_forks")
def test_our_errors_keep_a_message_and_bugs_keep_a_traceback() -> None:
    for kind in (ConfigError, DataError, Diverged, Stopped):
        with pytest.raises(kind, match=r"^the word$"):
            start_processes(at_work.raise_error, (kind.__name__,), 1)
    with pytest.raises(WorkerError, match=r"(?s)^rank 0: KeyError: 'the word'\nTraceback .* in raise_error"):
        start_processes(at_work.raise_error, ("KeyError",), 1)


@pytest.mark.usefixtures("_forks")
def test_a_signal_is_forwarded_and_the_ranks_stop_cleanly(tmp_path: Path) -> None:
    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Stopped, match="stopped after update 7"):
        start_processes(at_work.stop_at_sigusr1, (str(tmp_path),), 2)
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.usefixtures("_forks")
def test_a_signal_that_was_ignored_is_not_forwarded(tmp_path: Path) -> None:
    # As under nohup.
    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        threading.Thread(target=send, daemon=True).start()
        assert start_processes(at_work.sighup_disposition, (str(tmp_path),), 2) == str(signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before)
