"""The examples of `train` run: the scripts, and the code of the notebook."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from tiny import metrics, ran

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_dataset", "own_model"])
def test_a_script_trains_in_seconds(name: str, tmp_path: Path) -> None:
    out = ran([sys.executable, "-c", (EXAMPLES / f"{name}.py").read_text()], tmp_path)
    top1 = [float(value) for value in re.findall(r"(?:top-1|again) ([\d.]+) %", out.splitlines()[-1])]
    assert top1
    assert min(top1) == max(top1) > 50


@pytest.mark.slow
def test_the_code_of_the_notebook_trains_and_resumes(tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    assert [cell["outputs"] for cell in cells if cell["cell_type"] == "code"] == [[]] * 6
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    ran([sys.executable, "-c", f"{code}\nassert result['final_top1'] > 70"], tmp_path, MPLBACKEND="agg")
    updates = [line["update"] for line in metrics(tmp_path / "runs" / "notebook")]
    assert max(updates) == 32
    starts = json.loads((tmp_path / "runs" / "notebook" / "run.json").read_text())["started"]
    assert [start["ended"]["update"] for start in starts] == [20, 32]
