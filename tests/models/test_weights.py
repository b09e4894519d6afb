"""Weights from files of this and other programs load by name, completely or not at all."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lars_train.errors import ConfigError
from lars_train.models.factory import build_model
from lars_train.models.weights import load_weights

State = dict[str, Tensor]


def build(name: str, num_classes: int = 10, zero_gamma: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, num_classes=num_classes, ghost_batch=4, zero_gamma=zero_gamma)


def other(seed: int = 1, num_classes: int = 10) -> State:
    """Return the state of a network other than those that `build` returns."""
    torch.manual_seed(seed)
    state: State = build_model("small", num_classes=num_classes, ghost_batch=4, zero_gamma=False).state_dict()
    return state


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def assert_loads(content: object, path: Path, expected: State) -> tuple[str, ...]:
    torch.save(content, path)
    model = build("small")
    notes = load_weights(model, path)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    return notes


def test_saved_weights_load(tmp_path: Path) -> None:
    source, model = build("small"), build("small", zero_gamma=True)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in source.state_dict().items())


def test_old_files_without_batch_counters_load(tmp_path: Path) -> None:
    state = {k: v for k, v in build("small").state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "w.pt")
    load_weights(build("small"), str(tmp_path / "w.pt"))


def test_weights_that_do_not_fit_are_refused_and_not_loaded(tmp_path: Path) -> None:
    state = build("small").state_dict()
    state["fc.weight"] = torch.zeros(3, 64)
    state["extra"] = state.pop("conv1.weight")
    torch.save(state, tmp_path / "w.pt")
    model = build("small", zero_gamma=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        load_weights(model, tmp_path / "w.pt")
    message = str(caught.value)
    for part in (
        "model.weights=",
        "w.pt",
        "1 missing: conv1.weight",
        "1 not in the model: extra",
        "fc.weight (3, 64) instead of (10, 64)",
    ):
        assert part in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    model = build_model("tiny", num_classes=4, ghost_batch=2, zero_gamma=False)
    state = model.state_dict()
    state["fc.weight"][1, 2] = value
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(ConfigError, match=r"1 tensor with non-finite values: fc\.weight\."):
        load_weights(model, tmp_path / "net.pth")


def test_files_without_a_state_dict_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    with pytest.raises(ConfigError, match="No such file"):
        load_weights(build("small"), path)
    for content in (b"hello", bytes(range(256)), b"PK\x03\x04" + b"\0" * 40, b"}h\x80\xff."):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="the file is damaged, or neither"):
            load_weights(build("small"), path)
    for thing in ([torch.ones(2)], {"lr": 3.5}, {}):
        torch.save(thing, path)
        with pytest.raises(ConfigError, match="holds no state dict"):
            load_weights(build("small"), path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><html><body>Not found</body></html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_files_that_are_not_weights_are_identified(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_weights(build("small"), tmp_path / "w.pth")
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"it is a folder.*best\.pt.*checkpoint\.path"):
        load_weights(build("small"), tmp_path / "run")


WRAPPED: dict[str, Callable[[State], Any]] = {
    "examples": lambda s: {"epoch": 3, "arch": "resnet50d", "state_dict": prefixed(s, "module."), "best_acc1": 7.5},
    "torchvision": lambda s: {"model": s, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}, "epoch": 1},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": torch.ones(())},
    "ema alone": lambda s: {"state_dict_ema": s},
    "nested": lambda s: {"checkpoint": {"model": s}},
    "compiled, then DDP": lambda s: prefixed(s, "module._orig_mod."),
    "DDP, then compiled": lambda s: {"model": prefixed(s, "_orig_mod.module.")},
    "layers compiled": lambda s: {key.replace("layer1.", "layer1._orig_mod."): value for key, value in s.items()},
    "lightning": lambda s: {"state_dict": prefixed(s, "model."), "hyper_parameters": {"lr": 1.0}, "loops": {}},
    "half": lambda s: {key: value.half() if value.is_floating_point() else value for key, value in s.items()},
}


@pytest.mark.parametrize("form", sorted(WRAPPED))
def test_checkpoints_of_other_programs_load(form: str, tmp_path: Path) -> None:
    state = other()
    if form == "half":
        state = {key: value.half().float() if value.is_floating_point() else value for key, value in state.items()}
    assert assert_loads(WRAPPED[form](state), tmp_path / "w.pth", state) == ()


def test_the_plain_network_is_preferred_to_the_averaged(tmp_path: Path) -> None:
    state, average = other(), other(seed=2)
    both = {"state_dict_ema": average, "state_dict": state}
    (note,) = assert_loads(both, tmp_path / "w.pth", state)
    assert "holds state_dict_ema, state_dict; state_dict is used" in note
    averaged = {"n_averaged": torch.tensor(3), **prefixed(average, "module.")}
    (note,) = assert_loads({"model": state, "model_ema": averaged}, tmp_path / "w.pth", state)
    assert "holds model, model_ema.module; model is used" in note
    (note,) = assert_loads(averaged, tmp_path / "w.pth", average)
    assert "not used: 1 tensor whose names do not begin with 'module.': n_averaged" in note
    torch.save({"state_dict": {**prefixed(state, "student."), **prefixed(average, "teacher.")}}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"more than one network \(state_dict\.student, state_dict\.teacher\)"):
        load_weights(build("small"), tmp_path / "w.pth")


@pytest.mark.parametrize("value", [argparse.Namespace(lr=1), np.float64(76.1), nn.Linear(1, 1)])
def test_objects_other_than_tensors_are_refused_with_the_remedy(value: object, tmp_path: Path) -> None:
    torch.save({"state_dict": other(), "value": value}, tmp_path / "w.pth")
    with pytest.raises(
        ConfigError, match=r"the file holds [\w.]+(Namespace|scalar|Linear)\. .*weights_only=False.*torch\.save"
    ):
        load_weights(build("small"), tmp_path / "w.pth")


def test_weights_of_another_model_are_refused_with_its_name(tmp_path: Path) -> None:
    torch.save(prefixed(build("resnet20").state_dict(), "module."), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"not in the model: layer1\.1\.conv1\.weight, .*It fits model=resnet20\."):
        load_weights(build("small"), tmp_path / "w.pth")
    # The shapes fit: tiny differs from small only in a stride.
    torch.save({"arch": "tiny", "state_dict": other()}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="the weights are for model tiny, not small; choose model=tiny"):
        load_weights(build("small"), tmp_path / "w.pth", name="small")
    torch.save({key: value.to(torch.int8) for key, value in other().items()}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"of a different kind: conv1\.weight torch\.int8"):
        load_weights(build("small"), tmp_path / "w.pth")


def test_another_number_of_classes_needs_a_new_head(tmp_path: Path) -> None:
    state = other(num_classes=1000)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        ConfigError, match=r"a last layer of 1,000 outputs, but the data set has 10 .*model\.new_head=true"
    ):
        load_weights(build("small"), tmp_path / "w.pth")
    headless = {key: value for key, value in state.items() if not key.startswith("fc.")}
    torch.save(headless, tmp_path / "headless.pth")
    with pytest.raises(ConfigError, match=r"the network has no last layer, .*model\.new_head=true"):
        load_weights(build("small"), tmp_path / "headless.pth")
    for file in ("w.pth", "headless.pth"):
        model, fresh = build("small"), build("small").state_dict()
        (note,) = load_weights(model, tmp_path / file, new_head=True)
        assert "all layers but the last" in note
        for key, value in model.state_dict().items():
            assert torch.equal(value, fresh[key] if key.startswith("fc.") else state[key]), key
    torch.save({**headless, "extra": torch.ones(1)}, tmp_path / "short.pth")
    with pytest.raises(ConfigError, match="1 not in the model: extra"):
        load_weights(build("small"), tmp_path / "short.pth", new_head=True)


def named(state: State, classes: object, **more: object) -> Any:
    """Return `state` with the names of its classes, as mode=export writes them."""
    made: Any = build("small").state_dict()
    made.update(state)
    made._metadata["lars_train"] = json.dumps({"classes": classes, **more})
    return made


NAMES = [str(number) for number in range(10)]
ORDER = ["7", "0", "1", "2", "9", "3", "8", "4", "5", "6"]


@pytest.mark.parametrize("form", ["pth", "wrapped", "safetensors", "checkpoint"])
def test_classes_in_another_order_are_matched_by_name(form: str, tmp_path: Path) -> None:
    state, path = other(), tmp_path / "w.pth"
    if form == "safetensors":
        path = tmp_path / "w.safetensors"
        about = {"lars_train": json.dumps({"classes": NAMES, "image_size": 8})}
        pytest.importorskip("safetensors.torch").save_file(state, path, metadata=about)
    elif form == "checkpoint":
        torch.save({"format": 1, "model": state, "classes": NAMES, "config": {"model": {"name": "small"}}}, path)
    else:
        torch.save({"state_dict": named(state, NAMES)} if form == "wrapped" else named(state, NAMES), path)
    model = build("small")
    (note,) = load_weights(model, path, name="small", classes=ORDER)
    assert "by name" in note
    for row, label in enumerate(ORDER):
        assert torch.equal(model.state_dict()["fc.weight"][row], state["fc.weight"][int(label)])
        assert torch.equal(model.state_dict()["fc.bias"][row], state["fc.bias"][int(label)])
    images = torch.randn(4, 3, 16, 16)
    plain = build("small")
    assert load_weights(plain, path, name="small", classes=NAMES) == ()
    with torch.no_grad():
        found, expected = model.eval()(images), plain.eval()(images)
    torch.testing.assert_close(found, expected[:, [int(label) for label in ORDER]])


def test_other_classes_are_refused_unless_the_head_is_new(tmp_path: Path) -> None:
    state, path, model = other(), tmp_path / "w.pth", build("small")
    torch.save(named(state, [f"n{number:02}" for number in range(10)]), path)
    message = (
        r"the file's 10 classes are not the data set's 10 \(only in the file: n00, n01, n02, \.\.\.; only in the data"
    )
    with pytest.raises(ConfigError, match=message):
        load_weights(model, path, classes=NAMES)
    load_weights(model, path, classes=NAMES, new_head=True)
    assert torch.equal(model.state_dict()["conv1.weight"], state["conv1.weight"])


@pytest.mark.parametrize(
    ("classes", "why"),
    [
        (NAMES[:9], "9 names for 10 outputs"),
        (["0"] * 10, "a name occurs twice"),
        ([*NAMES[:9], 9], "it is not a list of the names of class 0, 1, ..."),
        ("0123456789", "it is not a list of the names of class 0, 1, ..."),
        ({name: int(name) + 1 for name in NAMES}, "it is not a list of the names of class 0, 1, ..."),
        (None, ""),
    ],
)
@pytest.mark.parametrize("form", ["export", "beside"])
def test_invalid_class_names_are_reported_and_not_used(form: str, classes: object, why: str, tmp_path: Path) -> None:
    state, path, model = other(), tmp_path / "w.pth", build("small")
    torch.save(named(state, classes, model=7) if form == "export" else {"model": state, "classes": classes}, path)
    notes = load_weights(model, path, name="small", classes=[f"n{number}" for number in range(10)])
    assert torch.equal(model.state_dict()["fc.weight"], state["fc.weight"])
    messages = [note.partition("w.pth: ")[2] for note in notes]
    assert messages == ([f"the entry classes is not used: {why}."] if why else [])


# The names of output 0, 1, ... in files of other programs.
WITH_CLASSES: dict[str, Callable[[State, list[str]], Any]] = {
    "torchvision": lambda s, names: {"model": s, "epoch": 1, "class_to_idx": {c: i for i, c in enumerate(names)}},
    "timm": lambda s, names: {"arch": "resnet", "state_dict": s, "class_names": tuple(names)},
    "lightning": lambda s, names: {
        "state_dict": prefixed(s, "model."),
        "hyper_parameters": {"idx_to_class": dict(enumerate(names))},
    },
    "JSON's keys": lambda s, names: {"net": {"weights": s}, "idx_to_class": {str(i): c for i, c in enumerate(names)}},
    "among the tensors": lambda s, names: {**s, "classes": names},
    "YOLO": lambda s, names: {"model": s, "names": dict(enumerate(names))},
    "YOLO's list": lambda s, names: {"model": s, "names": names},
    "Hugging Face": lambda s, names: {"model": s, "config": {"id2label": dict(enumerate(names))}},
    "a setting of that name": lambda s, names: {"model": s, "config": {"classes": 10}, "class_names": names},
    "label map": lambda s, names: {"model": s, "label_map": {c: i for i, c in enumerate(names)}},
    "OpenMMLab": lambda s, names: {"meta": {"epoch": 1, "CLASSES": tuple(names)}, "state_dict": s},
    "OpenMMLab's later": lambda s, names: {"meta": {"dataset_meta": {"classes": names}}, "state_dict": s},
    "nested": lambda s, names: {"meta": {"dataset": {"class_to_idx": {c: i for i, c in enumerate(names)}}}, "net": s},
}


@pytest.mark.parametrize("form", sorted(WITH_CLASSES))
def test_class_names_of_other_programs_are_matched_by_name(form: str, tmp_path: Path) -> None:
    state, path, model = other(), tmp_path / "w.pth", build("small")
    torch.save(WITH_CLASSES[form](state, ORDER), path)
    (note,) = load_weights(model, path, classes=NAMES)
    assert "by name" in note
    for row, label in enumerate(ORDER):
        assert torch.equal(model.state_dict()["fc.weight"][int(label)], state["fc.weight"][row])
    assert load_weights(build("small"), path, classes=ORDER) == ()
    torch.save(WITH_CLASSES[form](state, [f"n{name}" for name in NAMES]), path)
    with pytest.raises(
        ConfigError, match=r"the file's 10 classes are not the data set's 10 .*save the network without class names"
    ):
        load_weights(model, path, classes=NAMES)


def test_conflicting_class_names_are_reported(tmp_path: Path) -> None:
    state, path = other(), tmp_path / "w.pth"
    lists = {
        "classes": NAMES,
        "class_to_idx": {c: i for i, c in enumerate(ORDER)},
        "idx_to_class": dict(enumerate(ORDER)),
    }
    torch.save({"state_dict": state, **lists}, path)
    (note,) = load_weights(build("small"), path, classes=ORDER)
    assert note.endswith("w.pth: the entry classes is not used: it differs from class_to_idx.")


def test_tensors_with_clashing_names_are_refused_unless_equal(tmp_path: Path) -> None:
    state, path = other(), tmp_path / "w.pth"
    both = {**prefixed(state, "module."), **prefixed(state, "module._orig_mod.")}
    assert assert_loads({"state_dict": both}, path, state) == ()
    both["module.conv1.weight"] = state["conv1.weight"] + 1
    both["_orig_mod.module.fc.bias"] = state["fc.bias"].double()
    torch.save({"state_dict": both}, path)
    message = (
        r"2 tensors .* module\.conv1\.weight and module\._orig_mod\.conv1\.weight, .*fc\.bias.*save only the network"
    )
    with pytest.raises(ConfigError, match=message):
        load_weights(build("small"), path)


def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"conv1.weight": Hostile()}, tmp_path / "w.pt")
    with pytest.raises(ConfigError):
        load_weights(build("small"), tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()
