"""Hostile checkpoints, weights, stored configs, zips and names run no code and do not act on a terminal."""

from __future__ import annotations

import functools
import html
import io
import json
import os
import pickle
import stat
import struct
import sys
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from lars_train import messages
from lars_train.cli import main
from lars_train.commands import _describe_results
from lars_train.config import Config, resolve
from lars_train.data.decode.pillow import BadImage, decode
from lars_train.data.loading.loader import EvalSpec, View, eval_loader
from lars_train.data.open import open_dataset
from lars_train.data.sources.folder import open_folder
from lars_train.data.sources.imagenet import open_imagenet
from lars_train.errors import ConfigError, DataError
from lars_train.export import export
from lars_train.launch import Ranks
from lars_train.messages import printable
from lars_train.models.factory import build_model
from lars_train.models.weights import load_weights
from lars_train.monitoring.log import RunLog
from lars_train.monitoring.progress import Progress
from lars_train.report.table import HEADER, markdown_table
from lars_train.training import checkpoint, session
from lars_train.training.assemble import optimizer_class
from lars_train.training.guard import listed_images
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation, check_same_experiment, run_hash

# Red text, a line that imitates the program's output, HTML, the end of a table cell, right-to-left text.
EVIL = "\x1b[31mred\nlars-train: all is well|<script>alert(1)</script>\r\x07\u202e"
SHOWN = r"\x1b[31mred\nlars-train: all is well|<script>alert(1)</script>\r\x07\u202e"
DOTTED = ("os.system", "hostile_module.boom", "torch.hub.load", "builtins.eval", "../../etc/passwd")

TINY: dict[str, Any] = {
    "epochs": 2,
    "max_updates": 1,
    "device": "cpu",
    "batch": {"size": 4},
    "recipe": {"rows": {"32k": {}}},
    "data": {"name": "synthetic", "image_size": 8, "augment": "none", "eval_crop": 1.0, "workers": 0},
    "model": {"name": "small", "ghost_batch": 4},
    "optimizer": {"lr": 1.0},
    "precision": {"name": "fp32"},
    "launch": {"threads": 1},
}
SYNTHETIC = {"train_count": 24, "val_count": 4, "num_classes": 4}


def config(directory: Path, **changes: Any) -> Config:
    raw = OmegaConf.merge(OmegaConf.structured(Config), TINY, {"run": {"dir": str(directory)}})
    if "data__name" not in changes:
        raw = OmegaConf.merge(raw, {"data": SYNTHETIC})
    for key, value in changes.items():
        OmegaConf.update(raw, key.replace("__", "."), value)
    assert isinstance(raw, DictConfig)
    return resolve(raw)


@functools.cache
def parts() -> dict[str, Any]:
    dataset = open_dataset(config(Path("x")).data)
    model = build_model("small", num_classes=4, ghost_batch=4, zero_gamma=False)
    return {
        "update": 1,
        "model": model.state_dict(),
        "optimizer": {},
        "plan": {"updates_per_epoch": 6},
        "classes": list(dataset.classes),
        "fingerprint": dataset.fingerprint,
    }


def content(stored: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with what `evaluate`, `export` and `prepare` read."""
    return {**parts(), "config": stored, "layout": "", "skipped": 0}


def changed(key: str, value: Any) -> dict[str, Any]:
    """Return the config of a run with one value replaced."""
    stored = asdict(config(Path("x")))
    *path, leaf = key.split(".")
    node = stored
    for part in path:
        node = node[part]
    node[leaf] = value
    return stored


class Bomb:
    """An object whose pickle creates the folder `mark` when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Return the path of a folder that exists only if code in a file has run."""
    return tmp_path / "mark"


@pytest.fixture
def hostile_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Provide a module that can be imported and must not be."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "hostile_module.py").write_text("def boom(*args, **kwargs): raise SystemExit('boom')\n")
    monkeypatch.syspath_prepend(str(folder))
    yield
    assert "hostile_module" not in sys.modules


@pytest.mark.parametrize("form", ["archive", "legacy", "bare pickle"])
def test_a_pickle_in_a_file_of_weights_runs_no_code(form: str, tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "weights.pth"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps({"conv.weight": Bomb(mark)}, protocol=2))
    else:
        torch.save({"conv.weight": Bomb(mark)}, path, _use_new_zipfile_serialization=form == "archive")
    with pytest.raises(
        ConfigError, match=r"model\.weights=.*(not a file of plain tensors|Only plain values and tensors are loaded)"
    ):
        load_weights(torch.nn.Linear(1, 1), str(path))
    assert not mark.exists()
    if form != "bare pickle":
        torch.load(path, weights_only=False)
        assert mark.exists(), "the file is harmless"


@pytest.mark.parametrize("where", ["model", "optimizer", "scaler"])
def test_a_pickle_in_a_checkpoint_with_valid_checksum_is_not_run(where: str, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.parent.mkdir()
    path = checkpoint.save(folder, 1, {**content(asdict(config(tmp_path))), where: {"x": Bomb(mark)}}, keep=3)
    assert checkpoint.verify(path)
    for mode in ("evaluate", "export", "train"):
        asked = config(tmp_path / "new", mode=mode, checkpoint__path=str(path))
        with pytest.raises(ConfigError, match="the file cannot be used: torch cannot read it"):
            {"evaluate": lambda c: session.evaluation_config(c, ()), "export": export, "train": prepare}[mode](asked)
    with pytest.raises(ConfigError, match=r"no checkpoint in .* can be used"):
        checkpoint.latest(folder)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file is harmless"


def test_a_pickle_in_the_place_of_cifar10_runs_no_code(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda self: None)
    with pytest.raises(ConfigError, match=r"data=cifar10: no usable copy in"):
        open_dataset(config(tmp_path / "run", data__name="cifar10", data__root=str(folder.parent)).data)
    assert not mark.exists()


@pytest.mark.usefixtures("hostile_module")
@pytest.mark.parametrize("name", DOTTED)
def test_names_in_a_stored_config_must_be_known_choices(name: str, tmp_path: Path) -> None:
    for key in ("model.name", "data.name"):
        path = checkpoint.save(tmp_path / key, 1, content(changed(key, name)), keep=3)
        asked = config(tmp_path / "new", mode="evaluate", checkpoint__path=str(path))
        with pytest.raises(ConfigError, match=r"no such model|choose one of cifar10"):
            session.evaluate_only(*session.evaluation_config(asked, ()), Ranks())
    for key in ("optimizer.base", "model.name"):
        path = checkpoint.save(tmp_path / key, 1, content(changed(key, name)), keep=3)
        with pytest.raises(ConfigError, match=r"does not fit optimizer\.base|choose (the same|model=)"):
            prepare(config(tmp_path / "new", checkpoint__path=str(path)))
    with pytest.raises(ConfigError, match=r"torch\.optim has no such class"):
        optimizer_class(name)


@pytest.mark.usefixtures("hostile_module")
def test_a_function_of_data_in_a_checkpoint_is_not_imported(tmp_path: Path) -> None:
    stored = changed("data.name", "custom")
    stored["data"] |= {"target": "hostile_module:boom", "kwargs": {"count": 1}}
    path = checkpoint.save(tmp_path, 1, content(stored), keep=3)
    asked = config(tmp_path / "new", mode="evaluate", checkpoint__path=str(path))
    for named in ((), ("data.kwargs.count=1",), ("data.name=custom", "model=small")):
        with pytest.raises(ConfigError, match="hostile_module:boom comes from a file"):
            session.evaluation_config(asked, named)
    # The fixture fails if the module is imported.


@pytest.mark.parametrize("name", ["Optimizer", "lr_scheduler", "swa_utils", "__builtins__", "_functional"])
def test_other_names_in_torch_optim_are_not_optimizers(name: str) -> None:
    with pytest.raises(ConfigError, match=r"torch\.optim has no such class"):
        optimizer_class(name)


@pytest.mark.usefixtures("hostile_module")
@pytest.mark.parametrize("key", ["optimizer.kwargs", "recipe.common", "recipe.rows", "model", "data", "optimizer"])
def test_nothing_in_a_stored_config_is_instantiated(key: str, tmp_path: Path) -> None:
    hostile = {"_target_": "hostile_module.boom", "_args_": ["x"], "_partial_": False}
    path = checkpoint.save(tmp_path / "c", 1, content(changed(key, hostile)), keep=3)
    asked = config(tmp_path / "new", mode="evaluate", checkpoint__path=str(path))
    if key in ("model", "data", "optimizer"):
        with pytest.raises(ConfigError, match="its config does not fit: Key '_target_'"):
            session.evaluation_config(asked, ())
        return
    restored, _ = session.evaluation_config(asked, ())
    section, leaf = key.split(".")
    assert getattr(getattr(restored, section), leaf) == hostile


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.name", "${oc.env:LARS_TRAIN_SECRET}"),
        ("optimizer.kwargs", {"x": ["${oc.env:LARS_TRAIN_SECRET}"]}),
        ("recipe.rows", {"${oc.env:LARS_TRAIN_SECRET}": {}}),
        ("data.name", "???"),
        ("epochs", None),
        ("data.mean", [0.5]),
        ("data.image_size", -1),
        ("data", None),
        ("data", "x"),
        ("nobody", 1),
    ],
)
def test_a_stored_config_is_checked_like_a_command_line(
    key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LARS_TRAIN_SECRET", "sesame")
    path = checkpoint.save(tmp_path / "c", 1, content(changed(key, value)), keep=3)
    asked = config(tmp_path / "new", mode="evaluate", checkpoint__path=str(path))
    with pytest.raises(ConfigError, match=r"checkpoint\.path=.*its config does not fit: ") as caught:
        session.evaluation_config(asked, ())
    assert "sesame" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_regular_checkpoint_is_evaluated(tmp_path: Path) -> None:
    own = content({})
    other = tmp_path / "start.pth"
    torch.save({key: torch.zeros_like(value) for key, value in own["model"].items()}, other)
    path = checkpoint.save(tmp_path / "c", 1, {**own, "config": changed("model.weights", str(other))}, keep=3)
    asked = config(tmp_path / "new", mode="evaluate", checkpoint__path=str(path))
    result = session.evaluate_only(*session.evaluation_config(asked, ()), Ranks())
    torch.save(own["model"], other)
    alone = config(tmp_path / "new", mode="evaluate", model__weights=str(other))
    assert result["val/loss"] == session.evaluate_only(alone, None, Ranks())["val/loss"]


@pytest.mark.parametrize(
    "entry",
    [
        {"config": {}},
        {"config": {"model": "small"}},
        {"config": []},
        {"classes": [1, 2, 3, 4]},
        {"classes": "cats"},
        {"model": {}},
        {"model": {"conv.weight": "x"}},
        {"model": {1: torch.zeros(1)}},
        {"model": {EVIL: torch.zeros(1)}},
        {"update": "1"},
        {"plan": {}},
        {"optimizer": 3},
    ],
)
def test_a_checkpoint_with_odd_values_is_refused_in_one_line(entry: dict[str, Any], tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "c", 1, {**content(changed("epochs", 2)), **entry}, keep=3)
    messages = []
    for mode, command in (("export", export), ("train", prepare)):
        try:
            command(config(tmp_path / "new", mode=mode, checkpoint__path=str(path)))
        except ConfigError as error:
            messages.append(str(error))
    assert messages
    assert all(map(str.isprintable, messages))


@pytest.mark.parametrize("name", ["../../small", "/small", "small/../small", "..", "small\0"])
def test_a_model_name_in_a_checkpoint_never_joins_a_path(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    path = checkpoint.save(folder / "b", 1, content(changed("model.name", name)), keep=3)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="no such model"):
        export(config(tmp_path / "new", mode="export", checkpoint__path=str(path)))
    assert sorted(tmp_path.rglob("*")) == before


def test_hydras_files_in_a_run_directory_are_never_read(tmp_path: Path, mark: Path) -> None:
    asked = config(tmp_path / "run")
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    hostile = f"model: !!python/object/apply:os.mkdir ['{mark}']\noptimizer: {{_target_: os.mkdir, path: '{mark}'}}\n"
    for name in (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "config.yaml"):
        (tmp_path / "run" / name).write_text(hostile)
    record = {"hash": run_hash(asked), "settings": {}, "started": []}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert session.find_finished(prepare(asked)) is None
    assert not mark.exists()
    for settings in ({"epochs": EVIL}, [EVIL], EVIL, None):
        (tmp_path / "run" / "run.json").write_text(json.dumps({"hash": EVIL, "settings": settings}))
        with pytest.raises(ConfigError) as caught:
            check_same_experiment(tmp_path / "run", asked)
        assert str(caught.value).isprintable()


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def packed(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


GOOD = {f"{split}/{c}/{i}.png": png() for split in ("train", "val") for c in "ab" for i in range(2)}


def test_names_in_a_zip_never_become_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"outside")
    up = os.path.relpath("/", here)
    hostile = [
        "../outside.png",
        "train/a/../../../outside.png",
        f"train/a/{up}{outside}",
        str(outside),
        f"/{outside}",
        "train//outside.png",
        "C:\\outside.png",
        "C:/train/a/x.png",
        "train/a/C:x.png",
        "train/b/x\\..\\..\\x.png",
        "\\\\host\\share\\x.png",
        "train/b/~root.png",
        "train/b/$HOME.png",
    ]
    path = packed(here / "x.zip", {**dict.fromkeys(hostile, b"inside"), **GOOD})
    opened: list[str] = []
    real = os.open

    def watched(file: Any, *arguments: Any, **keywords: Any) -> int:
        opened.append(os.fspath(file))
        return real(file, *arguments, **keywords)

    monkeypatch.setattr(os, "open", watched)
    data = open_folder(path, None)
    read = {source.name(i): source.read(i) for source in (data.train, data.val) for i in range(len(source))}
    assert data.classes == ("a", "b")
    # Odd file names within a class are allowed, because they refer to entries of the zip.
    assert {name for name, found in read.items() if found == b"inside"} == {
        "a/C:x.png",
        "b/~root.png",
        "b/$HOME.png",
    }
    assert set(opened) <= {path}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["here", "outside.png", "x.zip"]


def test_a_folder_name_in_a_zip_finds_no_labels_outside(tmp_path: Path) -> None:
    files = {"pets/train/a/1.png": png(), "pets/train/b/1.png": png(), "pets/val/1.png": png()}
    (tmp_path / "data").mkdir()
    path = packed(tmp_path / "data" / "x.zip", files)
    elsewhere = tmp_path / "1" / "2" / "3" / "4"
    elsewhere.mkdir(parents=True)
    (elsewhere.parent / "LOC_val_solution.csv").write_text("1,a\n")
    (tmp_path / "data" / "x.zip!pets").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="nor ILSVRC2012_devkit"):
        open_imagenet(path, None, None)
    # In its regular place the table is found.
    (tmp_path / "data" / "LOC_val_solution.csv").write_text("1,b\n")
    assert open_imagenet(path, None, None).val.labels.tolist() == [1]


@pytest.mark.parametrize("around", ["", "pets/"])
def test_symbolic_links_in_a_zip_are_counted_and_not_followed(around: str, tmp_path: Path) -> None:
    target = tmp_path / "secret.png"
    target.write_bytes(png())
    path = packed(tmp_path / "x.zip", {f"{around}{name}": data for name, data in GOOD.items()})

    def add(*names: str) -> None:
        with zipfile.ZipFile(path, "a") as archive:
            for name in names:
                link = zipfile.ZipInfo(f"{around}{name}")
                link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
                archive.writestr(link, str(target))

    add("train/a/link.png", "train/a/deep/link.png", "val/link", "link.png", "test", "a/link.png", "val/.x/link")
    data = open_folder(path, None)
    assert [[source.name(i) for i in range(len(source))] for source in (data.train, data.val)] == [
        ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    ] * 2
    assert data.inventory.skipped == {"folders beside the splits": 1, "hidden folders": 1, "symbolic links": 5}
    # A class with only links has no images.
    add("train/c/link.png")
    with pytest.raises(ConfigError, match=r"without images: c/ \(skipped: 3 symbolic links\)"):
        open_folder(path, None)


def test_a_duplicate_name_in_a_zip_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.zip", GOOD)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("train/a/1.png", b"another")
    with pytest.raises(ConfigError, match=r"train/a/1\.png appears twice"):
        open_folder(path, None)


ZEROS = 160 << 20


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A zip of 160 kB in which an image and the table of labels are 160 MiB of zeros each."""
    path = tmp_path_factory.mktemp("bomb") / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in GOOD.items():
            archive.writestr(name, data)
        with archive.open("train/a/9.png", "w", force_zip64=False) as entry:
            for _ in range(ZEROS >> 20):
                entry.write(bytes(1 << 20))
    return path.read_bytes()


def declare(raw: bytes, name: str, size: int) -> bytes:
    """Return the zip with another size in its directory (APPNOTE.TXT 4.3.12: 24 bytes into the entry)."""
    edited = bytearray(raw)
    start = edited.rindex(name.encode()) - 46
    assert edited[start : start + 4] == b"PK\x01\x02"
    edited[start + 24 : start + 28] = struct.pack("<I", size)
    return bytes(edited)


@pytest.mark.parametrize(
    ("size", "reason"),
    [(ZEROS, "is deflated, and would have 167,772,160 bytes"), (2**32 - 2, "states a size that deflate cannot reach")],
)
def test_a_zip_bomb_is_refused_when_the_zip_is_opened(bomb: bytes, size: int, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(declare(bomb, "train/a/9.png", size))
    with pytest.raises(ConfigError, match=rf"train/a/9\.png .*{reason}"):
        open_folder(str(tmp_path / "x.zip"), None)


def test_a_zip_bomb_takes_no_more_memory_than_it_declares(bomb: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(declare(bomb, "train/a/9.png", 1000))
    source = open_folder(str(tmp_path / "x.zip"), None).train
    (sample,) = (i for i in range(len(source)) if source.name(i) == "a/9.png")
    tracemalloc.start()
    with pytest.raises(OSError, match="damaged"):
        source.read(sample)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_zip_bomb_as_the_table_of_labels_is_refused_unread(bomb: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    # A new zip, whose table of labels is a bomb. The table would label the images of the flat val/.
    flat = {"train/a/1.png": png(), "val/1.png": png()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in flat.items():
            archive.writestr(name, data)
        with archive.open("labels.csv", "w") as entry:
            for _ in range(100):
                entry.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"data\.val_labels: .*labels\.csv is larger than 64 MiB"):
        open_imagenet(str(path), None, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_an_image_with_a_huge_declared_size_is_not_decoded() -> None:
    raw = bytearray(png())
    raw[16:24] = struct.pack(">II", 10_000, 10_000)  # IHDR: width and height
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    with pytest.raises(BadImage, match="10000x10000 pixels exceed the limit of"):
        decode(bytes(raw), lambda width, height: pytest.fail("the image was decoded"), 8)


def test_no_text_can_act_on_a_terminal() -> None:
    assert printable(EVIL) == printable(EVIL.encode()) == SHOWN
    assert all(printable(chr(code)).isprintable() for code in range(0x11000))
    assert printable("Grüße, 画像, é😀") == "Grüße, 画像, é😀"
    assert printable("a\udce9") == r"a\xe9"
    for kind in (ConfigError, DataError):
        assert str(kind(EVIL)) == str(pickle.loads(pickle.dumps(kind(EVIL)))) == SHOWN


def test_printed_text_does_not_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(shown=True, epochs=1).say(EVIL)
    assert capsys.readouterr().out == SHOWN + "\n"
    messages.say(f"two\nlines\x1b[2J{chr(0x202E)}")
    messages.complain("two\nlines\x9b2J")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("two\nlines\\x1b[2J\\u202e\n", "lars-train: two\nlines\\x9b2J\n")


def cells(line: str) -> list[str]:
    """Return the cells of a Markdown row as GitHub divides it (https://github.github.com/gfm/#tables-extension-)."""
    assert line.startswith("| ")
    assert line.endswith(" |")
    return [cell.strip() for cell in line[1:-1].split("|")]


def test_a_table_stays_valid_for_any_cell_contents() -> None:
    row = (EVIL, "a\\|b", "[x](javascript:1)", "`", "<img src=x>", "&lt;", *map(str, range(len(HEADER) - 6)))
    text = markdown_table(HEADER, [row])
    head, _, line = text.split("\n")
    assert (len(cells(head)), len(cells(line))) == (len(HEADER), len(HEADER))
    assert not set("<>[`") & set(line)
    # The cell shows the text.
    assert [html.unescape(cell) for cell in cells(line)] == [SHOWN, *row[1:]]


def test_tensorboard_gets_plain_text(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.finish({"data.root": f"/data/{EVIL}", EVIL: 1, "path": "/data/\udce9", "list": [EVIL]}, ["val/best_top1"])
    log.close()
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert SHOWN.encode() in written
    assert b"\x1b[31m" not in written


def test_a_damaged_checkpoint_is_reported_in_plain_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "c", 1, content({}), keep=3)
    good = checkpoint.listing(tmp_path / "c")[0]
    path = checkpoint.path_of(tmp_path / "c", 2)
    # The message names the record whose checksum does not match.
    packed(path, {EVIL: b"content"}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"content", b"CONTENT"))
    found = checkpoint.latest(tmp_path / "c")
    assert found is not None
    assert found[0] == good
    printed = capsys.readouterr().err
    assert SHOWN in printed
    assert printed.removesuffix("\n").isprintable()


NAME = "\x1b[31mcat\nlars-train: all is well|<script>"


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """Write images whose class and file names contain terminal commands; one image in each split is broken."""
    root = tmp_path / "images"
    for split in ("train", "val"):
        for name in (NAME, "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                (root / split / name / f"{i}.png").write_bytes(png())
        (root / split / NAME / f"{NAME}.png").write_bytes(b"no png")
    return root


def test_a_run_prints_class_and_file_names_as_plain_text(
    hostile_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = config(tmp_path / "run", data__name="folder", data__root=str(hostile_folder), epochs=3, max_updates=3)
    threads = torch.get_num_threads()
    session.train(prepare(asked), Ranks(), Invocation())
    printed = "".join(capsys.readouterr())
    warned = [line for line in printed.splitlines() if line.startswith("WARNING: image")]
    assert len(warned) == 2
    assert all(printable(NAME) in line for line in warned)
    assert printed.replace("\n", "").isprintable()
    assert not any(line.startswith("lars-train: all is well") for line in printed.split("\n"))
    lines = (tmp_path / "run" / "bad_images.jsonl").read_bytes().splitlines()
    assert len(lines) == 2
    assert all(json.loads(line)["image"].isprintable() for line in lines)
    # The same names in a checkpoint, evaluated on other data.
    with pytest.raises(ConfigError, match="another data set") as caught:
        prepare(
            config(
                tmp_path / "new",
                checkpoint__path=str(tmp_path / "run"),
            )
        )
    assert str(caught.value).isprintable()
    assert printable(NAME) in str(caught.value)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_an_error_prints_class_names_as_plain_text(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"train/{NAME}/1.png": png(), "train/dog/1.png": png(), "val/dog/1.png": png()}
    root = tmp_path / "x.zip"
    if kind == "zip":
        packed(root, files)
    else:
        root = tmp_path / "x"
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["lars-train", "data=folder", f"data.root={root}", "device=cpu"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printable(NAME) in printed
    assert printed.removesuffix("\n").isprintable()


def test_a_path_in_a_zip_is_one_line_of_plain_text(tmp_path: Path) -> None:
    path = packed(tmp_path / "x\x1b.zip", {**GOOD, f"train/a/{NAME}.png": b"x"})
    source = open_folder(path, None).train
    places = [source.location(i) for i in range(len(source))]
    assert all(place.isprintable() for place in places)
    assert sum(printable(NAME) in place for place in places) == 1


def test_a_crash_prints_without_acting_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lars_train import commands

    def crash(*arguments: object) -> None:
        raise RuntimeError(EVIL)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(commands, "run", crash)
    monkeypatch.setattr(sys, "argv", ["lars-train", "data=mini"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.replace("\n", "").isprintable()


def test_a_foreign_record_of_bad_images_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "bad_images.jsonl"
    path.write_bytes(b'{"image": "a.png"}\n\xff\xfe\n[1]\n{"image": []}\n{"image": "b.png"}\n')
    assert listed_images(path) == {"a.png", "b.png"}


def test_the_reason_of_a_bad_image_is_one_line_of_plain_text() -> None:
    class Broken:
        labels = np.zeros(1, np.int32)

        def __len__(self) -> int:
            return 1

        def name(self, sample: int) -> str:
            return "1.png"

        location = name

        def read(self, sample: int) -> bytes:
            raise OSError(EVIL.replace("\r", ""))

    view = View.from_config(config(Path("x")).data)
    spec = EvalSpec(source=Broken(), view=view, micro_batch=1, rank=0, world=1, workers=0, pin_memory=False)
    with closing(eval_loader(spec)) as batches:
        ((bad,),) = (batch.bad for batch in batches)
    assert bad.reason.isprintable()
    assert r"\x1b[31mred" in bad.reason


def test_a_table_of_labels_that_cannot_be_parsed_is_refused(tmp_path: Path) -> None:
    # Longer than the limit of Python's parser for a field.
    table_of_labels = b'1,"' + b"a" * 200_000 + b'"\n'
    path = packed(tmp_path / "x.zip", {"train/a/1.png": png(), "val/1.png": png(), "labels.csv": table_of_labels})
    with pytest.raises(ConfigError, match=r"data\.val_labels: .*labels\.csv is not a table of image and wnid"):
        open_imagenet(path, None, None)


def test_the_results_of_a_run_are_plain_text(tmp_path: Path) -> None:
    directory = tmp_path / NAME
    directory.mkdir()
    final = {"batch": EVIL, "global_batch": 8, "nominal_batch": 9, "raised": True, "updates": 1, "planned_updates": 1}
    final |= {"epochs": EVIL, "best_top1": 1.0, "final_top1": 1.0, "seconds": 1.0}
    final |= dict.fromkeys(("optimizer", "base", "data", "model", "directory"), EVIL)
    (directory / "final.json").write_text(json.dumps(final))
    printed = _describe_results(final, directory)
    assert printed.replace("\n", "").isprintable()
    # Lines too long for the terminal continue in indented lines.
    lines = [line for line in printed.split("\n") if not line.startswith("  ")]
    assert len(lines) == 3 + len(("left out", "scaled", "raised", "updates", "run directory", "TensorBoard"))
    # An unreadable result does not make the finished run fail.
    (directory / "final.json").write_text(EVIL)
    printed = _describe_results(final, directory)
    assert printed.replace("\n", "").isprintable()
    assert "final.json: " in printed
