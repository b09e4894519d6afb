"""A checkout without compiled extensions uses those of the installed package if their sources are equal."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import environment

import lars_train
from lars_train.data.decode import native
from lars_train.optim import fused_sgd

ASK = (
    "import lars_train; from lars_train.data.decode import native; from lars_train.extensions import load_extension;"
    "print(lars_train.__file__); print(native.is_available());"
    "print(load_extension('lars_train.optim.kernels') is not None)"
)


def import_in_checkout(checkout: Path, installed: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=checkout,
        env={**environment(), "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_a_checkout_uses_installed_extensions_of_equal_source(
    tmp_path: Path,
) -> None:
    if not native.is_available() or fused_sgd.kernels is None:
        pytest.skip("the C extensions are not built")
    package, checkout, installed = Path(lars_train.__file__).parent, tmp_path / "checkout", tmp_path / "installed"
    kept = shutil.ignore_patterns("__pycache__", "embedded")
    shutil.copytree(package, installed / "lars_train", ignore=kept)
    shutil.copytree(package, checkout / "lars_train", ignore=shutil.ignore_patterns("__pycache__", "embedded", "*.so"))
    where, decoder, kernels = import_in_checkout(checkout, installed)
    assert Path(where).is_relative_to(checkout)
    assert (decoder, kernels) == ("True", "True")
    for source, expected in (("data/decode/jpeg.c", ["False", "True"]), ("optim/kernels.c", ["False", "False"])):
        with (checkout / "lars_train" / source).open("a") as file:
            file.write("/* Another one. */\n")
        assert import_in_checkout(checkout, installed)[1:] == expected
