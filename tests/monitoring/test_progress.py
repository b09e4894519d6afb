from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from screen import Screen, terminal
from tqdm import tqdm

from lars_train.messages import complain
from lars_train.monitoring.progress import EVERY_LINE, NORMAL, QUIET, Progress, bar_line

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


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    two_epochs(Progress(shown=False, epochs=2))
    assert capsys.readouterr().out == ""
    assert terminal.getvalue() == ""


def test_without_a_terminal_there_is_one_line_per_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    two_epochs(Progress(shown=True, epochs=2))
    printed = capsys.readouterr()
    assert printed.out == "hello\nepoch 1 is over\nepoch 2 is over\n"
    assert printed.err == ""


def test_on_a_terminal_bars_show_epochs_evaluation_and_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    two_epochs(Progress(shown=True, epochs=2))
    shown = terminal.getvalue()
    for part in ("epoch 1/2", "epoch 2/2", "evaluation"):
        assert part in shown
    assert "epoch 2 is over" in capsys.readouterr().out


def test_the_bar_of_a_resumed_epoch_starts_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    progress = Progress(shown=True, epochs=2)
    progress.start_epoch(1, 8, 5)
    progress.advance(LOGGED)
    progress.close()
    assert "5/8" in terminal.getvalue()


def test_closing_twice_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(shown=True, epochs=1)
    progress.start_epoch(0, 2, 0)
    progress.close()
    progress.close()


VALUES = ("loss 1.235", "top-1 45.7 %", "12,346 images/s", "lr 0.1", "wait 3 %", "MFU 42 %")
"""Values after the bar, most important first."""


@pytest.mark.parametrize(("columns", "shown"), [(60, 0), (80, 1), (120, 4), (200, 6)])
def test_a_bar_shows_only_values_that_fit(columns: int, shown: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(columns, monkeypatch) as screen:
        progress = Progress(shown=True, epochs=90)
        progress.start_epoch(2, 1251, 0)
        for _ in range(2):
            time.sleep(0.11)  # tqdm's shortest interval
            progress.advance(LOGGED, run_left=7500.0)
        (line,) = screen.read()
        found = re.fullmatch(r"epoch 3/90 \|([^|]{10,40})\| 2/1,251  [0-9hmins ]+ left  run 2 h 05 min(.*)", line)
        assert found
        assert found[2] == "".join(f"  {value}" for value in VALUES[:shown])
        assert len(line) < columns
        progress.close()


@pytest.mark.parametrize(
    ("done", "width", "line"),
    [
        (0, 30, "t |            | 0/4  5 s left"),
        (1, 19, "t |##7        | 1/4"),
        (3, 20, "t |#########   | 3/4"),
        (4, 20, "t |############| 4/4"),
        (4, 8, "t 4/4"),
        (4, 4, "t 4/"),
    ],
)
def test_a_bar_fits_its_terminal(done: int, width: int, line: str) -> None:
    assert bar_line("t ", done, 4, ["5 s left"], width, " 123456789#") == line


@pytest.mark.parametrize("columns", [80, 120])
def test_the_end_of_an_epoch_leaves_only_its_line(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(columns, monkeypatch) as screen:
        progress = Progress(shown=True, epochs=2)
        printed = []
        for epoch in range(2):
            progress.start_epoch(epoch, 3, 0)
            for _ in range(2):
                time.sleep(0.11)
                progress.advance(LOGGED, run_left=7500.0)
            with progress.counting("evaluation", 2000) as on_batch:
                time.sleep(0.11)
                on_batch(512)
                *before, bar = screen.read()
                assert before == printed
                assert bar.startswith("evaluation |")
                assert "| 512/2,000" in bar
            progress.end_epoch(f"epoch {epoch + 1} is over")
            printed.append(f"epoch {epoch + 1} is over")
            assert screen.read() == printed


@pytest.mark.parametrize(("columns", "shown"), [(16, 1), (17, 2), (80, 2), (94, 3), (95, 4)])
def test_an_epoch_line_leaves_out_fields_that_do_not_fit(
    columns: int, shown: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = ("epoch 1/2", "loss 1", "x" * 70, "lr 2")
    with terminal(columns, monkeypatch) as screen:
        for progress in (Progress(shown=True, epochs=2), Progress(shown=True, epochs=2, verbosity=EVERY_LINE)):
            progress.log_line(*fields)
            progress.end_epoch(*fields)
        assert screen.read() == 3 * ["  ".join(fields[:shown])]
    Progress(shown=True, epochs=2).end_epoch(*fields)
    assert capsys.readouterr().out == "  ".join(fields) + "\n"


@pytest.mark.parametrize("columns", [80, 120])
def test_a_bar_survives_echoes_and_error_messages(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(columns, monkeypatch) as screen:
        progress = Progress(shown=True, epochs=1)
        progress.start_epoch(0, 9, 0)
        time.sleep(0.11)
        progress.advance(LOGGED)
        assert screen.read()[0].startswith("epoch 1/1 |")
        screen.file.write("^C")  # as a terminal echoes the key
        assert len(screen.read()) == 1
        complain("a fault")
        assert screen.read() == ["lars-train: a fault"]
        time.sleep(0.11)
        progress.advance(LOGGED)
        line, bar = screen.read()
        assert (line, bar[:11]) == ("lars-train: a fault", "epoch 1/1 |")
        progress.close()
        assert screen.read() == ["lars-train: a fault"]


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_dumb_terminal_gets_lines(
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
def test_verbosity_selects_what_is_printed(verbosity: int, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(shown=True, epochs=1, verbosity=verbosity)
    progress.say("hello")
    progress.log_line("update 10")
    progress.say("WARNING: hot")
    progress.end_epoch("epoch 1 is over")
    assert capsys.readouterr().out == expected


def test_a_long_epoch_without_a_bar_prints_lines(
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
    ("no_color", "terminal", "colored"), [("", True, True), ("1", True, False), ("", False, False)]
)
def test_only_a_terminal_gets_colors(
    no_color: str, terminal: bool, colored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Terminal() if terminal else io.StringIO())
    Progress(shown=True, epochs=1).say("WARNING: hot \x1b[2J")
    complain("a fault")
    printed = [stream.getvalue() for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.StringIO)]
    if colored:
        assert printed == ["\x1b[33mWARNING:\x1b[0m hot \\x1b[2J\n", "\r\x1b[K\x1b[31mlars-train:\x1b[0m a fault\n"]
    else:
        erased = "\r\x1b[K" if terminal else ""
        assert printed == ["WARNING: hot \\x1b[2J\n", f"{erased}lars-train: a fault\n"]


NOTEBOOK = f"""
import time
from lars_train.monitoring.progress import Progress
from lars_train.messages import complain, say
progress = Progress(shown=True, epochs=2)
say('a line')
progress.start_epoch(0, 3, 0)
time.sleep(0.11)
progress.advance({LOGGED})
with progress.counting('evaluation', 10) as on_batch: on_batch(10)
progress.end_epoch('epoch 1 is over')
complain('a fault')
"""


def test_notebooks_show_lines_without_traces_of_bars(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    from jupyter_client.manager import start_new_kernel

    (tmp_path / "command.py").write_text(NOTEBOOK)
    manager, client = start_new_kernel()
    try:

        def shown(code: str) -> dict[str, str]:
            found = {"stdout": "", "stderr": ""}

            def collect(message: dict[str, Any]) -> None:
                if message["msg_type"] == "stream":
                    found[message["content"]["name"]] += message["content"]["text"]

            reply = client.execute_interactive(code, timeout=60, output_hook=collect)
            assert reply["content"]["status"] == "ok"
            return found

        cell_output = shown(NOTEBOOK)
        # The notebook runs commands on a pseudo-terminal.
        command_output = shown(f"get_ipython().system('{sys.executable} {tmp_path / 'command.py'}')")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert cell_output == {"stdout": "a line\nepoch 1 is over\n", "stderr": "lars-train: a fault\n"}
    screen = Screen(80)
    # A notebook supports only the escape sequences for colors.
    screen.feed(re.sub(r"\x1b\[[0-9]*[^0-9m]", "", "".join(command_output.values())))
    assert "epoch 1/2 |" in command_output["stdout"]
    assert screen.lines == ["a line", "epoch 1 is over", "lars-train: a fault"]


@pytest.mark.parametrize("kernel", [True, False])
def test_a_notebook_has_tqdms_own_bars(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Recorded(tqdm):  # type: ignore[type-arg]
        def __init__(self, **keywords: Any) -> None:
            made.append(self)
            super().__init__(**keywords, file=io.StringIO())

    shell = SimpleNamespace(config={"IPKernelApp": {}} if kernel else {})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr("tqdm.auto.tqdm", Recorded)
    monkeypatch.setattr("tqdm.notebook.IProgress", object)
    progress = Progress(shown=True, epochs=3)
    progress.start_epoch(1, 10, 4)
    progress.advance({"train/loss": 1.25, "train/lr": 0.5})
    if kernel:
        assert (made[0].desc, made[0].n, made[0].total) == ("epoch 2/3", 5, 10)
        assert made[0].postfix == "loss 1.250, lr 0.5"
    with progress.counting("evaluation", 30) as count:
        count(12)
    assert [(bar.desc, bar.n) for bar in made[1:]] == ([("evaluation", 12)] if kernel else [])
    assert len(made) == (2 if kernel else 0)
