"""The processes of one machine: their arguments, and how their exits are reported."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import at_work
import pytest

from lars_train.errors import Stopped
from lars_train.launch import WorkerError, start_processes

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _at_most_a_minute() -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise AssertionError("the launcher waits for ever")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_each_rank_knows_its_place_and_rank_0_returns() -> None:
    assert start_processes(at_work.sees, (), 2) == ("0", "2", "0", "2")


def test_a_killed_rank_is_the_reason_and_not_its_failing_peer() -> None:
    with pytest.raises(WorkerError, match=r"rank 1: process \d+ was killed by SIGKILL"):
        start_processes(at_work.is_killed_and_its_peer_fails, (), 2)


def test_a_rank_killed_after_its_work_does_not_hang_the_launcher() -> None:
    with pytest.raises(WorkerError, match=r"rank 1: .*SIGKILL"):
        start_processes(at_work.is_killed_after_its_work, (), 2)


def test_messages_keep_their_words_and_bugs_their_traceback() -> None:
    with pytest.raises(WorkerError, match=r"^the word$"):
        start_processes(at_work.fails, ("DataError",), 1)
    with pytest.raises(Stopped, match=r"^the word$"):
        start_processes(at_work.fails, ("Stopped",), 1)
    with pytest.raises(WorkerError, match=r"(?s)^rank 0: KeyError: 'the word'\nTraceback .* in fails"):
        start_processes(at_work.fails, ("KeyError",), 1)


def test_a_signal_is_passed_on_and_ends_the_ranks_their_own_way(tmp_path: Path) -> None:
    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Stopped, match="stopped after update 7"):
        start_processes(at_work.takes_note, (str(tmp_path),), 2)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_signal_that_was_ignored_before_is_not_passed_on(tmp_path: Path) -> None:
    # As under nohup.
    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        threading.Thread(target=send, daemon=True).start()
        assert start_processes(at_work.hears_nothing, (str(tmp_path),), 2) == str(signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before)
