"""``mode=check`` on one rank: measure in turn what a run will use, put all ranks' findings together, and judge them.

It writes nothing that stays. What is wrong with one thing keeps it from no other, as far as that can be measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import torch

from lars_train.config import Config
from lars_train.errors import ConfigError, DataError
from lars_train.fsutil import wait_for
from lars_train.launch import Ranks
from lars_train.messages import counted, first_line, printable, say
from lars_train.messages import size as readable
from lars_train.plan import Plan, check_world
from lars_train.preflight.budget import Budget
from lars_train.preflight.compute import train_for
from lars_train.preflight.disk import MOST_WRITTEN, checkpoint_folder, existing, mark, shard_cache_folder
from lars_train.preflight.facts import Demands, Findings, OutputFolder, Rank
from lars_train.preflight.findings import describe_findings
from lars_train.preflight.interconnect import clocks, exchange
from lars_train.preflight.judge import Problem, agreement, data, devices, machines, room
from lars_train.preflight.machine import device_of, host, version_facts
from lars_train.preflight.pace import disk_pace, input_pace, network_pace
from lars_train.preflight.samples import counts, loader_rate, try_sample
from lars_train.training.assemble import make_network
from lars_train.training.device import choose_device, choose_precision, choose_threads, choose_workers, set_up
from lars_train.training.distributed import Group, process_group
from lars_train.training.prepare import Prepared, prepare
from lars_train.training.resolve import check_cache, decoder_lines, resolve_execution
from lars_train.training.run_directory import run_directory
from lars_train.training.session import find_finished

_T = TypeVar("_T")

# For a model that is not known: about the size of ResNet-50's weights, and of its checkpoint.
_GRADIENT_BYTES, _CHECKPOINT_BYTES = 102_000_000, 205_000_000


def check(config: Config, ranks: Ranks) -> dict[str, Any]:
    """``lines`` to print, ``problems`` (a text each; none: ready) and all ``findings``, on every rank. Collective.

    Raises `ConfigError` where a rank has no device.
    """
    device = choose_device(config, ranks)
    with process_group(ranks, device, config.distributed.timeout) as group:
        say(f"Checking {counted(ranks.world, 'rank')}, for a minute or two.\n")
        findings, notes = _Check(config, group, device).findings()
        problems = list(map(str, judge(findings)))
        told = [*describe_findings(findings), *notes, "", *verdict(problems)]
        # No rank ends before all have all: a launcher that sees one end may end the others.
        group.all_reduce_max([0])
    return {"lines": told, "problems": problems, "findings": dataclasses.asdict(findings)}


def judge(findings: Findings) -> list[Problem]:
    """All that is to be mended, what keeps a run from its start first."""
    judges = (data, machines, devices, agreement, room, input_pace, network_pace, disk_pace)
    return [problem for one in judges for problem in one(findings)]


def verdict(problems: list[str]) -> list[str]:
    """The last lines."""
    if not problems:
        return ["ready"]
    return ["To mend:", *(f"{number}. {printable(text)}" for number, text in enumerate(problems, 1))]


class _Check:
    """One rank's measurements, and what has gone wrong on the way."""

    def __init__(self, config: Config, group: Group, device: torch.device) -> None:
        self.config, self.group, self.device = config, group, device
        self.budget = Budget(config.check.seconds)
        self.refused: list[str] = []
        self.notes: list[str] = []

    def findings(self) -> tuple[Findings, list[str]]:
        """Everything of all ranks, and what is worth a word. Collective."""
        config, group, ranks = self.config, self.group, self.group.ranks
        facts = host()
        device = device_of(self.device, choose_threads(config, ranks))
        prepared = self._try(self._prepared)
        everyone_is = all(group.all_gather(prepared is not None))
        ahead = clocks(group)
        rank = Rank(ranks.rank, ranks.local_rank, facts, version_facts(config, self.device), device)
        if prepared is not None:
            dataset = prepared.dataset
            share = -(-config.check.samples // ranks.local_world)
            sample = self._try(lambda: try_sample(config, dataset, ranks.rank, share, self.budget.of("sample")))
            if sample is not None and sample.images < sample.drawn:
                self._bounded(f"{sample.images:,} pictures tried of {sample.drawn:,}")
            rank = dataclasses.replace(rank, counts=counts(config, dataset), sample=sample)
            if everyone_is:
                rank = self._paces(prepared, rank)
        step = rank.step
        size = group.broadcast_from_rank0(_GRADIENT_BYTES if step is None else step.gradient_bytes)
        took = exchange(group, self.device, size, config.check.seconds, self.budget.of("exchange"))
        if took is not None and took.sent < took.bytes:
            self._bounded(f"all-reduces of {readable(took.sent)}, and the time of {readable(took.bytes)} in proportion")
        held = _CHECKPOINT_BYTES if step is None else step.checkpoint_bytes
        folders = [self._try(lambda: self._checkpoints(prepared, held))] if group.first else []
        if prepared is not None and ranks.local_rank == 0:
            folders.append(self._try(lambda: shard_cache_folder(config, prepared.dataset)))
        rank = dataclasses.replace(
            rank,
            folders=tuple(folder for folder in folders if folder is not None),
            unseen=self._unseen(),
            refused=tuple(self.refused),
        )
        demands = None if prepared is None else _demands(config, prepared.plan)
        return Findings(tuple(group.all_gather(rank)), ahead, took, group.broadcast_from_rank0(demands)), self.notes

    def _try(self, measure: Callable[[], _T]) -> _T | None:
        """What it gives; where it cannot be measured, the reason is one of those that keep a run from its start."""
        try:
            return measure()
        except (ConfigError, DataError) as error:
            self.refused.append(str(error))
        except (OSError, RuntimeError) as error:
            self.refused.append(printable(first_line(error)))
        return None

    def _prepared(self) -> Prepared:
        config = self.config
        choose_precision(config.precision.name, self.device)
        prepared = prepare(config)
        check_world(prepared.plan, self.group.ranks.world)
        self.notes += prepared.notes
        return prepared

    def _paces(self, prepared: Prepared, rank: Rank) -> Rank:
        """`rank` with what its device and its loader do, each on all ranks at once. Collective."""
        config, plan, dataset, ranks = self.config, prepared.plan, prepared.dataset, self.group.ranks
        classes = len(dataset.classes)
        set_up(config, self.device, choose_threads(config, ranks))
        resolved = resolve_execution(config, plan, make_network(config, classes), self.device, self.group, None)
        workers = choose_workers(config, self.device, ranks)
        batch = resolved.micro_batch
        self._try(lambda: check_cache(config, dataset, plan, micro_batch=batch, ranks=ranks))
        self.notes += decoder_lines(config.data.decoder, resolved.decoder, None, dataset.train)
        seconds = config.check.seconds
        self.group.all_reduce_max([0])
        most = self.budget.of("step")
        step = self._try(lambda: train_for(config, plan, resolved, classes, self.device, seconds, most))
        if step is not None and step.samples < plan.ghost_batch:
            self._bounded(f"updates of {counted(step.samples, 'image')}, where a ghost batch has {plan.ghost_batch}")
        self.group.all_reduce_max([0])
        half = min(seconds, self.budget.of("input") / 2)
        found = self._try(lambda: loader_rate(config, plan, resolved, dataset.train, ranks, self.device, workers, half))
        return dataclasses.replace(rank, step=step, input=found)

    def _checkpoints(self, prepared: Prepared | None, held: int) -> OutputFolder:
        """Where they go, which is this run's to write to. Raises `ConfigError`."""
        directory = run_directory(self.config)
        if prepared is not None:
            find_finished(prepared)
        try:
            folder = checkpoint_folder(self.config, directory, held, self.budget.of("disk"))
        except OSError as error:
            raise ConfigError(f"run directory {directory}: it cannot be written ({error.strerror}).") from None
        if 0 < folder.written < min(held, MOST_WRITTEN):
            self._bounded(f"{readable(folder.written)} written of a checkpoint's {readable(held)}")
        return folder

    def _bounded(self, what: str) -> None:
        """Tell of what there was no time for."""
        self.notes.append(f"{'time was up':<15}{what}")

    def _unseen(self) -> str | None:
        """The folder, where this rank should see what the first one writes and does not. Collective."""
        folder = existing(run_directory(self.config))
        with ExitStack() as stack:
            left = None
            if self.group.first:
                with suppress(OSError):  # that it cannot be written to is known by now
                    left = stack.enter_context(mark(folder))
            left = self.group.broadcast_from_rank0(left)
            mine = self.group.ranks.local_rank == 0 and not self.group.first
            seen = not mine or left is None or wait_for(folder / left[0], left[1])
            self.group.all_reduce_max([0])
        return None if seen else str(folder)


def _demands(config: Config, plan: Plan) -> Demands:
    every = config.checkpoint.every_updates or plan.updates_per_epoch
    return Demands(plan.global_batch, every, config.checkpoint.every_minutes, config.data.max_bad, plan.samples)
