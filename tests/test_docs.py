"""The pages: up to date, whole, and with links that lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    path = ROOT / "scripts" / "make_config_reference.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_what_the_schema_says(reference: ModuleType) -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference.page(), "run scripts/make_config_reference.py"


def test_every_key_has_a_meaning(reference: ModuleType) -> None:
    assert reference.untold() == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_all_pages_are_built_and_can_be_reached(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    # A page in no table of contents and a link or anchor that is not there are warnings, and -W makes errors of them.
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()


def test_the_citation_is_of_this_version() -> None:
    cited = OmegaConf.load(ROOT / "CITATION.cff")
    assert cited["version"] == version("lars-train")
    assert (cited["cff-version"], cited["title"]) == ("1.2.0", "lars-train")
