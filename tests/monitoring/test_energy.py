"""The energy of GPUs, measured through a fake NVML, in the log, the final record and the report of a run."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny

from lars_train.commands import _describe_results
from lars_train.launch import Ranks
from lars_train.monitoring.energy import EnergyMeter
from lars_train.report import table
from lars_train.report.compare import make_rows
from lars_train.report.page import page
from lars_train.report.read import read_run
from lars_train.training import metrics_logger, session
from lars_train.training.checkpoint import RunState
from lars_train.training.metrics_logger import MetricsLogger
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation
from lars_train.training.trainer import Trainer

CUDA = torch.device("cuda", 1)


class Nvml(ModuleType):
    """A driver with one GPU, whose counter in mJ grows by 5,000 with each reading."""

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.counter = 10**9
        self.asked: list[str] = []
        self.fails = False

    def nvmlInit(self) -> None:  # noqa: N802
        if self.fails:
            raise OSError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if self.fails:
            raise OSError("GPU is lost")
        assert handle == "handle"
        self.counter += 5000
        return self.counter


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    devices = {CUDA: SimpleNamespace(uuid="11-22")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", devices.__getitem__)
    return fake


def test_the_meter_reads_the_counter_of_torchs_device(nvml: Nvml) -> None:
    meter = EnergyMeter(CUDA)
    assert nvml.asked == ["GPU-11-22"]
    assert meter.take() == 5.0
    nvml.counter += 7000
    assert meter.take() == 12.0
    # The driver was loaded again.
    nvml.counter = 0
    assert meter.take() is None
    assert meter.take() == 5.0


def test_a_counter_that_fails_once_is_not_read_again(nvml: Nvml) -> None:
    meter = EnergyMeter(CUDA)
    nvml.fails = True
    assert meter.take() is None
    nvml.fails = False
    assert meter.take() is None
    assert meter.take() is None


@pytest.mark.parametrize("missing", ["package", "driver", "GPU"])
def test_without_nvml_there_is_no_energy(nvml: Nvml, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    if missing == "package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    nvml.fails = missing == "driver"
    device = torch.device("cpu") if missing == "GPU" else CUDA
    assert EnergyMeter(device).take() is None


class Joules:
    """A meter that reads 3,600 J at each call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def take(self) -> float | None:
        return 3600.0


def train(directory: Path) -> dict[str, Any]:
    changes = {"run": {"dir": str(directory)}, "epochs": 2, "log_every": 1, "checkpoint": {"every_updates": 1}}
    return session.train(prepare(tiny(changes)), Ranks(), Invocation(("lars-train",)))


def test_the_energy_of_a_run_is_logged_resumed_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_logger, "EnergyMeter", Joules)
    made, one_update = 0, Trainer.run_update

    def interrupted(trainer: Trainer, *arguments: Any, **keywords: Any) -> Any:
        nonlocal made
        made += 1
        if made == 3:
            raise KeyboardInterrupt
        return one_update(trainer, *arguments, **keywords)

    monkeypatch.setattr(Trainer, "run_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    final = train(tmp_path / "run")
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    energies = [line["run/kwh"] for line in logged]
    # An update is measured at its log line and at its checkpoint, a kWh/1000 each, and the end as well.
    updates = final["updates"]
    trained = [line["run/kwh"] for line in logged if "train/loss" in line]
    assert trained == pytest.approx([0.001 * (2 * update - 1) for update in range(1, updates + 1)])
    assert energies == sorted(energies)
    assert final["kwh"] == pytest.approx(0.001 * (2 * updates + 1))
    assert json.loads((tmp_path / "run" / "final.json").read_text())["kwh"] == final["kwh"]
    assert f", {1000 * final['kwh']:.3g} Wh on the GPUs\n" in _describe_results(final, tmp_path / "run")
    record = read_run(tmp_path / "run")
    assert record.kwh == final["kwh"]
    (row,) = csv.DictReader(io.StringIO(table.csv_text(make_rows([record]), tmp_path)))
    assert float(row["kwh"]) == pytest.approx(final["kwh"])
    assert f"{1000 * final['kwh']:.3g} Wh" in page(make_rows([record]), tmp_path)


@pytest.mark.parametrize(
    ("kwh", "text"),
    [
        (0.0000314, "0.0314 Wh"),
        (0.5, "500 Wh"),
        (0.9997, "1 kWh"),
        (1.537, "1.54 kWh"),
        (999.7, "1,000 kWh"),
        (12345.6, "12,346 kWh"),
    ],
)
def test_energy_is_written_for_reading(kwh: float, text: str) -> None:
    assert table.format_energy(kwh) == text


def test_a_run_without_meter_logs_no_energy(tmp_path: Path) -> None:
    final = train(tmp_path / "run")
    assert "kwh" not in final
    assert "Wh" not in _describe_results(final, tmp_path / "run")
    assert "kwh" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert read_run(tmp_path / "run").kwh is None


@pytest.mark.parametrize(("others", "expected"), [((2 * 3600.0, 2.0), 0.003), ((3600.0, 1.0), None)])
def test_all_ranks_must_be_measured(others: tuple[float, float], expected: float | None) -> None:
    def add(values: torch.Tensor) -> None:
        values += torch.tensor(others, dtype=torch.float64)

    logger = MetricsLogger.__new__(MetricsLogger)
    logger._energy, logger._state = Joules(CUDA), RunState()  # type: ignore[assignment]
    # A device of type cuda that holds tensors on the CPU.
    device = SimpleNamespace(type="cuda")
    group = SimpleNamespace(ranks=Ranks(0, 3), all_reduce_sum=add)
    logger._trainer = SimpleNamespace(device=device, group=group)  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        made = torch.tensor
        patch.setattr(metrics_logger.torch, "tensor", lambda values, dtype, device=None: made(values, dtype=dtype))
        logger.measure_energy()
        assert logger._state.kwh == (None if expected is None else pytest.approx(expected))
        # Once unknown, the energy of the whole run stays unknown.
        others = (2 * 3600.0, 2.0)
        logger.measure_energy()
    assert (logger._state.kwh is None) == (expected is None)


def test_a_checkpoint_without_energy_is_read(tmp_path: Path) -> None:
    content = {key: value for key, value in RunState().stored().items() if key != "kwh"}
    state = RunState()
    state.restore(content)
    assert state.kwh is None
