"""The public names of ``import lars_train``, and what the import loads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import lars_train
from lars_train import optim


def test_importing_the_package_imports_neither_torch_nor_hydra() -> None:
    code = "import sys, lars_train; print(sorted({'torch', 'torchvision', 'numpy', 'hydra'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lars_and_the_schedule_are_imported_from_the_package() -> None:
    from lars_train import LARS, learning_rate

    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = LARS(torch.optim.SGD([weight], lr=1.0), eps=0.0, trust_coef=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    weight.grad = torch.tensor([0.0, 2.0])
    optimizer.step()
    # ratio = 0.1 * 5 / 2, so the step is as long as a tenth of the weight's norm.
    assert weight.tolist() == pytest.approx([3.0, 3.5])
    assert learning_rate(0, total=10, warmup=2, base=4.0, power=2.0, form="whole") == 2.0


def test_all_public_names_exist_and_an_unknown_one_raises() -> None:
    assert set(lars_train.__all__) == {
        *("LARS", "WarmupCosine", "WarmupPoly", "WarmupSteps", "__version__"),
        *("learning_rate", "parameter_groups", "scaled_lr", "split_parameters"),
        *("evaluate", "plan", "train", "ConfigError", "DataError", "Diverged", "Stopped"),
    }
    for name in optim.__all__:
        assert getattr(lars_train, name) is getattr(optim, name) is not None
    for name in set(lars_train.__all__) - set(optim.__all__):
        assert getattr(lars_train, name).__name__ == name
    missing = "SARL"
    with pytest.raises(AttributeError, match="no attribute 'SARL'"):
        getattr(lars_train, missing)


def test_the_version_is_that_of_the_distribution() -> None:
    assert lars_train.__version__ == version("lars-train")


def test_the_readmes_lars_example_runs_unchanged() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    block = readme.split("```python\n")[1].split("```")[0]
    assert len([line for line in block.splitlines() if line]) == 6
    names: dict[str, Any] = {}
    exec(block, names)
    names["model"](torch.zeros(2, 3, 32, 32)).sum().backward()
    before = names["model"].fc.weight.detach().clone()
    names["optimizer"].step()
    names["scheduler"].step()
    assert not torch.equal(before, names["model"].fc.weight)
    assert names["optimizer"].param_groups[0]["lr"] == pytest.approx(29.0 * 2 / 195)


def test_the_training_loop_of_the_api_page_trains() -> None:
    page = (Path(__file__).parents[1] / "docs" / "python_api.md").read_text()
    block = page.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(block, names)
    assert names["optimizer"].param_groups[1]["lr"] == pytest.approx(0.01**2)
    assert names["loss"] < 2.0 < torch.log(torch.tensor(10.0))


def test_the_optim_folder_works_in_another_package(tmp_path: Path) -> None:
    package, copy = Path(lars_train.__file__).parent, tmp_path / "another"
    shutil.copytree(package / "optim", copy / "optim", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(package / "extensions.py", copy)
    code = (
        "import sys, torch; from another.optim.lars import LARS\n"
        "weight = torch.nn.Parameter(torch.ones(2)); weight.grad = torch.ones(2)\n"
        "LARS.preset('mlperf', torch.optim.SGD([weight], lr=1.0)).step()\n"
        "print([name for name in sys.modules if name.startswith('lars_train')], 0.99 < weight[0].item() < 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"
