from __future__ import annotations

import io
import sys

import pytest

from lars_train.monitoring.progress import Progress

LOGGED = {"train/loss": 1.23456, "train/top1": 45.67, "train/lr": 0.1, "train/images_per_s": 12345.6}


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
