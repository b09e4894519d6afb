"""scripts/dev/check_wheel.py rejects wheels without an extension, and wheels that fit only one machine."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "dev" / "check_wheel.py"
FILES = (
    "lars_train/__init__.py",
    "lars_train/data/decode/jpeg.abi3.so",
    "lars_train/optim/kernels.abi3.so",
    "lars_train-0.1.0.dist-info/licenses/LICENSES/libjpeg-turbo.txt",
)
BUNDLED = "lars_train.libs/libjpeg-dad87949.so.62.3.0"
LINUX, MANYLINUX = "Tag: cp310-abi3-linux_x86_64\n", "Tag: cp310-abi3-manylinux_2_28_x86_64\n"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_wheel_with_all_parts_passes(script: ModuleType) -> None:
    assert script.problems(FILES, LINUX, repaired=False) == []
    assert script.problems([*FILES, BUNDLED], f"Root-Is-Purelib: false\n{MANYLINUX}", repaired=True) == []


@pytest.mark.parametrize(
    ("missing", "named"),
    [("jpeg.abi3.so", "no libjpeg-turbo 2.1"), ("kernels.abi3.so", "no C compiler"), ("turbo.txt", "license-files")],
)
def test_a_wheel_without_a_part_is_rejected_and_the_part_named(
    missing: str, named: str, script: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "lars_train-0.1.0-cp310-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in FILES:
            if not name.endswith(missing):
                wheel.writestr(name, "")
        wheel.writestr("lars_train-0.1.0.dist-info/WHEEL", LINUX)
    with pytest.raises(SystemExit, match=named) as refused:
        script.check_built(path)
    assert str(refused.value).count("\n- ") == 1


@pytest.mark.parametrize("tag", ["Tag: cp311-cp311-manylinux_2_28_x86_64\n", LINUX, ""])
def test_a_wheel_for_one_python_or_one_machine_is_rejected(tag: str, script: ModuleType) -> None:
    (found,) = script.problems([*FILES, BUNDLED], tag, repaired=True)
    assert "not cp310-abi3-manylinux" in found


def test_a_wheel_without_libjpeg_turbo_is_rejected(script: ModuleType) -> None:
    assert script.problems(FILES, MANYLINUX, repaired=True) == ["the wheel lacks libjpeg-turbo. Run auditwheel repair."]
