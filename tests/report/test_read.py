from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lars_train.errors import ConfigError
from lars_train.report import files, read
from lars_train.report.read import find_runs, read_ratios, read_run

MakeRun = Callable[..., Path]


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_finished_run_is_read_completely(make_run: MakeRun) -> None:
    run = read_run(make_run("a", "8k", (10.0, 30.0, 20.0), seed=3))
    assert (run.state, run.batch, run.nominal_batch, run.setting("seed")) == ("finished", "8k", 8192, "3")
    assert (run.best_top1, run.final_top1) == (30.0, 20.0)
    assert (run.updates, run.planned_updates, run.seconds) == (12, 12, 120.0)
    assert run.images_per_s == 12 * 8192 / 120.0
    assert [(p.update, p.epoch, p.seconds, p.value) for p in run.top1] == [
        (4, 1.0, 40.0, 10.0),
        (8, 2.0, 80.0, 30.0),
        (12, 3.0, 120.0, 20.0),
    ]
    assert [(p.update, p.value) for p in run.loss] == [(u, 2.0 / u) for u in range(1, 13)]
    assert not run.problems
    assert not run.scaled


@pytest.mark.parametrize(
    ("arguments", "state", "reason"),
    [
        ({"planned": 5}, "cut short", "by max_updates"),
        ({"ended": None}, "unfinished", "killed or still running"),
        ({"ended": "stopped", "reason": "Stopped: SIGTERM: stopped after update 12"}, "stopped", "SIGTERM"),
        ({"ended": "failed", "reason": "Diverged: loss nan"}, "failed", "Diverged: loss nan"),
        # Cut short by max_updates, resumed, and killed before its next line, or failed later.
        ({"ended": None, "planned": 5, "starts": 2, "done": True}, "unfinished", "killed or still running"),
        ({"ended": "failed", "planned": 5, "done": True, "reason": "x"}, "failed", "x"),
        # Killed after writing the result, before recording the end.
        ({"ended": None, "done": True}, "finished", ""),
    ],
)
def test_state_and_reason_come_from_the_record(
    arguments: dict[str, Any], state: str, reason: str, make_run: MakeRun
) -> None:
    run = read_run(make_run("a", **arguments))
    assert (run.state, run.reason, run.updates) == (state, reason, 12)
    assert run.best_top1 == 30.0
    assert run.final_top1 == (20.0 if state in ("finished", "cut short") else None)


@pytest.mark.parametrize("start", [{"resumed_at": 12}, {}], ids=["resumed", "not resumed yet"])
def test_a_result_older_than_the_log_is_ignored(start: dict[str, int], make_run: MakeRun) -> None:
    directory = make_run("a", planned=5)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"update": 16, "epoch": 4.0, "run/seconds": 170.0, "val/top1": 55.0}\n')
    change(directory / "run.json", started=[{"ended": {"how": "finished"}}, start])
    run = read_run(directory)
    assert (run.state, run.updates, run.best_top1, run.final_top1) == ("unfinished", 16, 55.0, None)
    assert (run.seconds, run.resumes) == (170.0, 1)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (None, "missing; the curves omit this run"),
        (0, "no usable line; the curves omit this run"),
        (1, "ends at update 1 of 12, as do the curves"),
        (12, "ends at update 10 of 12, as do the curves"),
        (14, "the top-1 of the last update, 12, is missing"),
    ],
)
def test_an_incomplete_log_of_a_finished_run_is_a_problem(lines: int | None, problem: str, make_run: MakeRun) -> None:
    directory = make_run("a")
    log = directory / "metrics.jsonl"
    if lines is None:
        log.unlink()
    else:
        whole = log.read_bytes().splitlines(keepends=True)
        assert len(whole) == 15
        # The line after the cut is incomplete, as on a full disk.
        log.write_bytes(b"".join(whole[:lines]) + whole[lines][:20])
    run = read_run(directory)
    assert (run.state, run.final_top1) == ("finished", 20.0)
    assert run.problems == (f"metrics.jsonl: {problem}",)


@pytest.mark.parametrize("value", [None, float("nan"), "70"])
def test_a_result_without_top1_is_a_problem(value: Any, make_run: MakeRun) -> None:
    directory = make_run("a")
    change(directory / "final.json", final_top1=value)
    run = read_run(directory)
    assert (run.state, run.best_top1, run.final_top1) == ("finished", 30.0, None)
    assert run.problems == ("final.json: no usable final_top1",)


def test_a_finished_run_without_result_is_not_called_running(make_run: MakeRun) -> None:
    run = read_run(make_run("a", done=False))
    assert (run.state, run.reason) == ("unfinished", "finished, but final.json is missing or damaged")


def test_starts_that_resumed_a_checkpoint_are_counted(make_run: MakeRun) -> None:
    assert [read_run(make_run(str(n), starts=n)).resumes for n in (1, 2, 4)] == [0, 1, 3]
    again = make_run("from nothing", starts=2)
    change(again / "run.json", started=[{"resumed_at": 0}, {"resumed_at": 0}])
    assert read_run(again).resumes == 0


def test_time_never_decreases_in_a_resumed_log(make_run: MakeRun) -> None:
    directory = make_run("a", top1=(1.0,))
    seconds = [10.0, 25.0, 20.0, 30.0]
    lines = [{"update": u, "epoch": u / 4, "run/seconds": s, "train/loss": 1.0} for u, s in enumerate(seconds, 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [p.seconds for p in read_run(directory).loss] == [10.0, 25.0, 25.0, 30.0]


def test_damaged_lines_are_skipped_and_counted(make_run: MakeRun) -> None:
    directory = make_run("a", top1=(10.0, 20.0))
    expected = read_run(directory)
    whole = (directory / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    odd = [b"\x00\xff\n", b"\x00" * 4096 + b"\n", b"{\n", b"17\n", b"null\n", b"\n"]
    usable = [
        b'{"update": NaN, "epoch": 1, "val/top1": 99}\n',
        b'{"update": 8, "epoch": null, "val/top1": 99}\n',
        b'{"update": 3, "epoch": 1, "val/top1": null, "train/loss": Infinity, "run/seconds": NaN}\n',
    ]
    torn = b'{"update": 9, "epoch": 2.25, "val/to'
    (directory / "metrics.jsonl").write_bytes(b"".join([*odd, *whole[:3], *usable, *whole[3:]]) + torn)
    run = read_run(directory)
    assert (run.top1, run.loss, run.state) == (expected.top1, expected.loss, "finished")
    assert run.problems == (f"metrics.jsonl: {len(odd)} damaged lines ignored",)


@pytest.mark.parametrize("name", ["run.json", "final.json", "metrics.jsonl", "trust_ratios.fields.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"settings": {"seed": 0', b"null", b"\xff\xfe", bytes(512), b"{}"],
    ids=["empty", "cut", "torn", "null", "bytes", "zeros", "no keys"],
)
def test_damaged_files_raise_no_error(name: str, content: bytes, make_run: MakeRun) -> None:
    directory = make_run("a")
    (directory / name).write_bytes(content)
    run = read_run(directory)
    read_ratios(directory)
    if name == "run.json":
        assert run.best_top1 == 30.0
    if name == "metrics.jsonl":
        assert run.state == "finished"
    assert all(map(str.isprintable, run.problems))


def test_huge_files_are_not_read_completely(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST_RECORD", 100)
    monkeypatch.setattr(files, "LARGEST_LOG", 200)
    run = read_run(make_run("a"))
    assert len(run.problems) == 3
    assert 0 < len(run.loss) < 5


def test_runs_are_found_once_without_those_moved_aside(make_run: MakeRun, tmp_path: Path) -> None:
    one, two, deep = make_run("one"), make_run("two"), make_run("deep/er/three")
    make_run("one.old1")
    make_run("one/checkpoints/copy")
    (tmp_path / "runs/link").symlink_to(two)
    assert sorted(find_runs([tmp_path])) == sorted([one, two, deep])
    assert find_runs([one, tmp_path / "runs/one/../one", two]) == [one, two]
    # A directory given by name is read.
    assert find_runs([tmp_path / "runs/one.old1"]) == [tmp_path / "runs/one.old1"]


def test_a_path_without_runs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_run: MakeRun) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, problem in (
        ("nowhere", "no such folder"),
        ("file", "is a file. Pass"),
        ("empty", "no run directory found"),
    ):
        with pytest.raises(ConfigError, match=f"{name}: .*{problem}"):
            find_runs([tmp_path / name])
    monkeypatch.setattr(read, "MAX_RUNS", 2)
    for name in "abc":
        make_run(name)
    with pytest.raises(ConfigError, match="more than 2"):
        find_runs([tmp_path / "runs"])


def ratios(directory: Path, layers: Any, lines: list[Any]) -> None:
    (directory / "trust_ratios.fields.json").write_text(json.dumps({"layers": layers}))
    (directory / "trust_ratios.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_trust_ratios_are_read_and_thinned_evenly(make_run: MakeRun) -> None:
    directory = make_run("a")
    assert read_ratios(directory) is None
    ratios(directory, ["a", "b"], [{"update": u, "trust_ratios": [u / 10, None]} for u in range(1, 2001)])
    found = read_ratios(directory, most=100)
    assert found is not None
    assert found.layers == ("a", "b")
    assert 50 <= len(found.updates) <= 100
    steps = {b - a for a, b in zip(found.updates, found.updates[1:], strict=False)}
    assert len(steps) == 1
    assert found.values == tuple((u / 10, None) for u in found.updates)


def test_nonfinite_trust_ratios_are_none(make_run: MakeRun) -> None:
    directory = make_run("a")
    line = {"update": 5, "trust_ratios": [0.5, float("nan")]}
    ratios(directory, ["a", "b"], [{"update": 4}, 3, line])
    found = read_ratios(directory)
    assert found is not None
    assert (found.layers, found.updates, found.values) == (("a", "b"), (5,), ((0.5, None),))
    ratios(directory, [], [line])
    assert read_ratios(directory) is None
