"""The documentation pages are up to date and complete, and their links resolve."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lars_train.config.help import dotted, keys_of, meanings, sections

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.fixture(scope="module")
def pages() -> dict[str, Callable[[], str]]:
    path = ROOT / "scripts" / "dev" / "make_reference_pages.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Callable[[], str]] = module.PAGES
    return found


@pytest.mark.parametrize("name", ["configuration.md", "metrics.md", "recipes.md"])
def test_pages_match_the_keys_fields_and_recipes(pages: dict[str, Callable[[], str]], name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == pages[name](), (
        f"docs/{name} is out of date: run scripts/dev/make_reference_pages.py"
    )


def test_every_key_has_a_meaning() -> None:
    for section, kind in sections().items():
        for field in keys_of(section):
            assert field.name in meanings(kind), dotted(section, field.name)


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and this project's Sphinx settings make it."""
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower().strip()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def text_of(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_existing_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)", text_of(page))
    for path, _, anchor in (link.partition("#") for link in links if not re.match(r"[a-z]+:", link)):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.+)$", text_of(target), re.MULTILINE)), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_repository_files_named_on_a_page_exist(page: Path) -> None:
    named = re.findall(r"`((?:lars_train|tests|scripts|configs|docs)/[\w./*-]+)`", text_of(page))
    assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []


def test_all_pages_build_and_are_linked(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    # A page in no table of contents and a broken link are warnings, which -W turns into errors.
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()


def test_the_citation_has_the_current_version() -> None:
    cited = OmegaConf.load(ROOT / "CITATION.cff")
    assert cited["version"] == version("lars-train")
    assert (cited["cff-version"], cited["title"]) == ("1.2.0", "lars-train")
