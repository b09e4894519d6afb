from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lars_train.monitoring import tensorboard as tensorboard_module
from lars_train.monitoring.fields import FIELDS
from lars_train.monitoring.layers import LayerValues
from lars_train.monitoring.log import RunLog, drop_lines_after


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def read_events(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    return events


def points(directory: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read_events(directory).Scalars(tag)]


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Advance the clock: TensorBoard orders the event files of a run by the second of their creation."""
    now, ahead = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + ahead[0])

    def move() -> None:
        ahead[0] += 10

    return move


def test_a_line_has_update_epoch_and_values(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write(10, 10 / 3, {"train/loss": 2.5, "train/bad_images": 0})
    # The line is readable while the run continues.
    assert lines(tmp_path) == [{"update": 10, "epoch": 3.333333, "train/loss": 2.5, "train/bad_images": 0}]
    log.write(12, 4.0, {"val/top1": 50.0, "val/count": 7})
    log.close()
    assert lines(tmp_path)[1:] == [{"update": 12, "epoch": 4.0, "val/top1": 50.0, "val/count": 7}]


def test_every_number_has_a_unit_and_a_meaning(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    with pytest.raises(KeyError, match="train/mystery"):
        log.write(1, 0.1, {"train/loss": 1.0, "train/mystery": 2.0})
    log.write(1, 0.1, {name: 1.0 for name in FIELDS if "/" in name})
    log.close()
    (line,) = lines(tmp_path)  # no part of the rejected line was written
    described = json.loads((tmp_path / "metrics.fields.json").read_text())
    assert described.keys() == FIELDS.keys()
    for name in line:
        assert described[name]["unit"]
        assert described[name]["meaning"]
    assert set(read_events(tmp_path).Tags()["scalars"]) == line.keys() - {"update", "epoch"}


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    for update in range(1, 6):
        log.write(update, update / 4, {"train/loss": 1 / update, "train/lr": 0.1 * update})
    log.close()
    for tag in ("train/loss", "train/lr"):
        expected = [(line["update"], line[tag]) for line in lines(tmp_path)]
        got = points(tmp_path, tag)
        assert [step for step, _ in got] == [step for step, _ in expected]
        assert [value for _, value in got] == pytest.approx([value for _, value in expected], rel=1e-6)


@pytest.mark.parametrize("checkpointed", [0, 1, 4, 6])
def test_a_resumed_log_has_each_update_once(checkpointed: int, tmp_path: Path, later: Any) -> None:
    """A run is killed after update 6 and resumes from an earlier checkpoint, or starts again."""
    killed = RunLog(tmp_path, 0)
    for update in range(1, 7):
        killed.write(update, update / 4, {"train/loss": 100.0 + update})
    killed.sync()
    later()
    log = RunLog(tmp_path, checkpointed)
    for update in range(checkpointed + 1, 9):
        log.write(update, update / 4, {"train/loss": 200.0 + update})
    log.close()
    expected = [(u, (100.0 if u <= checkpointed else 200.0) + u) for u in range(1, 9)]
    assert [(line["update"], line["train/loss"]) for line in lines(tmp_path)] == expected
    assert points(tmp_path, "train/loss") == expected
    killed.close()


def test_a_log_can_be_resumed_several_times(tmp_path: Path, later: Any) -> None:
    for start, stop in ((0, 4), (2, 6), (2, 3), (3, 8)):
        log = RunLog(tmp_path, start)
        for update in range(start + 1, stop + 1):
            log.write(update, update / 4, {"train/loss": float(10 * start + update)})
        log.close()
        later()
    assert [line["update"] for line in lines(tmp_path)] == list(range(1, 9))
    assert points(tmp_path, "train/loss") == [
        (1, 1.0),
        (2, 2.0),
        (3, 23.0),
        *((u, 30.0 + u) for u in range(4, 9)),
    ]


LAYERS = LayerValues(["conv1.weight", "fc.bias"], [1.0, 2.0], [0.1, 0.2], [0.01, 0.02], 1.0, {})


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> int:
    """Limit event files to this number of bytes."""
    monkeypatch.setattr(tensorboard_module, "_FILE_BYTES", 5_000)
    return 5_000


def event_files(directory: Path) -> list[Path]:
    return sorted((directory / "tensorboard").iterdir())


def writers() -> int:
    """Threads that write event files; TensorBoard opens a file for each of their writes."""
    return sum(type(thread).__name__ == "_AsyncWriterThread" for thread in threading.enumerate())


def write_many(log: RunLog, updates: range, loss: float, later: Any) -> None:
    for update in updates:
        log.write(update, update / 4, {"train/loss": loss + update})
        log.board.layers(LAYERS, update)
        later()


def test_event_files_are_split_and_read_as_one(tmp_path: Path, later: Any, small_files: int) -> None:
    others = writers()
    log = RunLog(tmp_path, 0)
    write_many(log, range(1, 41), 100.0, later)
    log.board.flush()
    files = event_files(tmp_path)
    assert len(files) >= 4
    # At most one event of each kind exceeds the limit; the last file is still open.
    sizes = [path.stat().st_size for path in files]
    assert all(small_files < size < 1.5 * small_files for size in sizes[:-1])
    assert sizes[-1] < 1.5 * small_files
    assert writers() == others + 1
    log.finish({"epochs": 2}, ["train/loss"])
    log.close()
    assert writers() == others
    assert points(tmp_path, "train/loss") == [(update, 100.0 + update) for update in range(1, 41)]
    assert [event.step for event in read_events(tmp_path).Histograms("layers/grad_norm")] == list(range(1, 41))
    # Each event is stored once, in any file.
    stored = [
        event.step
        for path in files
        for event in EventFileLoader(str(path)).Load()
        if any(value.tag == "train/loss" for value in event.summary.value)
    ]
    assert stored == list(range(1, 41))


@pytest.mark.parametrize("checkpointed", [0, 3, 17, 30])
def test_events_after_the_checkpoint_are_purged_in_any_file(
    checkpointed: int, tmp_path: Path, later: Any, small_files: int
) -> None:
    killed = RunLog(tmp_path, 0)
    write_many(killed, range(1, 31), 100.0, later)
    killed.sync()
    before = len(event_files(tmp_path))
    log = RunLog(tmp_path, checkpointed)
    write_many(log, range(checkpointed + 1, 46), 200.0, later)
    log.close()
    assert before >= 3
    assert len(event_files(tmp_path)) > before + 1
    expected = [(u, (100.0 if u <= checkpointed else 200.0) + u) for u in range(1, 46)]
    assert points(tmp_path, "train/loss") == expected
    killed.close()


@pytest.mark.parametrize("bytes_written", [0, 7, None])
def test_a_kill_while_starting_an_event_file_is_harmless(
    bytes_written: int | None, tmp_path: Path, later: Any, small_files: int
) -> None:
    """The previous file is closed. The next is missing, empty, or has a part of its first event."""
    killed = RunLog(tmp_path, 0)
    write_many(killed, range(1, 31), 100.0, later)
    killed.close()
    last = event_files(tmp_path)[-1]
    if bytes_written is not None:
        started = last.with_name(last.name.replace(last.name.split(".")[3], f"{int(time.time()):010d}"))
        started.write_bytes(last.read_bytes()[:bytes_written])
        later()
    log = RunLog(tmp_path, 17)
    write_many(log, range(18, 46), 200.0, later)
    log.close()
    assert points(tmp_path, "train/loss") == [(u, (100.0 if u <= 17 else 200.0) + u) for u in range(1, 46)]


def test_no_two_event_files_start_within_a_second(
    tmp_path: Path, small_files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their names would not give their order."""
    now = [1_800_000_000.25]
    monkeypatch.setattr(time, "time", lambda: now[0])
    log = RunLog(tmp_path, 0)
    write_many(log, range(1, 41), 0.0, lambda: None)
    log.board.flush()
    assert len(event_files(tmp_path)) == 1
    now[0] -= 100  # the clock was set back
    write_many(log, range(41, 43), 0.0, lambda: None)
    assert len(event_files(tmp_path)) == 1
    now[0] += 101
    write_many(log, range(43, 45), 0.0, lambda: None)
    log.close()
    assert len(event_files(tmp_path)) == 2
    assert [step for step, _ in points(tmp_path, "train/loss")] == list(range(1, 45))


def test_a_failed_event_file_ends_events_but_not_the_run(tmp_path: Path, later: Any, small_files: int) -> None:
    others = writers()
    log = RunLog(tmp_path, 0)
    log.board._folder = "/dev/null/no"
    write_many(log, range(1, 41), 0.0, later)
    assert "TensorBoard" in log.reason
    assert writers() == others
    log.sync()
    log.close()
    assert len(lines(tmp_path)) == 40


def test_the_hparams_tab_has_settings_and_results(tmp_path: Path, later: Any) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    log = RunLog(tmp_path, 0)
    log.write(3, 1.0, {"val/top1": 61.5})
    later()
    settings = {"optimizer.lr": 0.5, "epochs": 2, "data.root": None, "data.mean": [0.1, 0.2]}
    log.finish(settings, ["val/top1"])
    log.close()
    events = read_events(tmp_path)
    # Only the existing curve, without another chart of a single point.
    assert events.Tags()["scalars"] == ["val/top1"]
    assert points(tmp_path, "val/top1") == [(3, 61.5)]
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    infos = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.hparam_infos
    assert {info.name for info in infos if info.differs} == {"optimizer.lr", "epochs"}
    named = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    assert [info.name.tag for info in named] == ["val/top1"]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    stored_settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert {k: v.WhichOneof("kind") for k, v in stored_settings.items()} == {
        "optimizer.lr": "number_value",
        "epochs": "number_value",
        "data.root": "string_value",
        "data.mean": "string_value",
    }
    assert stored_settings["optimizer.lr"].number_value == 0.5


def test_later_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = ['{"update": 1, "train/loss": 3.0}', '{"update": 2, "val/top1": NaN}', '{"update": 2, "train/loss": 2.0}']
    dropped = ['{"update": 3, "train/loss": 1.0}', '{"update": 1, "tra', "", "17", "null", '{"loss": 1}', "\0\0\0\0"]
    path.write_text("\n".join([kept[0], dropped[0], *kept[1:], *dropped[1:]]))
    drop_lines_after(path, 2)
    assert path.read_text().splitlines() == kept
    assert path.read_text().endswith("\n")
    drop_lines_after(path, 2)
    assert path.read_text().splitlines() == kept
    drop_lines_after(path, 0)
    assert path.read_text() == ""
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_complete_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1}\n{"update": 2}')
    log = RunLog(tmp_path, 2)
    log.write(3, 1.0, {"train/loss": 1.0})
    log.close()
    assert [line["update"] for line in lines(tmp_path)] == [1, 2, 3]


def test_lines_with_nonfinite_values_are_strict_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write(1, 0.1, {"train/loss": float("nan"), "train/lr": float("inf"), "train/top1": 10.0})
    log.close()

    def reject(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line, parse_constant=reject)
    assert (values["train/loss"], values["train/lr"], values["train/top1"]) == (None, None, 10.0)


def test_lines_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write(1, 0.1, {"train/loss": 1.0})
    disk, room = log._metrics.file, [10]

    class Full:
        """A nearly full disk: accepts `room` bytes, which cuts a line short, then raises an error."""

        def write(self, data: bytes) -> int:
            if not room[0]:
                raise OSError(28, "No space left on device")
            taken = min(room[0], len(data))
            room[0] -= taken
            disk.write(data[:taken])
            return taken

        def fileno(self) -> int:
            return disk.fileno()

        def close(self) -> None:
            disk.close()

    log._metrics.file = Full()  # type: ignore[assignment]
    log.write(2, 0.2, {"train/loss": 2.0})
    log.write(3, 0.3, {"train/loss": 3.0})
    assert log.reason == "No space left on device"
    with pytest.raises(OSError, match="No space left"):
        log.sync()
    room[0] = 10_000
    log.write(4, 0.4, {"train/loss": 4.0})
    assert log.reason == ""
    log.sync()
    log.close()
    assert [line["update"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_disk_that_stays_full_raises_no_error(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log._metrics.file.close()
    log._metrics.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115, PTH123
    log.write(1, 0.1, {"train/loss": 1.0})
    assert log.reason
    log.close()


def test_a_failing_tensorboard_is_reported_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, 0)

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log.board._writer.file_writer, "add_summary", fail)
    log.write(1, 0.1, {"train/loss": 1.0})
    log.write(2, 0.2, {"train/loss": 1.0})
    assert "TensorBoard" in log.reason
    log.sync()
    log.close()
    assert [line["update"] for line in lines(tmp_path)] == [1, 2]


def ratio_lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "trust_ratios.jsonl").read_text().splitlines()]


def test_trust_ratios_are_logged_with_descriptions(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write_ratios(10, ["conv1.weight", "fc.bias"], [0.00123456, float("inf")])
    log.write_ratios(20, ["conv1.weight", "fc.bias"], [1.0, 2e-9])
    log.close()
    assert ratio_lines(tmp_path) == [
        {"update": 10, "trust_ratios": [0.001235, None]},
        {"update": 20, "trust_ratios": [1.0, 2e-9]},
    ]
    described = json.loads((tmp_path / "trust_ratios.fields.json").read_text())
    assert described["layers"] == ["conv1.weight", "fc.bias"]
    for name in ("update", "trust_ratios"):
        assert described[name]["unit"]
        assert described[name]["meaning"]


@pytest.mark.parametrize("checkpointed", [0, 1, 2, 3])
def test_resumed_trust_ratios_have_each_update_once(checkpointed: int, tmp_path: Path) -> None:
    killed = RunLog(tmp_path, 0)
    for update in (1, 2, 3):
        killed.write_ratios(update, ["a"], [update / 10])
    killed.close()
    with (tmp_path / "trust_ratios.jsonl").open("a") as file:
        file.write('{"update": 4, "trust_r')
    log = RunLog(tmp_path, checkpointed)
    for update in range(max(checkpointed, 1), 5):
        log.write_ratios(update, ["a"], [update / 5])
    log.close()
    expected = [(u, u / 10 if u <= checkpointed else u / 5) for u in range(1, 5)]
    assert [(line["update"], line["trust_ratios"][0]) for line in ratio_lines(tmp_path)] == expected


def test_a_run_without_lars_has_no_trust_ratio_file(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write(1, 0.1, {"train/loss": 1.0})
    log.close()
    assert not list(tmp_path.glob("trust_ratios*"))


def test_trust_ratios_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write_ratios(1, ["a"], [0.5])
    assert log._ratios is not None
    disk = log._ratios.file
    log._ratios.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115, PTH123
    log.write_ratios(2, ["a"], [0.5])
    assert log.reason
    log._ratios.file.close()
    log._ratios.file = disk
    log.write_ratios(3, ["a"], [0.5])
    assert log.reason == ""
    log.close()
    assert [line["update"] for line in ratio_lines(tmp_path)] == [1, 2, 3]
