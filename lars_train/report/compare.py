"""Group runs into rows of the table: finished runs with the same batch and settings share a row and its means."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lars_train.config import EXECUTION_KEYS
from lars_train.config.lars_options import options_of
from lars_train.config.recipe_schema import RowConfig
from lars_train.config.rows import row_name
from lars_train.config.sizes import row_sizes
from lars_train.config.values import LATER_KEYS
from lars_train.errors import ConfigError
from lars_train.report.files import as_line, as_number
from lars_train.report.read import FINISHED, RunRecord
from lars_train.run_plan import IMAGENET_TRAIN_IMAGES

_AS_RECIPE = "as in the recipe's row"
RUN = "run"
"""Key of the run's name in `Row.differs`."""
# Settings that are not compared. Execution settings and the seed do not separate rows, `_sort_key` separates batches,
# and `_setup` compares each setting with its value in the recipe's row.
_NOT_COMPARED = (*EXECUTION_KEYS, "seed", "batch.name", "batch.nominal", "batch.size", "recipe")

# Minimum number of significant digits of a float in the column "differs in".
_DIGITS = 6


@dataclass(frozen=True)
class Mean:
    """Mean over `count` runs, and their sample standard deviation (None for a single run)."""

    value: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Row:
    """A row of the table: finished runs that differ only in their seeds, or a single unfinished run.

    `differs`: settings, besides batch and recipe row, that distinguish the row from others. `repeats`: finished runs
    whose seed already has a run in `runs`; no mean includes them.
    """

    runs: tuple[RunRecord, ...]
    differs: dict[str, str]
    repeats: tuple[RunRecord, ...] = ()

    @property
    def first(self) -> RunRecord:
        """The first run. Use it for values that all runs of the row share."""
        return self.runs[0]

    def mean(self, value: Callable[[RunRecord], float | None]) -> Mean | None:
        """Return the mean of `value` over the runs for which it is not None; None if there are none."""
        values = [v for v in map(value, self.runs) if v is not None]
        if not values:
            return None
        return Mean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    @property
    def published(self) -> float | None:
        """The published best top-1 in percent, if the runs use a recipe's row unchanged, at full scale."""
        return None if self.departures else self._published_row

    @property
    def departures(self) -> tuple[str, ...]:
        """The settings that differ from the recipe's row. If there are any, its published value is not comparable."""
        return () if self._published_row is None else tuple(_deviations(self.first))

    @property
    def _published_row(self) -> float | None:
        run = self.first
        full = run.settings.get("data.name") == "imagenet" and run.settings.get("model.name") == "resnet50"
        full = full and not run.scaled and run.samples in (None, IMAGENET_TRAIN_IMAGES)
        if not full or run.settings.get("batch.size") is not None or run.state != FINISHED:
            return None
        return as_number(_recipe_row(run).get("published_top1"))

    @property
    def difference(self) -> float | None:
        """Mean best top-1 minus the published top-1, in points; None if either is missing."""
        best, published = self.mean(lambda run: run.best_top1), self.published
        return None if best is None or published is None else best.value - published


def make_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """Return the rows of the table, sorted by batch, finished runs first.

    A run with unknown settings gets its own row, because no other run is known to match it.
    """
    rows = _known_rows([run for run in runs if run.recorded])
    rows += [Row((run,), {"settings": "unknown"}) for run in runs if not run.recorded]
    # The sort is stable: rows of one batch keep their order, and rows with unknown settings come last.
    return sorted(
        _with_run_names(rows),
        key=lambda row: (*_sort_key(row.first)[:2], not row.first.recorded, _sort_key(row.first)[2]),
    )


def _with_run_names(rows: Sequence[Row]) -> list[Row]:
    """Return `rows`, with the name of the run added to `differs` of rows that are otherwise alike."""

    def kind(row: Row) -> tuple[Any, ...]:
        return _sort_key(row.first), tuple(row.differs.items()), row.first.state == FINISHED

    alike = Counter(map(kind, rows))
    return [
        dataclasses.replace(row, differs={**row.differs, RUN: as_line(row.first.directory.name)})
        if alike[kind(row)] > 1
        else row
        for row in rows
    ]


def _sort_key(run: RunRecord) -> tuple[float, str, int]:
    return run.nominal_batch if run.nominal_batch is not None else math.inf, run.batch, run.global_batch or 0


def _known_rows(runs: Sequence[RunRecord]) -> list[Row]:
    setups = [_setup(run) for run in runs]
    _add_resolved(runs, setups)
    differing = _differing_keys(setups)
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    for run, setup in zip(runs, setups, strict=True):
        values = ((key, setup.get(key, "not set")) for key in differing)
        # Rows with the recipe's values come first.
        apart = tuple((value != _AS_RECIPE, key, value) for key, value in values)
        groups.setdefault((*_sort_key(run), apart), []).append(run)
    rows = []
    short = {key: _short(setup[key] for setup in setups if key in setup) for key in differing}
    implied = _implied(runs) if "optimizer.name" in differing else {}
    for key in sorted(groups):
        members = groups[key]
        optimizer = members[0].setting("optimizer.name")
        differs = {
            name: short[name].get(value, value)
            for other, name, value in key[-1]
            if other and optimizer not in implied.get(name, ())
        }
        rows += _finished_rows([run for run in members if run.state == FINISHED], differs)
        rows += [Row((run,), differs) for run in members if run.state != FINISHED]
    return rows


def _differing_keys(setups: Sequence[dict[str, str]]) -> list[str]:
    """Return the keys whose values are not the same in all `setups`."""
    keys = dict.fromkeys(key for setup in setups for key in setup)
    return sorted(key for key in keys if len({setup.get(key) for setup in setups}) > 1)


def _implied(runs: Sequence[RunRecord]) -> dict[str, set[str]]:
    """Return, for each option, the optimizers whose name alone determines the value of the option.

    These are the optimizers without the option (null or missing). If only one optimizer has the option, and all its
    runs have the same value, its name determines that value, too.
    """
    values: dict[str, dict[str, set[str]]] = {}
    keys = dict.fromkeys(key for run in runs for key in run.settings if key.startswith("optimizer."))
    for run in runs:
        for key in keys:
            of_key = values.setdefault(key, {}).setdefault(run.setting("optimizer.name"), set())
            of_key.add(as_line(run.settings.get(key)))
    found = {}
    for key, by_name in values.items():
        without = {name for name, have in by_name.items() if have == {as_line(None)}}
        having = by_name.keys() - without
        if without:
            alone = having if len(having) == 1 and all(len(by_name[name]) == 1 for name in having) else set()
            found[key] = without | alone
    return found


def _short(texts: Iterable[str]) -> dict[str, str]:
    """Return the table's text for each value of a key: floats with 6 digits, or with enough to keep all distinct."""
    whole = sorted(set(texts))
    for digits in range(_DIGITS, 17):
        brief = [_rounded(text, digits) for text in whole]
        if len(set(brief)) == len(whole):
            return dict(zip(whole, brief, strict=True))
    return {text: text for text in whole}


def _rounded(text: str, digits: int) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, list):
        return json.dumps([_rounded_float(item, digits) for item in value])
    return json.dumps(_rounded_float(value, digits)) if isinstance(value, float) else text


def _rounded_float(value: Any, digits: int) -> Any:
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def _finished_rows(runs: list[RunRecord], differs: dict[str, str]) -> list[Row]:
    if not runs:
        return []
    seeds: dict[str, RunRecord] = {}
    # Keep the first run of each seed, preferably one without problems.
    for run in sorted(runs, key=lambda run: bool(run.problems)):
        seeds.setdefault(run.setting("seed"), run)
    kept = tuple(run for run in runs if run in seeds.values())
    return [Row(kept, differs, tuple(run for run in runs if run not in kept))]


def _setup(run: RunRecord) -> dict[str, str]:
    """Return the settings that affect a run's results; `_AS_RECIPE` for values equal to the recipe's row."""
    deviations, row = _deviations(run), _row_settings(run)
    setup = {"recipe": run.setting("recipe.name")}
    for key, value in run.settings.items():
        if f"{key}.".startswith(tuple(f"{ignored}." for ignored in _NOT_COMPARED)):
            continue
        setup[key] = _AS_RECIPE if key in row and key not in deviations else as_line(value)
    # The global order has no windows.
    if setup.get("data.order") == as_line("global"):
        setup.pop("data.window_shards", None)
    return setup


def _add_resolved(runs: Sequence[RunRecord], setups: list[dict[str, str]]) -> None:
    """Add settings that a run resolves at its start.

    A run that ended before it resolved them gets the value that all others share.
    """
    found: dict[str, list[Any]] = {
        "precision.name": [run.precision for run in runs],
        "training images": [run.samples for run in runs],
    }
    for key, values in found.items():
        known = set(values) - {None}
        for value, setup in zip(values, setups, strict=True):
            if len(known) == 1:
                setup[key] = as_line(next(iter(known)))
            elif value is not None:
                setup[key] = as_line(value)


def _deviations(run: RunRecord) -> list[str]:
    """Return the settings that differ from the recipe's row or, where the row has no value, from `LATER_KEYS`.

    Null settings are unused, and ignored; but a null size means that training has the size of the evaluation.
    """
    own, row = run.settings, {**LATER_KEYS, **_row_settings(run)}
    return [key for key in row if own.get(key) != row[key] and (own.get(key) is not None or key in _SIZES)]


def _row_settings(run: RunRecord) -> dict[str, Any]:
    """Return the values of the recipe's row, and of the preset that it names, by setting."""
    if run.settings.get("batch.size") is not None:
        return {}
    row, found = {key: value for key, value in _recipe_row(run).items() if value is not None}, {}
    with contextlib.suppress(ConfigError, TypeError):  # the recipe may name a preset that this version lacks
        row = {**options_of(row["preset"], ""), **row}
    for name, value in row.items():
        places = _PLACES.get(name, (name, *(f"{g}.{name}" for g in _GROUPS)))
        key = next((place for place in places if place in run.settings), None)
        if key is not None:
            found[key] = value
    factor = 1.0
    if run.settings.get("schedule.scale_warmup") and row.get("epochs"):
        factor = run.settings["epochs"] / row["epochs"]
        for key in found.keys() & {"schedule.warmup_epochs", "schedule.steps"}:
            found[key] = _times(found[key], factor)
    sizes = {key: row[key] for key in ("train_size", "eval_size", "size_schedule", "eval_resize") if key in row}
    with contextlib.suppress(ConfigError, TypeError):  # a recipe may hold any value
        found |= {f"data.{key}": value for key, value in row_sizes(RowConfig(**sizes), factor).items()}
    return found


_GROUPS = ("optimizer", "schedule", "model", "data", "augment")
# Fields of a recipe's row that are settings under another name. `source` cites the row's origin: no setting.
_PLACES: dict[str, tuple[str, ...]] = {
    "optimizer": ("optimizer.name",),
    "flip_evaluation": ("evaluate.flip",),
    "source": (),
}
_SIZES = ("data.train_size", "data.size_schedule")


def _times(value: Any, factor: float) -> Any:
    return [step * factor for step in value] if isinstance(value, list) else value * factor


def _recipe_row(run: RunRecord) -> dict[str, Any]:
    start, batch = "recipe.rows.", run.settings.get("batch.name")
    names = dict.fromkeys(key.removeprefix(start).partition(".")[0] for key in run.settings if key.startswith(start))
    # The schema has the defaults of a row.
    row: dict[str, Any] = dataclasses.asdict(RowConfig())
    own = f"{start}{row_name(names, batch) if isinstance(batch, str) else None}."
    for prefix in ("recipe.common.", own, f"{own}by_epochs.{run.settings.get('epochs')}."):
        row.update({k.removeprefix(prefix): v for k, v in run.settings.items() if k.startswith(prefix)})
    return row
