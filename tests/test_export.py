"""Exported files load in the programs they are made for: torchvision, safetensors, onnxruntime."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ALONE, DATA, final, metrics, ran
from torch import Tensor, nn
from torchvision.models import resnet18

from lars_train import export as module
from lars_train.config import Config
from lars_train.errors import ConfigError, DataError
from lars_train.export import CARD, MARK, card, export, origin, write_safetensors
from lars_train.models.factory import build_model
from lars_train.models.weights import load_weights
from lars_train.training import checkpoint

SIZE = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run of two epochs, started from the command line."""
    folder = tmp_path_factory.mktemp("run")
    settings = "model=resnet18 data.train_count=128 batch.size=64 optimizer.lr=2 epochs=2 run.name=r".split()
    ran([*ALONE, *DATA, *settings], folder)
    return folder / "runs" / "r"


def exported(run: Path, path: Path) -> tuple[Path, str]:
    config = Config()
    config.checkpoint.path, config.export.path = str(run), str(path)
    return export(config)


def images() -> Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def expected(run: Path) -> Tensor:
    """Return the logits of torchvision's network with the weights of the run's last checkpoint."""
    (last,) = (run / "checkpoints").glob(f"*{final(run)['updates']:09d}.pt")
    model = resnet18(num_classes=4)
    model.load_state_dict(torch.load(last, weights_only=True)["model"])
    with torch.no_grad():
        logits: Tensor = model.eval()(images())
    return logits


def check_origin(about: dict[str, Any], run: Path) -> None:
    last = [line for line in metrics(run) if "val/top1" in line][-1]
    assert (about["top1"], about["top5"]) == (last["val/top1"], last["val/top5"])
    assert about["evaluated"] == 101
    assert (about["update"], about["updates"], about["global_batch"]) == (4, 4, 64)
    assert (about["model"], about["recipe"], about["classes"]) == (
        "resnet18",
        "torchlars",
        [f"class-{i}" for i in range(4)],
    )
    record = json.loads((run / "run.json").read_text())["started"][-1]
    assert (about["command"], about["versions"]) == (record["command"], record["versions"])
    assert record["host"] not in json.dumps(about)
    # With a given batch size, the name of the row does not apply.
    assert about["batch"] == "64"


@pytest.mark.slow
def test_a_pth_file_loads_into_torchvisions_network(run: Path, tmp_path: Path) -> None:
    path, _ = exported(run, tmp_path / "net.pth")
    state = torch.load(path, weights_only=True)
    model = resnet18(num_classes=4)
    model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images()), expected(run), rtol=0, atol=0)
    check_origin(json.loads(state._metadata["lars_train"]), run)


@pytest.mark.slow
def test_a_safetensors_file_holds_the_same_tensors(run: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    path, _ = exported(run, tmp_path / "net.safetensors")
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    with safetensors.safe_open(path, "pt") as file:
        model = resnet18(num_classes=4)
        model.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        check_origin(json.loads(file.metadata()["lars_train"]), run)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images()), expected(run), rtol=0, atol=0)
    output = ran([*ALONE, *DATA, "mode=evaluate", "model=resnet18", f"model.weights={path}"], tmp_path)
    assert f"top-1 {final(run)['final_top1']:.2f} %" in output


def test_a_safetensors_file_may_hold_a_layer_twice(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer = nn.Linear(3, 3)
    network = nn.Sequential(layer, nn.ReLU(), layer)
    write_safetensors(tmp_path / "net.safetensors", network, {})
    loaded = safetensors.load_file(tmp_path / "net.safetensors")
    assert loaded.keys() == network.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_an_export_loads_bit_for_bit_in_any_class_order(name: str, run: Path, tmp_path: Path) -> None:
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    path, _ = exported(run, tmp_path / name)
    classes = [f"class-{i}" for i in range(4)]
    for order in (classes, classes[::-1]):
        model = build_model("resnet18", num_classes=4, ghost_batch=1, zero_gamma=False)
        load_weights(model, path, name="resnet18", classes=order)
        with torch.no_grad():
            found = model.eval()(images())
        columns = [classes.index(label) for label in order]
        torch.testing.assert_close(found, expected(run)[:, columns], rtol=0, atol=0)


@pytest.fixture(scope="module")
def trace() -> Callable[..., Any]:
    """Return `torch.onnx.export`, which traces the run's network once for all tests."""
    graphs: list[Any] = []
    export = torch.onnx.export

    def once(*arguments: Any, **options: Any) -> Any:
        if not graphs:
            graphs.append(export(*arguments, **options))
        return graphs[0]

    return once


@pytest.mark.slow
def test_onnx_graph_gives_the_networks_logits(
    run: Path, tmp_path: Path, trace: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    monkeypatch.setattr(torch.onnx, "export", trace)
    path, output = exported(run, tmp_path / "net.onnx")
    assert "onnxruntime's logits match the network's" in output
    session = runtime.InferenceSession(str(path))
    found = torch.cat([torch.from_numpy(session.run(None, {"images": part.numpy()})[0]) for part in images().split(2)])
    torch.testing.assert_close(found, expected(run), rtol=1e-4, atol=1e-4)
    (prop,) = [p for p in onnx.load(path).metadata_props if p.key == "lars_train"]
    check_origin(json.loads(prop.value), run)
    assert {p.name for p in tmp_path.iterdir()} == {"net.onnx", CARD}


@pytest.mark.slow
def test_an_onnx_graph_with_other_logits_is_not_kept(
    run: Path, tmp_path: Path, trace: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch.onnx, "export", trace)
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    with pytest.raises(DataError, match=r"logits differ from the network's by"):
        exported(run, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_card_describes_the_file_and_its_code_runs(run: Path, tmp_path: Path) -> None:
    for name in ("net.pth", "net.safetensors"):
        path, _ = exported(run, tmp_path / name)
        text = path.with_name(CARD).read_text().partition(MARK)[2].partition(MARK)[0]
        assert text.startswith(f"\n\n# {name}\n")
        assert f"{final(run)['final_top1']:.2f} % of 101 validation images" in text
        assert "LARS over SGD, peak lr 2.0" in text
        model = run_code_of_card(text, path)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(images()), expected(run), rtol=0, atol=0)


def run_code_of_card(text: str, path: Path) -> nn.Module:
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(compile(ast.parse(code.replace(repr(path.name), repr(str(path)))), path.name, "exec"), scope)
    model = scope["model"]
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.slow
def test_the_cards_code_runs_for_a_network_not_in_torchvision(run: Path, tmp_path: Path) -> None:
    about = {**origin(*checkpoint.find(str(run))), "model": "small"}
    network = build_model("small", num_classes=len(about["classes"]), ghost_batch=1, zero_gamma=False)
    for name in ("net.pth", "net.safetensors"):
        module.WRITERS[Path(name).suffix](tmp_path / name, network, about)
        model = run_code_of_card(card(name, about, torchvision=False), tmp_path / name)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, network.state_dict()[key], rtol=0, atol=0)


@pytest.mark.slow
def test_files_in_one_folder_share_their_card(run: Path, tmp_path: Path) -> None:
    def described() -> list[str]:
        return re.findall(r"^# (.+)$", (tmp_path / CARD).read_text(), re.MULTILINE)

    for name in ("a.pth", "b.pth", "a.pth"):
        exported(run, tmp_path / name)
    assert described() == ["a.pth", "b.pth"]
    (tmp_path / "a.pth").unlink()
    exported(run, tmp_path / "c.safetensors")
    assert described() == ["c.safetensors", "b.pth"]


@pytest.mark.slow
def test_an_export_that_cannot_be_written_leaves_no_files(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"suffix selects the format. Use one of .*\.onnx"):
        exported(run, tmp_path / "net.tflite")
    monkeypatch.setattr(module.importlib, "import_module", absent)
    for suffix in ("safetensors", "onnx"):
        with pytest.raises(ConfigError, match=rf"\.{suffix} requires the package .*pip install '\.\[export\]"):
            exported(run, tmp_path / f"net.{suffix}")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / CARD).write_text("# My own model\n")
    with pytest.raises(ConfigError, match=r"MODEL\.md, which lars-train did not write"):
        exported(run, tmp_path / "net.pth")
    assert (tmp_path / CARD).read_text() == "# My own model\n"


def absent(name: str) -> None:
    raise ImportError(name)
