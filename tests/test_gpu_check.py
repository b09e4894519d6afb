"""scripts/gpu_check.sh: its commands are valid, its stages are short, and no printed line is lost."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import environment, start

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
STAGES = ["tests", "step", "lars", "training", "more"]
# Stands in for python: the tests fail, compiling takes too long, and the training runs end with equal weights.
STUB = r"""#!/bin/sh
for folder; do :; done
folder=${folder#run.dir=}
echo "ran $*"
case "$*" in
    -m\ pytest*) exit 1 ;;
    *--sweep*compiled*) exec sleep 60 ;;
    *run.dir=*stopped)
        if [ ! -e "$folder/checkpoints" ]; then
            trap 'exit 75' TERM
            mkdir -p "$folder/checkpoints"
            touch "$folder/checkpoints/1.pt"
            sleep 20 & wait
        fi ;;
esac
case "$*" in *run.dir=*) mkdir -p "$folder" && echo '"sha256_float32": "c0ffee"' >"$folder/final.json" ;; esac
"""
# Runs `-m MODULE` or a script as `python` does.
RUN = """
import pathlib, runpy, sys
words = sys.argv[1:]
if words[0] == "-m":
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
else:
    sys.argv = words
    sys.path.insert(0, str(pathlib.Path(words[0]).resolve().parent))
    runpy.run_path(words[0], run_name="__main__")
"""


def run(*arguments: str, script: Path = SCRIPT, folder: Path = ROOT, **extra: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(script), *arguments]
    variables = environment(**{"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **extra})
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=240, check=False)


def changed(folder: Path, *changes: tuple[str, str]) -> Path:
    """Return a changed copy of the script in a copy of the checkout."""
    (folder / "scripts").mkdir()
    beside = [ROOT / name for name in ("lars_train", "configs", "tests", "pyproject.toml")]
    for path in [*ROOT.glob("scripts/*"), *beside]:
        (folder / path.relative_to(ROOT)).symlink_to(path)
    text = SCRIPT.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    copy = folder / "scripts" / SCRIPT.name
    copy.unlink()
    copy.write_text(text)
    return copy


@pytest.fixture(scope="module")
def dry() -> str:
    done = run("--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_every_command_is_valid_until_it_needs_a_gpu(dry: str) -> None:
    commands = [shlex.split(line.partition(" s: ")[2]) for line in dry.splitlines() if line.startswith("== ")]
    assert len(commands) == 10
    for program, *words in commands:
        assert program == sys.executable
        collects = words[:2] == ["-m", "pytest"]
        options = ["--collect-only", "-q"] if collects else []
        done = start([program, "-c", RUN, *words, *options], ROOT, CUDA_VISIBLE_DEVICES="")
        output = done.stdout + done.stderr
        if collects:
            (collected,) = re.findall(r"(\d+)(?:/\d+)? tests? collected", output)
            assert int(collected) > 20
        else:
            assert done.returncode == 2, output
            assert "no CUDA device" in output


def test_no_stage_takes_more_than_four_minutes(dry: str) -> None:
    sums: dict[str, int] = {}
    limits = []
    for line in dry.splitlines():
        if found := re.match(r"== .*?, at most (\d+) s: ", line):
            limits.append(int(found[1]))
        elif found := re.match(r"=== (\w+): (\d+) s at most", line):
            sums[found[1]] = int(found[2])
            assert sum(limits) == int(found[2]) <= 240
            limits = []
    assert list(sums) == STAGES


def test_a_stage_that_takes_too_long_is_a_failure(tmp_path: Path) -> None:
    done = run("--dry-run", "step", script=changed(tmp_path, ('compiled" 140', 'compiled" 150')))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "=== failed: step, 250 s instead of 240"


def test_all_stages_run_and_the_report_keeps_every_line(tmp_path: Path) -> None:
    script = changed(tmp_path, ('"step, compiled" 140', '"step, compiled" 9'))
    stub = tmp_path / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    report = tmp_path / "here" / "report.txt"
    report.parent.mkdir()
    report.write_text("an earlier stage\n")
    # A relative path of the report starts at the caller's folder.
    done = run("--report", "report.txt", script=script, folder=report.parent, PYTHON=str(stub))
    assert report.read_text() == "an earlier stage\n" + done.stdout
    lines = done.stdout.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines if line.endswith(" s at most")] == STAGES
    starts = [line for line in lines if line.startswith("ran ")]
    assert len([line for line in lines if line.startswith("== ") and ", at most " in line]) == len(starts) - 1 == 10
    assert any(re.match("== step, compiled: exit code 143 after . s, cut at its limit", line) for line in lines)
    assert any("the resumed run has the same weights as the run that was not stopped" in line for line in lines)
    assert lines[-1] == "=== failed: tests"
    assert done.returncode == 1


def test_a_signal_ends_the_command_and_keeps_the_report(tmp_path: Path) -> None:
    stub, report, started = (tmp_path / name for name in ("stub", "report.txt", "started"))
    stub.write_text(f'#!/bin/sh\n[ "$1" = - ] && exit\necho "a row"\necho $$ >{started}\nexec sleep 60\n')
    stub.chmod(0o755)
    with subprocess.Popen(
        ["bash", str(SCRIPT), "lars", "--report", str(report)],
        env=environment(PYTHON=str(stub)),
        stdout=subprocess.DEVNULL,
    ) as process:
        end = time.monotonic() + 30
        while not (started.exists() and started.read_text()) and time.monotonic() < end:
            time.sleep(0.02)
        process.terminate()
        assert process.wait(30) == 143
    assert report.read_text().splitlines()[-2:] == ["a row", "== stopped by a signal"]
    assert not Path(f"/proc/{started.read_text().strip()}").exists()


def test_different_weights_are_a_failure(tmp_path: Path) -> None:
    stub = tmp_path / "stub"
    stub.write_text(STUB.replace('"c0ffee"', "\"'$folder'\""))
    stub.chmod(0o755)
    done = run("training", "--report", str(tmp_path / "report.txt"), PYTHON=str(stub))
    assert done.returncode == 1
    assert "WEIGHTS DIFFER" in done.stdout
    assert done.stdout.splitlines()[-1] == "=== failed: training, equal weights"


@pytest.mark.parametrize(
    ("arguments", "extra", "message"),
    [
        (["nope"], {}, f"nope: unknown stage or option; the stages are {' '.join(STAGES)}"),
        (["--dry"], {}, "--dry: unknown stage or option"),
        (["--report"], {}, "--report: name a file"),
        (["--report", "/proc/none/report"], {}, "/proc/none/report: cannot be written"),
        ([], {"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python: no such program"),
    ],
)
def test_bad_input_prints_one_line_and_exits_with_2(arguments: list[str], extra: dict[str, str], message: str) -> None:
    done = run(*arguments, **extra)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"gpu_check.sh: {message}")


def test_the_report_has_the_reason_if_no_stage_can_start(tmp_path: Path) -> None:
    report = tmp_path / "report.txt"
    done = run("lars", "--report", str(report))
    assert done.returncode == 2
    assert done.stdout.splitlines()[1:] == ["torch finds no CUDA device here"]
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13 is missing')")
    done = run("lars", "--report", str(report), PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert report.read_text().endswith("lars_train: libcudart.so.13 is missing\n")


def test_help_names_every_stage_and_option() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert {"--dry-run", "--report", *STAGES} <= set(re.findall(r"[\w-]+", done.stdout))
