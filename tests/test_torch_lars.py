"""The distribution torch-lars, built from `lars_train/optim`, works with torch alone, and beside lars-train.

With torch 2.1, the lowest that it supports, 1,121 tests of tests/optim passed under the name torch_lars. Most of the
failed ones use what torch 2.1 lacks, such as Adafactor, fused Adam on the CPU or ``torch.amp.GradScaler``. torch
before 2.6 has no fast path for SGD on the CPU.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import lars_train
from lars_train.optim.options import DEFAULTS, PRESETS

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "packaging" / "torch-lars"
# The tests of tests/optim that run under the new name, in seconds.
FAST = ("test_lars.py", "test_lars_grad_scaler.py", "test_param_groups.py", "test_schedule.py", "test_schedulers.py")


def run(*command: str | Path, folder: Path, path: Path | None = None) -> str:
    """Run Python in `folder` with only `path` and the installed packages on its path. Return what it prints."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    environment["OMP_NUM_THREADS"] = "1"  # on a busy machine a second thread costs more than it brings
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build the source distribution, and from it the wheel, in a copy of the sources. Return both by name."""
    copy = tmp_path_factory.mktemp("sources")
    shutil.copytree(PROJECT, copy / "packaging" / "torch-lars", symlinks=True)
    # As in a checkout where the C kernels were built in place.
    shutil.copytree(ROOT / "lars_train" / "optim", copy / "lars_train" / "optim")
    (copy / "lars_train" / "optim" / "kernels.abi3.so").touch()
    shutil.copy(ROOT / "LICENSE", copy)
    run("-m", "build", "--no-isolation", "packaging/torch-lars", "--outdir", "dist", folder=copy)
    (wheel,), (source,) = (copy / "dist").glob("*.whl"), (copy / "dist").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": source}


@pytest.fixture(scope="module")
def installed(distributions: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Install each distribution into its own empty folder, without dependencies and without the network."""
    folders = {}
    for name, file in distributions.items():
        folders[name] = tmp_path_factory.mktemp(name) / "site"
        options = ("--no-deps", "--no-index", "--no-build-isolation", "--target", folders[name])
        run("-m", "pip", "install", "-q", *options, file, folder=folders[name].parent)
    return folders


@pytest.mark.slow
def test_the_wheel_is_pure_python_and_needs_only_torch(distributions: dict[str, Path]) -> None:
    modules = {f"torch_lars/{path.name}" for path in (ROOT / "lars_train" / "optim").glob("*.py")}
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert distributions["wheel"].name.endswith("-py3-none-any.whl")
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == modules | {"torch_lars/py.typed", "torch_lars/kernels.pyi"}
    assert re.findall(r"^Requires-Dist: (.+)$", text, re.MULTILINE) == ["torch>=2.1"]
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    with tarfile.open(distributions["sdist"]) as source:
        assert not [member.name for member in source if not (member.isfile() or member.isdir())]


@pytest.mark.slow
def test_wheel_and_source_distribution_install_equal_modules(installed: dict[str, Path]) -> None:
    found = [
        {path.name: path.read_bytes() for path in (folder / "torch_lars").iterdir() if path.is_file()}
        for folder in installed.values()
    ]
    assert found[0] == found[1]
    assert {"lars.py", "py.typed"} <= found[0].keys()


@pytest.mark.slow
def test_it_trains_without_lars_train(installed: dict[str, Path], tmp_path: Path) -> None:
    end = "import sys, torch_lars\nprint(torch_lars.__version__, torch_lars.__file__, *sys.modules)\n"
    program = (ROOT / "examples" / "plain_loop.py").read_text() + end
    *lines, last = run("-c", program, folder=tmp_path, path=installed["wheel"]).splitlines()
    assert len(lines) == 4
    assert float(re.findall(r"accuracy ([\d.]+)", lines[-1])[0]) > 0.4
    version, file, *modules = last.split()
    assert version == lars_train.__version__
    assert Path(file).is_relative_to(installed["wheel"])
    assert [name for name in modules if name.startswith("lars_train") or name == "torch_lars.kernels"] == []


@pytest.mark.slow
def test_the_optimizers_tests_pass_under_its_name(installed: dict[str, Path], tmp_path: Path) -> None:
    for name in ("bases.py", *FAST):
        text = (ROOT / "tests" / "optim" / name).read_text()
        (tmp_path / name).write_text(re.sub(r"\blars_train(\.optim)?\b", "torch_lars", text))
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\nmarkers =\n    slow: slow\n    cuda: cuda\n")
    output = run("-m", "pytest", "-q", "--import-mode=importlib", *FAST, folder=tmp_path, path=installed["wheel"])
    assert int(re.findall(r"(\d+) passed", output)[-1]) > 100


def test_both_distributions_work_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PROJECT)
    torch_lars = importlib.import_module("torch_lars")
    assert lars_train.LARS is not torch_lars.LARS
    weights = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    one, other = (
        lars_train.LARS(torch.optim.SGD(weights[:1], lr=0.5)),
        torch_lars.LARS(torch.optim.SGD(weights[1:], lr=0.5)),
    )
    for weight in weights:
        weight.grad = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    one.step()
    other.step()
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(*weights, rtol=1e-15, atol=0)


def test_names_and_versions_are_those_of_lars_train() -> None:
    texts = [(folder / "pyproject.toml").read_text() for folder in (ROOT, PROJECT)]
    versions = {re.findall(r'^version = "(.+)"$', text, re.MULTILINE)[0] for text in texts}
    assert versions == {lars_train.__version__}
    assert (PROJECT / "torch_lars").resolve() == ROOT / "lars_train" / "optim"


def test_the_readme_lists_every_preset_and_option() -> None:
    text = (PROJECT / "README.md").read_text()
    assert [name for name in (*PRESETS, *DEFAULTS) if f"`{name}`" not in text] == []


def test_the_examples_are_short_and_name_their_command() -> None:
    examples = sorted((ROOT / "examples").glob("*.py"))
    assert sum("torch_lars" in path.read_text() for path in examples) == 5
    for path in examples:
        lines = path.read_text().splitlines()
        assert len(lines) <= 40, path.name
        assert lines[2].endswith(f" examples/{path.name}")


@pytest.mark.parametrize("page", [PROJECT / "README.md", ROOT / "docs" / "own_loop.md"], ids=lambda page: page.name)
def test_the_pages_code_trains_with_the_stated_rates(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PROJECT)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    names: dict[str, Any] = {"model": model, "loader": range(3)}
    assert blocks
    for block in blocks:
        exec(block, names)
        rates = []
        for _ in range(31):
            names["optimizer"].zero_grad()
            model(torch.randn(5, 4)).square().sum().backward()
            names["optimizer"].step()
            rates.append([group["lr"] for group in names["optimizer"].param_groups])
            names["scheduler"].step()
        assert rates[30] == pytest.approx({1: [4.8], 2: [1.6, 0.0384]}[len(rates[30])])
