"""`compile=true` is refused with a reason if torch.compile cannot work on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ALONE, TINY, start

from lars_train.errors import ConfigError
from lars_train.training import resolve


def test_compile_true_without_a_compiler_is_refused(tmp_path: Path) -> None:
    done = start([*ALONE, *TINY, "compile=true"], tmp_path, CXX="no-such-compiler")
    assert done.returncode == 2, done.stderr
    assert "compile=true: torch.compile needs a C++ compiler, which was not found; compile=false gives" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("what", ["compiler", "cache"])
def test_a_failing_compiler_or_cache_is_one_line(what: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    # In a separate process, because torch keeps compiled code and the location of its cache.
    own = {"CXX": "/bin/false"} if what == "compiler" else {}
    cache = tmp_path / "file" / "cache" if what == "cache" else tmp_path / "cache"
    code = (
        "import torch\nfrom lars_train.errors import ConfigError\n"
        "from lars_train.training.resolve import check_compiler\n"
        "try:\n    check_compiler(torch.device('cpu'))\nexcept ConfigError as error:\n    print(error)"
    )
    environment = {**os.environ, **own, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith("compile=true: torch.compile does not work here (")
    assert line.endswith("); compile=false gives the same result up to rounding.")


def test_missing_tool_looks_for_the_compiler_like_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert resolve.missing_tool(cpu) == "a C++ compiler"
    (tmp_path / "g++").touch(0o755)
    assert resolve.missing_tool(cpu) is None
    monkeypatch.setenv("CXX", "icpx")
    assert resolve.missing_tool(cpu) == "a C++ compiler"


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs triton"):
        resolve.check_compiler(torch.device("cuda"))
