"""Every script answers --help at once: its purpose, its duration, and the page with its results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import environment

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sorted(
    path for path in ROOT.glob("scripts/*/**/*.py") if re.search("^if __name__ == .__main__.:$", path.read_text(), re.M)
)
SHELL = sorted([*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/**/*.sbatch")])
# Runs each script given as an argument with --help, in one process. Fails if a script imports torch.
ASK = """
import contextlib, io, json, runpy, sys
found = {}
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    sys.path.insert(0, path.rpartition("/")[0])
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            assert not end.code, path
    assert "torch" not in sys.modules, f"{path} imports torch before it answers"
    found[path] = output.getvalue()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    command = [sys.executable, "-c", ASK, *map(str, PYTHON)]
    # One second for each script, because the machine may be busy.
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=len(PYTHON), check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    for path in SHELL:
        shell = subprocess.run(["bash", str(path), "--help"], capture_output=True, text=True, timeout=10, check=False)
        assert (shell.returncode, shell.stderr) == (0, ""), path
        found[str(path)] = shell.stdout
    return found


@pytest.mark.parametrize("path", [*PYTHON, *SHELL], ids=lambda path: path.name)
def test_help_states_duration_and_page_of_results(path: Path, answers: dict[str, str]) -> None:
    text = answers[str(path)]
    assert str(path.relative_to(ROOT)) in text
    facts = re.search(r"^Takes .*?\. Figures: (none|docs/\S+\.md)", text, re.MULTILINE | re.DOTALL)
    assert facts is not None, text
    if facts[1] != "none":
        assert path.name in (ROOT / facts[1]).read_text()


def test_every_script_path_named_in_the_repository_exists() -> None:
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob(".ci/*"), *ROOT.glob("docs/**/*.md")]
    files += [path for room in ("lars_train", "scripts", "configs") for path in ROOT.rglob(f"{room}/**/*.*")]
    for path in files:
        if path.suffix in {".md", ".toml", ".py", ".sh", ".sbatch", ".c", ".yaml", ""} and path.is_file():
            for name in re.findall(r"(?<![\w./])scripts/[\w./]*\w", path.read_text(errors="replace")):
                assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"
