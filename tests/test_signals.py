"""The first termination signal is recorded, a second one ends the process, and earlier handlers are restored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from lars_train.signals import TERMINATION_SIGNALS, SignalHandler


@pytest.mark.parametrize("number", TERMINATION_SIGNALS)
def test_a_signal_is_only_recorded(number: signal.Signals) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:  # under nohup
        signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    with SignalHandler() as handler:
        assert handler.received == 0
        os.kill(os.getpid(), number)
        assert handler.received == number
        # A launcher may forward a signal that the terminal already sent to every process.
        os.kill(os.getpid(), signal.SIGTERM)
        assert handler.received == number
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_the_process_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from lars_train.signals import SignalHandler\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background command ignores it
        "with SignalHandler() as handler:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(1.2)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=50)
    assert done.returncode == 128 + signal.SIGINT


def test_an_ignored_signal_stays_ignored() -> None:
    # As under nohup.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalHandler() as handler:
            os.kill(os.getpid(), signal.SIGHUP)
            assert handler.received == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_handles_no_signals() -> None:
    before = [signal.getsignal(number) for number in TERMINATION_SIGNALS]
    seen: list[object] = []

    def work() -> None:
        with SignalHandler():
            seen.extend(signal.getsignal(number) for number in TERMINATION_SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before
