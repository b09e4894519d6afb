"""The first notice is noted, a second one ends the process, and what handled the signals before does so again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from lars_train.training.notice import SIGNALS, Notice


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:  # under nohup
        signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    with Notice() as notice:
        assert notice.given == 0
        os.kill(os.getpid(), number)
        assert notice.given == number
        # A launcher that passes on what the terminal has sent to all.
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.given == number
    assert signal.getsignal(number) is before


def test_a_second_notice_ends_the_process_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from lars_train.training.notice import Notice\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background command ignores it
        "with Notice() as notice:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(1.2)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=50)
    assert done.returncode == 128 + signal.SIGINT


def test_what_was_ignored_before_is_ignored_still() -> None:
    # As under nohup.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Notice() as notice:
            os.kill(os.getpid(), signal.SIGHUP)
            assert notice.given == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_takes_no_notice() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    seen: list[object] = []

    def work() -> None:
        with Notice():
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before
