"""The command ``lars-data``: output, exit codes, and errors in one line."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lars_train.pack.lars_data import main


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for c in "ab":
            for i in range(4):
                path = tmp_path / "data" / split / c / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(i))
    return tmp_path


def run(*arguments: str) -> object:
    try:
        main(arguments)
    except SystemExit as end:
        return end.code
    return 0


def test_help_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys\nfrom lars_train.pack.lars_data import main\n"
        "try: main(['pack', '--help'])\n"
        "except SystemExit: print('LOADED', *{'torch', 'numpy', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--on-error" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["LOADED"]


def test_no_command_imports_torch(root: Path) -> None:
    code = (
        "import sys\nfrom lars_train.pack.lars_data import main\n"
        "main(['pack', 'data', 'store', '--short', '8', '--jobs', '1'])\n"
        "main(['verify', 'store', '--jobs', '1'])\nmain(['info', 'store'])\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("train: 8 images, 2 classes") == 3


def test_a_store_is_packed_verified_and_described(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pack", "data", "store", "--shards", "2", "--jobs", "1") == 0
    out = capsys.readouterr().out
    stored = sum(path.stat().st_size for path in Path("data/train").glob("*/*"))
    assert f"train: 8 images, 2 classes, {stored / 1e3:.3g} kB in 2 shards" in out
    assert "verified" in out
    fingerprint = next(line for line in out.splitlines() if line.startswith("fingerprint"))
    assert run("pack", "data", "store", "--shards", "2", "--jobs", "1") == 0
    assert "already exists" in capsys.readouterr().out
    assert run("verify", "store", "--source", "data", "--jobs", "1") == 0
    assert "intact, and equal to data" in capsys.readouterr().out
    assert run("info", "store") == 0
    assert fingerprint in capsys.readouterr().out


def test_each_image_left_out_has_one_line_whatever_its_name(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "data").rename(root / "da\nta")
    for split in ("train", "val"):
        shutil.copytree(root / f"da\nta/{split}/a", root / f"da\nta/{split}/A")
    (root / "da\nta/train/a/bro\nken.png").write_bytes(b"")
    assert run("pack", "da\nta", "st\nore", "--short", "8", "--on-error", "skip", "--jobs", "1") == 0
    assert run("verify", "st\nore", "--jobs", "1") == 0
    out = capsys.readouterr().out
    assert "left out: train/a/bro\\nken.png: " in out
    assert out.count("NOTE: classes whose names look alike: A, a\n") == 2
    assert out.count("\nst\\nore: re-encoded images") == 2
    assert "st\\nore/store.json\n" in out


@pytest.mark.parametrize(("position", "message"), [(700, "checksum is wrong"), (10, "no header at byte 0")])
def test_a_changed_byte_is_found_and_its_class_named(
    root: Path, position: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pack", "data", "store", "--shards", "1", "--jobs", "1") == 0
    shard = root / "store/train/train-000000.tar"
    raw = bytearray(shard.read_bytes())
    raw[position if position == 10 else raw.index(b"\x89PNG") + 20] ^= 1
    shard.write_bytes(raw)
    capsys.readouterr()
    assert run("verify", "store", "--jobs", "1") == 1
    out, err = capsys.readouterr()
    assert message in out
    assert "1 problem: 1 in train" in err
    assert err.count("\n") == 1


def test_a_changed_label_is_found(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pack", "data", "store", "--shards", "1", "--jobs", "1") == 0
    shard = root / "store/val/val-000000.tar"
    raw = bytearray(shard.read_bytes())
    label = raw.index(b".cls\0") // 512 * 512 + 512
    raw[label] = ord("1") if raw[label] == ord("0") else ord("0")
    shard.write_bytes(raw)
    assert run("verify", "store", "--jobs", "1") == 1
    assert "a label differs from the index" in capsys.readouterr().out


def test_a_difference_from_the_original_is_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pack", "data", "store", "--jobs", "1") == 0
    (root / "data/val/b/2.png").write_bytes(png(99))
    (root / "data/val/b/4.png").write_bytes(png(99))
    assert run("verify", "store", "--source", "data", "--jobs", "1") == 1
    out, err = capsys.readouterr()
    assert "b/2.png: differs from the original" in out
    assert "val: the store lacks 1 image of data\n" in out
    assert "1 problem: 1 in val/b" in err
    (root / "data/val/b/2.png").unlink()
    assert run("verify", "store", "--source", "data", "--jobs", "1") == 1
    assert "data lacks 1 image of val, such as b/2.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pack", "nowhere", "store"), "data.root=nowhere cannot be opened"),
        (("pack", "data", "data/store"), "must lie outside data"),
        (("pack", "data", "store", "--quality", "90"), "--quality requires"),
        (("pack", "data", "store", "--val-labels", "x.csv"), "only a val/ without class folders needs labels"),
        (("verify", "data"), "data is not a store; `lars-data pack data STORE`"),
        (("info", "nowhere"), "nowhere cannot be opened"),
    ],
)
def test_bad_input_ends_with_2_and_one_line_and_writes_nothing(
    root: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert sorted(path.name for path in root.iterdir()) == ["data"]


@pytest.mark.parametrize(
    "option", [("--short", "0"), ("--max", "x"), ("--short", "1", "--max", "2"), ("--quality", "96")]
)
def test_a_bad_option_is_refused_by_its_name(
    root: Path, option: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pack", "data", "store", *option) == 2
    assert option[-2] in capsys.readouterr().err
    assert not (root / "store").exists()


@pytest.mark.parametrize(
    "arguments",
    [("pack", "", "store"), ("pack", "data", ""), ("verify", ""), ("info", ""), ("verify", "store", "--source", "")],
)
def test_an_empty_path_is_not_the_working_folder(
    arguments: tuple[str, ...], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # An unset shell variable gives an empty argument.
    before = sorted(root.iterdir())
    assert run(*arguments) == 2
    assert "is empty. Pass a path" in capsys.readouterr().err
    assert sorted(root.iterdir()) == before
