"""scripts/bench/measure_performance.py: what each script finds comes between its markers of the page."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
FOUND = {
    "bench_step": ["| (d) | 1.20 |", "", "- left out: small: (b) timm: why"],
    "bench_startup": ["| a | 1 |"],
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench"))
    return importlib.import_module("measure_performance")


def test_what_a_part_finds_replaces_what_it_found_before(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> int:
        part, page = Path(command[1]).stem, Path(command[-1])
        if part not in FOUND:
            return 2
        assert Path(command[1]).exists()
        page.write_text(script.between_markers(page.read_text(), part, FOUND[part]))
        return 0

    page = tmp_path / "page.md"
    names = ("measure_performance", *script.PARTS)
    before = "- it grew by 1"
    page.write_text("".join(f"<!-- {name}: begin -->\n{before}\n<!-- {name}: end -->\n" for name in names))
    monkeypatch.setattr(script, "run", run)
    arguments = ["--only", *FOUND, "long_haul", "--write", str(page)]
    monkeypatch.setattr(sys, "argv", ["bench/measure_performance.py", *arguments])
    assert script.main() == 1
    text = page.read_text()
    for part, lines in FOUND.items():
        assert script.within(text, part) == lines
    # Those that were not measured now, or failed, stand as they were found before.
    for part in set(script.PARTS) - FOUND.keys():
        assert script.within(text, part) == [before]
    assert before not in script.within(text, "measure_performance")


@pytest.mark.parametrize(
    "part", ["bench_step", "bench_trainer", "profile_step", "bench_reduction", "bench_startup", "long_haul"]
)
def test_each_part_is_a_script_and_has_its_markers_in_the_page(script: ModuleType, part: str) -> None:
    assert part in script.PARTS
    assert list(SCRIPTS.glob(f"*/{part}.py"))
    page = (SCRIPTS.parent / "docs" / "performance.md").read_text()
    script.between_markers(page, part, [])


def test_a_page_without_the_markers_of_a_part_is_refused_before_anything_runs(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    names = ("measure_performance", *script.PARTS[:-1])
    page.write_text("".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in names))
    monkeypatch.setattr(script, "run", lambda *_, **__: pytest.fail("a part was started"))
    monkeypatch.setattr(sys, "argv", ["bench/measure_performance.py", "--write", str(page)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert f"{page}: <!-- {script.PARTS[-1]}: begin -->" in capsys.readouterr().err
