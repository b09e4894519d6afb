from __future__ import annotations

import io
import sys
import time

import pytest

from lars_train.monitoring.progress import EVERY_LINE, NORMAL, QUIET, Progress, duration
from lars_train.monitoring.say import complain

LOGGED = {
    "train/loss": 1.23456,
    "train/top1": 45.67,
    "train/lr": 0.1,
    "train/images_per_s": 12345.6,
    "train/wait_share": 0.034,
    "train/mfu": 0.418,
}


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def two_epochs(progress: Progress) -> None:
    progress.say("hello")
    for epoch in range(2):
        progress.start_epoch(epoch, 3, 0)
        for update in range(3):
            progress.advance(LOGGED if update else {})
        with progress.counting("evaluation", 10) as on_batch:
            on_batch(4)
            on_batch(6)
        progress.end_epoch(f"epoch {epoch + 1} is over")
    progress.close()


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    two_epochs(Progress(shown=False, epochs=2))
    assert capsys.readouterr().out == ""
    assert terminal.getvalue() == ""


def test_without_a_terminal_there_is_one_line_per_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    two_epochs(Progress(shown=True, epochs=2))
    said = capsys.readouterr()
    assert said.out == "hello\nepoch 1 is over\nepoch 2 is over\n"
    assert said.err == ""


def test_on_a_terminal_bars_show_epochs_evaluation_and_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    two_epochs(Progress(shown=True, epochs=2))
    shown = terminal.getvalue()
    for part in ("epoch 1/2", "epoch 2/2", "evaluation"):
        assert part in shown
    assert "epoch 2 is over" in capsys.readouterr().out


def test_a_bar_goes_on_where_the_resumed_epoch_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    progress = Progress(shown=True, epochs=2)
    progress.start_epoch(1, 8, 5)
    progress.advance(LOGGED)
    progress.close()
    assert "5/8" in terminal.getvalue()


def test_closing_twice_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(shown=True, epochs=1)
    progress.start_epoch(0, 2, 0)
    progress.close()
    progress.close()


def test_the_bar_shows_the_values_and_the_time_left_of_epoch_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    progress = Progress(shown=True, epochs=90)
    progress.start_epoch(2, 4, 0)
    for _ in range(3):
        time.sleep(0.11)  # tqdm draws no more often
        progress.advance(LOGGED, run_left=7500.0)
    progress.close()
    for part in ("epoch 3/90", " left, run 2:05:00] loss 1.235 top1 45.7% lr 0.1 12,346 img/s wait 3% MFU 42%", "/4 ["):
        assert part in terminal.getvalue()


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_terminal_that_cannot_go_back_gets_lines(
    term: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    two_epochs(Progress(shown=True, epochs=2))
    assert (terminal.getvalue() == "") == (term == "dumb")
    assert "epoch 2 is over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verbosity", "expected"),
    [
        (QUIET, "WARNING: hot\n"),
        (NORMAL, "hello\nWARNING: hot\nepoch 1 is over\n"),
        (EVERY_LINE, "hello\nupdate 10\nWARNING: hot\nepoch 1 is over\n"),
    ],
)
def test_verbosity_decides_what_is_said(verbosity: int, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(shown=True, epochs=1, verbosity=verbosity)
    progress.say("hello")
    progress.log_line("update 10")
    progress.say("WARNING: hot")
    progress.end_epoch("epoch 1 is over")
    assert capsys.readouterr().out == expected


def test_a_long_epoch_without_a_bar_is_not_silent_for_ever(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(shown=True, epochs=1)
    for update in range(1, 41):
        now[0] += 60
        progress.log_line(f"update {update}")
    assert capsys.readouterr().out == "update 11\nupdate 22\nupdate 33\n"


@pytest.mark.parametrize(
    ("no_color", "terminal", "coloured"), [("", True, True), ("1", True, False), ("", False, False)]
)
def test_only_a_terminal_gets_colours(
    no_color: str, terminal: bool, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Terminal() if terminal else io.StringIO())
    Progress(shown=True, epochs=1).say("WARNING: hot \x1b[2J")
    complain("a fault")
    told = [stream.getvalue() for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.StringIO)]
    if coloured:
        assert told == ["\x1b[33mWARNING:\x1b[0m hot \\x1b[2J\n", "\x1b[31mlars-train:\x1b[0m a fault\n"]
    else:
        assert told == ["WARNING: hot \\x1b[2J\n", "lars-train: a fault\n"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (89.0, "89 s"),
        (91.0, "2 min"),
        (3599.0, "1 h 00 min"),
        (7500.0, "2 h 05 min"),
        (273_600.0, "3 d 4 h"),
    ],
)
def test_times_are_said_in_their_largest_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said
