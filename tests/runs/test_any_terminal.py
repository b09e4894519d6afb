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


def nobody() -> tuple[str, ...]:
    """Return the prefix that runs a command as a user without an entry in /etc/passwd; empty if there is none here."""
    for command in (
        ("unshare", "--user", "--map-user=12345"),
        ("setpriv", "--reuid", "12345", "--clear-groups"),
    ):
        check = [*command, sys.executable, "-c", "import os, lars_train; os._exit(os.getuid() != 12345)"]
        if shutil.which(command[0]) and not subprocess.run(check, capture_output=True, check=False).returncode:
            return command
    return ()


def test_commands_accept_odd_names_without_home_or_utf8(folder: Path) -> None:
    user, run = nobody(), folder / "runs" / "a"
    env = environment(XDG_CACHE_HOME="", TMPDIR=str(folder / "tmp"), **ASCII)
    if user:
        del env["HOME"]
    else:
        env["XDG_CACHE_HOME"] = str(folder / "cache")
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o777)
    # A run directory with a name that is not UTF-8.
    odd = os.fsdecode(os.fsencode(folder / "runs") + b"/caf\xe9")
    commands = [
        ["lars-train", *SETTINGS, "mode=plan"],
        ["lars-train", *SETTINGS, "data.on_error=skip", "run.name=a"],
        ["lars-train", *SETTINGS, "mode=evaluate", "checkpoint.path=runs/a", "evaluate.report=mistakes"],
        ["lars-train", "mode=export", "checkpoint.path=runs/a"],
        ["lars-data", "pack", "images", "store", "--on-error", "skip"],
        ["lars-data", "verify", "store"],
        ["python", "-c", "import shutil, sys; shutil.copytree(*sys.argv[1:])", str(run), odd],
        ["lars-report", odd, "runs", "--out", "out"],
        ["lars-train", *SETTINGS, "run.dir=~/b"],
    ]
    # A separate shell, because Python reads the terminal's encoding at startup.
    shell = Shell(user, cwd=folder, env=env)
    done = [shell.run(command, folder, env) for command in commands[: len(commands) - (not user)]]
    shell.close()
    texts = [one.stdout + one.stderr for one in done]
    assert not any("Traceback" in text for text in texts)
    assert [one.returncode for one in done[:8]] == [0] * 8, done
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
    if not user:
        pytest.skip("only the encoding: neither unshare nor setpriv can start a process as another user")
    assert (folder / "tmp" / "lars-train-12345").is_dir()
    assert done[8].returncode == 2
    assert done[8].stderr == "lars-train: run.dir=~/b: this user has no home directory; give a path without ~.\n"
    assert not (folder / "~").exists()


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
