from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from lars_train.report import table
from lars_train.report.compare import Row, make_rows
from lars_train.report.read import read_run

MakeRun = Callable[..., Path]
EVIL = "a|b\n<img src=x onerror=alert(1)>[c](javascript:d)`e` https://f.g &amp; \x1b[31m\u202e"


def rows(*directories: Path) -> list[Row]:
    return make_rows([read_run(directory) for directory in directories])


def cells(directory: Path) -> dict[str, str]:
    (row,) = rows(directory)
    return dict(zip(table.HEADER, table.cells(row), strict=True))


def test_a_full_run_makes_the_published_row(make_run: MakeRun) -> None:
    assert cells(make_run("a", top1=(70.0, 72.264, 72.0))) == {
        "batch": "32k",
        "LR policy": "LARS + poly(2)",
        "lr": "29",
        "warm-up epochs": "5",
        "epochs": "90",
        "updates": "12",
        "best top-1 %": "72.26",
        "final top-1 %": "72.00",
        "time": "2 min 0 s",
        "images/s": "3,277",
        "published": "72.26",
        "difference": "+0.00",
        "state": "finished",
        "differs in": "-",
    }


@pytest.mark.parametrize(
    ("batch", "changes", "column", "text"),
    [
        ("32k", {"global_batch": 1280}, "batch", "32k (scaled: 1,280)"),
        ("32k", {"global_batch": 1280}, "published", "scaled"),
        ("32k", {"global_batch": 1280}, "difference", "-"),
        ("256", {"global_batch": 8, "raised": True}, "batch", "256 (scaled: 8, raised)"),
        ("32k", {"batch__size": 96}, "batch", "96"),
        ("32k", {"batch__size": 96}, "published", "-"),
        ("32k", {"top1": (71.0, 70.0)}, "difference", "-1.26"),
        ("32k", {"optimizer__lr": 20.0}, "published", "own settings"),
        ("32k", {"optimizer__lr": 20.0}, "difference", "-"),
        ("32k", {"optimizer__lr": 20.0, "global_batch": 1280}, "published", "scaled"),
        ("32k", {"optimizer__lr": 20.0, "data__name": "folder"}, "published", "-"),
        ("32k", {"optimizer__lr": 20.0, "ended": None}, "published", "-"),
        ("256", {}, "LR policy", "poly(2)"),
        ("32k", {"optimizer__base": "AdamW", "schedule__power": 0.5}, "LR policy", "LARS + AdamW + poly(0.5)"),
        (
            "32k",
            {"schedule__form": "steps", "schedule__steps": [30, 60.0], "schedule__step_factor": 0.1},
            "LR policy",
            "LARS + x0.1 at epochs 30, 60",
        ),
        ("32k", {"schedule__form": "cosine", "schedule__power": None}, "LR policy", "LARS + cosine"),
        ("32k", {"planned": 100}, "updates", "12 of 400"),
        ("32k", {"planned": 100}, "state", "cut short by max_updates"),
        ("32k", {"schedule__warmup_epochs": 0.4444444}, "warm-up epochs", "0.44"),
        ("8k", {}, "lr", "12.8"),
        ("32k", {"starts": 2}, "state", "finished; resumed once"),
        ("32k", {"starts": 4}, "state", "finished; resumed 3 times"),
        ("32k", {"ended": None}, "state", "unfinished at update 12: killed or still running"),
        (
            "32k",
            {"ended": "failed", "reason": "Diverged: loss nan."},
            "state",
            "failed at update 12: Diverged: loss nan",
        ),
        *(
            ("32k", {"ended": "failed", "reason": f"Diverged: diverged at update {update}: loss nan, lr 2."}, *cell)
            for update, *cell in (
                ("6", "state", "failed: diverged at update 6: loss nan, lr 2"),
                ("6", "updates", "6 of 12"),
                ("12", "updates", "12 of 12"),
                ("6", "images/s", "-"),
                # Not beyond the end of the log.
                ("1,234", "updates", "12 of 12"),
            )
        ),
        ("32k", {"ended": None}, "updates", "12 of 12"),
        ("32k", {"optimizer__lr": 1e30}, "lr", "1e+30"),
        ("32k", {"ended": "stopped", "reason": "Stopped: SIGTERM: x"}, "state", "stopped at update 12: SIGTERM"),
        ("32k", {"ended": None}, "final top-1 %", "-"),
        ("32k", {"ended": None}, "best top-1 %", "30.00"),
    ],
)
def test_cells_show_settings_results_and_state(
    batch: str, changes: dict[str, Any], column: str, text: str, make_run: MakeRun
) -> None:
    assert cells(make_run("a", batch, **changes))[column] == text


def test_several_seeds_show_mean_and_deviation(make_run: MakeRun) -> None:
    (row,) = rows(make_run("a", top1=(50.0,)), make_run("b", top1=(53.0,), seed=1, starts=2))
    found = dict(zip(table.HEADER, table.cells(row), strict=True))
    assert found["best top-1 %"] == "51.50 ± 2.12"
    assert found["state"] == "finished, 2 seeds; resumed once"


def test_a_seed_without_a_result_is_left_out_with_a_note(make_run: MakeRun) -> None:
    directories = [make_run(f"seed{seed}", top1=(50.0 + seed,), seed=seed) for seed in range(3)]
    final = directories[0] / "final.json"
    final.write_text(final.read_text().replace('"final_top1": 50.0', '"final_top1": NaN'))
    (row,) = rows(*directories)
    found = dict(zip(table.HEADER, table.cells(row), strict=True))
    assert found["best top-1 %"] == "51.00 ± 1.00"
    assert found["final top-1 %"] == "51.50 ± 0.71 (2 of 3 seeds)"
    notes = table.notes([row])
    assert "Not in the mean of the final top-1, because it is missing: seed0." in notes
    assert "seed0: final.json: no usable final_top1." in notes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (60, "1 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3601, "1 h 0 min"),
        (1e6, "277 h 47 min"),
    ],
)
def test_elapsed_time_is_readable(seconds: float, text: str) -> None:
    assert table.elapsed_time(seconds) == text


def test_the_table_is_aligned_markdown(make_run: MakeRun) -> None:
    text = table.markdown(rows(make_run("a", "8k"), make_run("b", "32k", global_batch=1280))).split("\n\n")[1]
    first, rule, *lines = text.split("\n")
    assert len(lines) == 2
    assert {len(line) for line in (first, rule, *lines)} == {len(first)}
    assert [cell.strip() for cell in first.strip("|").split("|")] == list(table.HEADER)
    assert set(rule) == {"|", "-"}
    assert rule.count("|") == first.count("|") == len(table.HEADER) + 1


def test_a_terminal_gets_no_uninformative_columns(make_run: MakeRun) -> None:
    plain = table.terminal(rows(make_run("a", global_batch=1280)))
    for name in ("published", "difference", "state", "differs in"):
        assert name not in plain.split("\n")[0]
    full = table.terminal(rows(make_run("b", "8k"), make_run("c", ended=None, optimizer__lr=3.0)), width=240)
    assert [c.strip() for c in full.split("\n")[0].strip("|").split("|")] == list(table.HEADER)


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_columns_that_fit_and_names_the_others(make_run: MakeRun, width: int) -> None:
    found = rows(
        make_run("a", "256", global_batch=8),
        make_run("b", "8k", global_batch=1280, optimizer__lr=20.0, optimizer__weight_decay=1e-3),
        make_run("c", "8k", global_batch=1280, optimizer__lr=20.0, optimizer__weight_decay=1e-4),
        make_run("d", ended="failed", reason="Diverged: diverged at update 6: loss nan, lr 2.", global_batch=1280),
    )
    text = table.terminal(found, width)
    assert max(map(len, text.split("\n"))) <= width
    header, _, *lines = [markdown_cells(line) for line in text.split("\n") if line.startswith("|")]
    assert {"batch", "LR policy", "lr", "best top-1 %", "state"} <= set(header)
    assert [line[header.index("state")] for line in lines] == ["finished", "finished", "finished", "failed"]
    unwrapped = " ".join(text.split())
    (left_out,) = re.findall(rf"Columns left out to fit {width} characters: ([^.]*)\.", unwrapped)
    assert {*header, *left_out.split(", ")} == set(table.HEADER) - {"published", "difference"}
    assert "32k (failed): diverged at update 6: loss nan, lr 2" in unwrapped
    for decay in ("0.001", "0.0001"):
        assert re.search(rf"8k \([^)]*\): [^|]*optimizer.weight_decay: {decay}\b", unwrapped)
    # The file has every column.
    assert [c.strip() for c in table.markdown(found).split("\n")[2].strip("|").split("|")] == list(table.HEADER)


def test_notes_explain_the_rows(make_run: MakeRun) -> None:
    assert len(table.notes(rows(make_run("plain")))) == 1
    notes = "\n".join(
        table.notes(
            rows(
                make_run("a", "256", global_batch=8, raised=True, model__name="small", data__name="mini"),
                make_run("b", global_batch=1280, model__name="small", data__name="mini", optimizer__lr=20.0),
                make_run("c", global_batch=1280, model__name="small", data__name="mini"),
                make_run("d", global_batch=1280, model__name="small", data__name="mini", seed=1),
                make_run("e", global_batch=1280, model__name="small", data__name="mini", seed=1),
                make_run("f", global_batch=1280, model__name="small", data__name="mini", seed=2, ended=None),
            )
        )
    )
    for part in (
        "differ in more than batch and recipe row: optimizer.lr.",
        "scaled: measured on mini with small",
        "raised: scaled to the data set, the batch would be below 8,",
        "sample standard deviation over the seeds",
        "Not in the mean, because another run has the same seed: e.",
        "Unfinished runs have separate rows",
    ):
        assert part in notes


def test_own_settings_are_explained_once(make_run: MakeRun) -> None:
    own = {"optimizer__lr": 20.0, "optimizer__weight_decay": 1e-4}
    found = rows(make_run("a", "8k", **own), make_run("b", epochs=30, **own), make_run("c"))
    (note,) = [note for note in table.notes(found) if "own settings" in note]
    keys = ("optimizer.lr", "optimizer.weight_decay", "epochs")
    assert set(note[note.index("(") + 1 : note.index(")")].split(", ")) == set(keys)
    assert not [note for note in table.notes(rows(make_run("d"))) if "own settings" in note]


def test_directories_in_the_csv_can_be_split_again(make_run: MakeRun, tmp_path: Path) -> None:
    names = ["a b", "c;d", "e%3Bf", "g"]
    found = rows(*(make_run(name, seed=seed) for seed, name in enumerate(names)))
    (line,) = csv.DictReader(io.StringIO(table.csv_text(found, tmp_path / "runs")))
    assert [unquote(path) for path in line["directories"].split(";")] == names


def test_different_versions_are_noted(make_run: MakeRun) -> None:
    one, other = make_run("a"), make_run("b", seed=1)
    (other / "run.json").write_text((other / "run.json").read_text().replace('"git": null', '"git": {"commit": "abc"}'))
    notes = "\n".join(table.notes(rows(one, other)))
    assert "different versions: lars-train 0.1.0, torch 2.13.0 / lars-train 0.1.0, torch 2.13.0, commit abc." in notes


def markdown_cells(line: str) -> list[str]:
    """Return the cells of a Markdown row, split as GitHub does (https://github.github.com/gfm/#tables-extension-)."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def test_names_of_runs_cannot_break_the_table(make_run: MakeRun) -> None:
    directory = make_run("a", batch__size=EVIL, optimizer__base=EVIL, optimizer__name=EVIL)
    again = make_run("x" + EVIL.replace("/", ""), seed=1, ended="failed", reason=EVIL, data__name=EVIL, global_batch=8)
    (again / "metrics.jsonl").write_text("{\n")
    found = rows(directory, again)
    for text in (table.markdown(found), table.terminal(found)):
        lines = [line for line in text.split("\n") if line.startswith("|")]
        assert len(lines) == 4
        assert len({len(markdown_cells(line)) for line in lines}) == 1
        assert all(map(str.isprintable, text.split("\n")))
        assert EVIL not in text
    text = table.markdown(found)
    assert not re.search("<|`|://", text)
    assert text.count("[") == 1  # the curves'
    assert "&#60;img src=x onerror=alert(1)&#62;&#91;c](javascript:d)&#96;e&#96;" in text
    assert html.unescape(text).count("<img src=x") >= 4


def test_the_csv_has_plain_numbers(make_run: MakeRun, tmp_path: Path) -> None:
    found = rows(make_run("a", "8k", (73.0, 72.0)), make_run("b", global_batch=1280, seed=7, ended=None))
    one, two = csv.DictReader(io.StringIO(table.csv_text(found, tmp_path)))
    expected = {
        "batch": "8k",
        "nominal_batch": "8192",
        "global_batch": "8192",
        "scaled": "false",
        "lr": "12.8",
        "updates": "8",
        "best_top1_percent": "73",
        "best_top1_deviation": "",
        "seconds": "80",
        "images_per_s": "819.2",
        "published_top1_percent": "73.78",
        "difference_points": "-0.78",
        "directories": "runs/a",
        "state": "finished",
    }
    assert expected.items() <= one.items()
    assert {"scaled": "true", "final_top1_percent": "", "seeds": "7", "state": "unfinished"}.items() <= two.items()


def test_no_cell_of_the_csv_is_a_formula(make_run: MakeRun, tmp_path: Path) -> None:
    evil = '=HYPERLINK("http://x")'
    directory = make_run("a", batch__size=evil, ended="failed", reason="-1+cmd|' /C calc'!A0", recipe__name="@x")
    (row,) = csv.DictReader(io.StringIO(table.csv_text(rows(directory), tmp_path)))
    assert row["batch"] == f"'{evil}"
    assert not [value for value in row.values() if value[:1] in ("=", "+", "-", "@")]
