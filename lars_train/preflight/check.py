"""Check the machines for ``mode=check``: each rank measures its resources, and all findings are judged together.

Leaves nothing on disk. A failed measurement stops only those that depend on it.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from lars_train.config import Config
from lars_train.data.transforms import TrainingSizes
from lars_train.errors import ConfigError, DataError
from lars_train.fsutil import wait_for
from lars_train.launch import Ranks
from lars_train.messages import counted, first_line, printable, say, size
from lars_train.networks import make_network
from lars_train.preflight.findings import Demands, Findings, OutputFolder, Rank, describe_findings
from lars_train.preflight.judge import format_verdict, judge
from lars_train.preflight.measure_compute import (
    collect_versions,
    inspect_device,
    inspect_host,
    measure_clocks,
    measure_exchange,
    measure_step,
)
from lars_train.preflight.measure_io import (
    MAX_WRITTEN,
    count_images,
    inspect_checkpoint_folder,
    inspect_shard_cache,
    marker_file,
    measure_loader,
    nearest_existing,
    read_sample,
)
from lars_train.run_plan import Plan, check_world
from lars_train.training.device import (
    check_graphs,
    choose_device,
    choose_precision,
    choose_threads,
    choose_workers,
    set_up,
)
from lars_train.training.distributed import Group, process_group
from lars_train.training.prepare import Prepared, prepare
from lars_train.training.resolve import check_cache, decoder_lines, resolve_execution
from lars_train.training.run_directory import run_directory
from lars_train.training.session import find_finished

_T = TypeVar("_T")

# Used if the model is unknown: about the size of ResNet-50's weights, and of its checkpoint.
_GRADIENT_BYTES, _CHECKPOINT_BYTES = 102_000_000, 205_000_000

PARTS = {"sample": 2.0, "step": 4.0, "input": 2.0, "exchange": 2.0, "disk": 2.0}
"""The parts of a check in order, and the maximum time of each, in units of `check.seconds`."""

TOTAL = 18.0
"""The time of a check from the start of its process, in units of `check.seconds`. With the default of 5 s this is 90 s,
which leaves 30 s of the two minutes in docs/plan.md to start and end the processes."""

MIN_PART = 0.2
"""The minimum time of a part, even if it starts late, in units of `check.seconds`."""


class Budget:
    """Divide the time of a check among its parts.

    `started`: the start of the check on `time.monotonic`; by default, the start of this process. A part reads the clock
    between its steps and measures less when its time is up, so it overruns by one step at most.
    """

    def __init__(self, seconds: float, started: float | None = None) -> None:
        self.seconds = seconds
        self._end = (_process_start() if started is None else started) + TOTAL * seconds

    def seconds_for(self, part: str) -> float:
        """Return the time for `part`, which starts now: less than in `PARTS` if earlier parts took too long."""
        names = list(PARTS)
        remaining = sum(PARTS[name] for name in names[names.index(part) :])
        left = self._end - time.monotonic()
        return max(MIN_PART * self.seconds, PARTS[part] * min(self.seconds, left / remaining))


def _process_start() -> float:
    now = time.monotonic()
    try:
        # Field 22 of proc_pid_stat(5), in clock ticks since boot. /proc/uptime has seconds since boot.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return now
    return now - max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))


def check(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Return the ``lines`` to print, the ``problems`` as text (empty if ready) and all ``findings``, on every rank.

    Collective. Raises `ConfigError` if a rank has no device.
    """
    device = choose_device(config, ranks)
    with process_group(ranks, device, config.distributed.timeout) as group:
        say(f"Checking {counted(ranks.world, 'rank')}, for a minute or two.\n")
        findings, notes = _Check(config, group, device).run()
        problems = list(map(str, judge(findings)))
        lines = [*describe_findings(findings), *notes, "", *format_verdict(problems)]
        # Wait until all ranks have the findings: when one rank exits, a launcher may end the others.
        group.all_reduce_max([0])
    return {"lines": lines, "problems": problems, "findings": dataclasses.asdict(findings)}


class _Check:
    """The measurements of one rank, and the errors that they raised."""

    def __init__(self, config: Config, group: Group, device: torch.device) -> None:
        self.config, self.group, self.device = config, group, device
        self.budget = Budget(config.check.seconds)
        self.errors: list[str] = []
        self.notes: list[str] = []

    def run(self) -> tuple[Findings, list[str]]:
        """Return the findings of all ranks, and notes to print. Collective."""
        config, group, ranks = self.config, self.group, self.group.ranks
        host = inspect_host()
        device = inspect_device(self.device, choose_threads(config, ranks))
        prepared = self._try(self._prepare)
        all_prepared = all(group.all_gather(prepared is not None))
        clocks = measure_clocks(group)
        rank = Rank(ranks.rank, ranks.local_rank, host, collect_versions(config, self.device), device)
        if prepared is not None:
            dataset = prepared.dataset
            share = -(-config.check.samples // ranks.local_world)
            seconds = self.budget.seconds_for("sample")
            sample = self._try(lambda: read_sample(config, dataset, ranks.rank, share, seconds))
            if sample is not None and sample.images < sample.drawn:
                self._note_time_up(f"{sample.images:,} of {sample.drawn:,} sampled images read")
            rank = dataclasses.replace(rank, counts=count_images(config, dataset), sample=sample)
            if all_prepared:
                rank = self._measure_speeds(prepared, rank)
        step = rank.step
        gradients = group.broadcast_from_rank0(_GRADIENT_BYTES if step is None else step.gradient_bytes)
        limit = self.budget.seconds_for("exchange")
        exchange = measure_exchange(group, self.device, gradients, config.check.seconds, limit)
        if exchange is not None and exchange.sent < exchange.bytes:
            self._note_time_up(f"all-reduces of {size(exchange.sent)}, their time scaled up to {size(exchange.bytes)}")
        checkpoint = _CHECKPOINT_BYTES if step is None else step.checkpoint_bytes
        folders = [self._try(lambda: self._inspect_checkpoints(prepared, checkpoint))] if group.first else []
        if prepared is not None and ranks.local_rank == 0:
            folders.append(self._try(lambda: inspect_shard_cache(config, prepared.dataset)))
        rank = dataclasses.replace(
            rank,
            folders=tuple(folder for folder in folders if folder is not None),
            unshared_folder=self._find_unshared(),
            errors=tuple(self.errors),
        )
        demands = None if prepared is None else _demands(config, prepared.plan)
        gathered = tuple(group.all_gather(rank))
        return Findings(gathered, clocks, exchange, group.broadcast_from_rank0(demands)), self.notes

    def _try(self, measure: Callable[[], _T]) -> _T | None:
        """Return the measurement. If it fails, record the error (a run would end with it) and return None."""
        try:
            return measure()
        except (ConfigError, DataError) as error:
            self.errors.append(str(error))
        except (OSError, RuntimeError) as error:
            self.errors.append(printable(first_line(error)))
        return None

    def _prepare(self) -> Prepared:
        config = self.config
        choose_precision(config.precision.name, self.device)
        check_graphs(config)
        prepared = prepare(config)
        check_world(prepared.plan, self.group.ranks.world)
        self.notes += prepared.notes
        return prepared

    def _measure_speeds(self, prepared: Prepared, rank: Rank) -> Rank:
        """Return `rank` with the speeds of its device and its loader, measured on all ranks at once. Collective."""
        config, plan, dataset, ranks = self.config, prepared.plan, prepared.dataset, self.group.ranks
        classes = len(dataset.classes)
        set_up(config, self.device, choose_threads(config, ranks))
        resolved = resolve_execution(config, plan, make_network(config, classes), self.device, self.group, None)
        workers = choose_workers(config, self.device, ranks)
        micro_batch = resolved.micro_batch
        self._try(lambda: check_cache(config, dataset, plan, micro_batch=micro_batch, ranks=ranks))
        sizes = TrainingSizes.from_config(config.data)
        if sizes.start != sizes.end:
            self.notes.append(
                f"{'sizes':<15}the micro-batch fits images of {sizes.largest} pixels; all speeds are for the first "
                f"epoch's {sizes.at(0)} pixels"
            )
        self.notes += decoder_lines(config.data.decoder, resolved.decoder, None, dataset.train)
        seconds = config.check.seconds
        self.group.all_reduce_max([0])
        limit = self.budget.seconds_for("step")
        step = self._try(lambda: measure_step(config, plan, resolved, classes, self.device, seconds, limit))
        if step is not None and step.samples < plan.ghost_batch:
            self._note_time_up(
                f"training measured with updates of {counted(step.samples, 'image')}, fewer than the ghost batch's "
                f"{plan.ghost_batch}"
            )
        self.group.all_reduce_max([0])
        half = min(seconds, self.budget.seconds_for("input") / 2)
        loader = self._try(
            lambda: measure_loader(config, plan, resolved, dataset.train, ranks, self.device, workers, half)
        )
        return dataclasses.replace(rank, step=step, input=loader)

    def _inspect_checkpoints(self, prepared: Prepared | None, checkpoint_bytes: int) -> OutputFolder:
        """Return the folder for checkpoints. Raises `ConfigError` if this run cannot write there."""
        directory = run_directory(self.config)
        if prepared is not None:
            find_finished(prepared)
        seconds = self.budget.seconds_for("disk")
        try:
            folder = inspect_checkpoint_folder(self.config, directory, checkpoint_bytes, seconds)
        except OSError as error:
            raise ConfigError(f"run directory {directory}: cannot be written ({error.strerror}).") from None
        if 0 < folder.written < min(checkpoint_bytes, MAX_WRITTEN):
            self._note_time_up(f"{size(folder.written)} of a checkpoint's {size(checkpoint_bytes)} written")
        return folder

    def _note_time_up(self, measured: str) -> None:
        """Add a note for a measurement that ran out of time; `measured` describes its result."""
        self.notes.append(f"{'time was up':<15}{measured}")

    def _find_unshared(self) -> str | None:
        """Return the run directory if this machine does not see a file that rank 0 writes there. Collective."""
        folder = nearest_existing(run_directory(self.config))
        with ExitStack() as stack:
            marker = None
            if self.group.first:
                with suppress(OSError):  # a folder that cannot be written is among the errors already
                    marker = stack.enter_context(marker_file(folder))
            marker = self.group.broadcast_from_rank0(marker)
            looks = self.group.ranks.local_rank == 0 and not self.group.first
            seen = not looks or marker is None or wait_for(folder / marker[0], marker[1])
            self.group.all_reduce_max([0])
        return None if seen else str(folder)


def _demands(config: Config, plan: Plan) -> Demands:
    every = config.checkpoint.every_updates or plan.updates_per_epoch
    return Demands(plan.global_batch, every, config.checkpoint.every_minutes, config.data.max_bad)
