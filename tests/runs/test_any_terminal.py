"""Commands work on any terminal, with any names of images and classes, and without a home directory."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from tiny import ALONE, Shell, environment

SETTINGS = (
    "data=folder data.root=images data.image_size=8 data.workers=0 model=small model.ghost_batch=4 batch=32k "
    "batch.size=4 epochs=1 optimizer.lr=1.0 precision=fp32 device=cpu schedule.warmup_epochs=0 launch.threads=1"
).split()
ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
CLASSES = (b"caf\xe9", b"dog")
ESCAPED = r"caf\xe9"


def make_images(root: Path) -> None:
    for split in (b"train", b"val"):
        for name in CLASSES:
            folder = os.fsencode(root) + b"/" + split + b"/" + name
            try:
                Path(os.fsdecode(folder)).mkdir(parents=True)
            except OSError:
                pytest.skip("the file system refuses names that are not UTF-8")
            for i in range(4):
                Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(os.fsdecode(folder + b"/%d.png" % i))
        with open(folder + b"/b\xc3\xa4d.png", "wb") as file:  # noqa: PTH123
            file.write(b"no image")


def outputs(folder: Path, *commands: list[str], user: tuple[str, ...] = (), **extra: str) -> list[str]:
    """Run the commands, assert that they succeed, and return their output."""
    env = {name: value for name, value in environment(**extra).items() if not (user and name == "HOME")}
    # A separate shell, because Python reads the terminal's encoding at startup.
    shell = Shell(user, cwd=folder, env=env)
    done = [shell.run(command, folder, env) for command in commands]
    shell.close()
    assert [one.returncode for one in done] == [0] * len(commands), done
    texts = [one.stdout + one.stderr for one in done]
    assert not any("Traceback" in text for text in texts)
    return texts


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder that any user can write to, with images of a class whose name is not UTF-8."""
    path = Path(tempfile.mkdtemp(prefix="lars-terminal-"))
    try:
        make_images(path / "images")
        for place in (path, *path.rglob("*")):
            place.chmod(0o777)
        yield path
    finally:
        shutil.rmtree(path)


def test_commands_accept_names_outside_ascii(folder: Path) -> None:
    run = folder / "runs" / "a"
    # A run directory with a name that is not UTF-8.
    odd = os.fsdecode(os.fsencode(folder / "runs") + b"/caf\xe9")
    texts = outputs(
        folder,
        ["lars-train", *SETTINGS, "mode=plan"],
        ["lars-train", *SETTINGS, "data.on_error=skip", "run.name=a"],
        ["lars-train", *SETTINGS, "mode=evaluate", "checkpoint.path=runs/a", "evaluate.report=mistakes"],
        ["lars-train", "mode=export", "checkpoint.path=runs/a"],
        ["lars-data", "pack", "images", "store", "--on-error", "skip"],
        ["python", "-c", "import shutil, sys; shutil.copytree(*sys.argv[1:])", str(run), odd],
        ["lars-report", odd, "runs", "--out", "out"],
        XDG_CACHE_HOME=str(folder / "cache"),
        **ASCII,
    )
    assert r"images/val/dog/b\xe4d.png cannot be decoded" in texts[1]
    record = [json.loads(line) for line in (run / "bad_images.jsonl").read_text().splitlines()]
    assert {Path(line["image"]).name for line in record} == {"bäd.png"} or ESCAPED in str(record)
    for name in ("per_class.csv", "confusion.csv"):
        with (folder / "mistakes" / name).open(encoding="utf-8", newline="") as file:
            assert {row[0] for row in csv.reader(file)} == {"class", ESCAPED, "dog"}
    assert (folder / "mistakes" / "confusion.png").stat().st_size > 0
    for name in ("table.csv", "table.md", "report.html"):
        (folder / "out" / name).read_text(encoding="utf-8")
    assert ESCAPED in (folder / "out" / "table.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("closed", [False, True])
def test_commands_succeed_with_a_closed_or_full_output(closed: bool, folder: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is missing")
    training = [[*SETTINGS, "data.on_error=skip", "run.name=b"]] if closed else []
    for arguments in (["--version"], ["--help"], *training):
        reader, pipe = os.pipe()
        os.close(reader)
        with open("/dev/full", "w") as full:  # noqa: PTH123
            stdout = pipe if closed else full
            done = subprocess.run([*ALONE, *arguments], cwd=folder, env=environment(), stdout=stdout, stderr=-1)
        os.close(pipe)
        assert (done.returncode, done.stderr) == (0, b""), arguments
    assert (folder / "runs" / "b" / "final.json").exists() == closed


def nobody() -> tuple[str, ...]:
    """Return the prefix that runs a command as a user without an entry in /etc/passwd."""
    for command in (
        ("unshare", "--user", "--map-user=12345"),
        ("setpriv", "--reuid", "12345", "--clear-groups"),
    ):
        check = [*command, sys.executable, "-c", "import os, lars_train; os._exit(os.getuid() != 12345)"]
        if shutil.which(command[0]) and not subprocess.run(check, capture_output=True, check=False).returncode:
            return command
    pytest.skip("neither unshare nor setpriv can start a process as another user")


def test_every_command_works_without_a_home_directory(folder: Path) -> None:
    user = nobody()
    run = [*SETTINGS, "data.on_error=skip"]
    commands = [
        ["lars-train", *run, "mode=plan"],
        ["lars-train", *run, "run.name=a"],
        ["lars-train", *run, "mode=evaluate", "checkpoint.path=runs/a"],
        ["lars-report", "runs/a"],
        ["lars-data", "pack", "images", "store", "--on-error", "skip"],
        ["lars-data", "verify", "store"],
    ]
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o777)
    outputs(folder, *commands, user=user, XDG_CACHE_HOME="", TMPDIR=str(folder / "tmp"))
    assert (folder / "tmp" / "lars-train-12345").is_dir()
    done = subprocess.run(
        [*user, *ALONE, *run, "run.dir=~/b"],
        cwd=folder,
        env={name: value for name, value in environment().items() if name != "HOME"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "lars-train: run.dir=~/b: this user has no home directory; give a path without ~.\n"
    assert not (folder / "~").exists()
