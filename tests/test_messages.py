"""Printed text is safe on any terminal, comes from rank 0, and has numbers rounded for reading."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from screen import terminal

import lars_train
from lars_train.messages import (
    complain,
    counted,
    first_line,
    format_duration,
    format_number,
    is_rank0,
    operations,
    rate,
    say,
    size,
)
from lars_train.monitoring.progress import Progress

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
def test_rank_0_prints_and_one_rank_per_machine_reports_errors(
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
    printed = capsys.readouterr()
    assert is_rank0() is says
    assert printed.out == ("a line\n" if says else "")
    assert printed.err == ("lars-train: a fault\n" if complains else "")


def test_long_lines_are_folded_between_words_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = "disk           633 kB a checkpoint: 6.33 MB written in all, 2.53 MB at the end"
    fault = "this is refused; run torchrun -m lars_train batch=16k optimizer.lr=1, or plan it"
    row = "| batch | " + "top-1 | " * 6
    with terminal(50, monkeypatch) as screen:
        say(f"{disk}\n\n{row}")
        complain(fault)
        Progress(shown=True, epochs=1).say(f"NOTE: it is in runs/{'x' * 45}, which is long.")
        assert screen.read() == [
            "disk           633 kB a checkpoint: 6.33 MB",
            "               written in all, 2.53 MB at the end",
            "",
            row[:49],
            row[50:57],
            "lars-train: this is refused; run",
            "  torchrun -m lars_train batch=16k optimizer.lr=1,",
            "  or plan it",
            "NOTE: it is in",
            *(f"  runs/{'x' * 43}", "xx,", "  which is long."),
        ]
    say(disk)
    complain(fault)
    assert capsys.readouterr() == (f"{disk}\n", f"lars-train: {fault}\n")


def test_a_closed_pipe_does_not_end_the_program() -> None:
    code = (
        "import os, sys\n"
        "from lars_train.monitoring.progress import Progress\n"
        "from lars_train.messages import complain, say\n"
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
def test_streams_closed_by_the_caller_are_opened_to_dev_null(closed: tuple[int, ...]) -> None:
    code = (
        "import os, sys\n"
        "from lars_train.messages import complain, open_standard_streams, say\n"
        "open_standard_streams()\n"
        "say('a line'), complain('a fault'), sys.stdout.isatty(), sys.stderr.isatty()\n"
        "with open(os.devnull) as file:\n"
        "    os._exit(7 if file.fileno() > 2 else 1)\n"
    )

    def close() -> None:
        for number in closed:
            os.close(number)

    assert subprocess.run([sys.executable, "-c", code], preexec_fn=close, check=False).returncode == 7


def test_streams_take_any_text_in_any_encoding() -> None:
    code = (
        "from lars_train.messages import complain, open_standard_streams, say\n"
        "open_standard_streams()\n"
        "say('caf\\udce9 d\\xf6g'), complain('\\u753b'), print('\\udce9')\n"
    )
    for encoding, dog, image in (("ascii", rb"d\xf6g", rb"\u753b"), ("utf-8", "dög".encode(), "画".encode())):
        env = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
        assert done.stdout == rb"caf\xe9 " + dog + b"\n" + rb"\udce9" + b"\n"
        assert done.stderr == b"lars-train: " + image + b"\n"


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 kB"),
        (12, "0.012 kB"),
        (4_560, "4.56 kB"),
        (999_400, "999 kB"),
        (999_600, "1 MB"),
        (98_765_432, "98.8 MB"),
        (999_499_999, "999 MB"),
        (999_500_001, "1 GB"),
        (1.44e11, "144 GB"),
        (6.4e12, "6.4 TB"),
    ],
)
def test_sizes_have_three_digits_and_the_largest_fitting_unit(count: float, shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(56_234_567, "56.2 MFLOP"), (24.5e9, "24.5 GFLOP"), (999.96e9, "1 TFLOP"), (312e12, "312 TFLOP")],
)
def test_operations_have_three_digits(count: float, shown: str) -> None:
    assert operations(count) == shown


@pytest.mark.parametrize(("per_s", "shown"), [(0.1234, "0.123"), (45.678, "45.7"), (12_345.6, "12,346")])
def test_large_rates_are_whole_numbers(per_s: float, shown: str) -> None:
    assert rate(per_s) == shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (89.0, "89 s"),
        (91.0, "2 min"),
        (3599.0, "1 h 00 min"),
        (7500.0, "2 h 05 min"),
        (273_600.0, "3 d 4 h"),
    ],
)
def test_durations_have_their_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "words", "shown"),
    [
        (0, ("epoch",), "0 epochs"),
        (1, ("epoch",), "1 epoch"),
        (12_345, ("image",), "12,345 images"),
        (1, ("class", "classes"), "1 class"),
        (2, ("class", "classes"), "2 classes"),
    ],
)
def test_a_count_takes_singular_or_plural(count: int, words: tuple[str, ...], shown: str) -> None:
    assert counted(count, *words) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(5.0, "5"), (20 / 9, "2.22"), (5 / 9, "0.56"), (0.0, "0"), (1.0, "1"), (0.001234, "0.0012")]
)
def test_computed_numbers_have_two_or_three_digits(value: float, shown: str) -> None:
    assert format_number(value) == shown


def test_no_message_has_an_s_in_parentheses() -> None:
    found = []
    for path in Path(lars_train.__path__[0]).rglob("*.py"):
        texts = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        found += [f"{path.name}: {text}" for text in texts if isinstance(text, str) and re.search(r"\(e?s\)", text)]
    assert found == []


def test_an_errors_first_line_is_from_its_message_or_its_name() -> None:
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert (first_line("a\r\nb"), first_line("")) == ("a", "")
