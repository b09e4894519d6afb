"""The table: one row per batch, as text for a terminal or Markdown, and as CSV."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lars_train.messages import format_number, printable, terminal_width, wrap_line
from lars_train.report.compare import RUN, Mean, Row
from lars_train.report.curves import labels
from lars_train.report.files import as_line, as_number, relative_path
from lars_train.report.read import CUT_SHORT, FAILED, FINISHED, RunRecord

HEADER = (
    "batch",
    "LR policy",
    "lr",
    "warm-up epochs",
    "epochs",
    "updates",
    "best top-1 %",
    "final top-1 %",
    "time",
    "images/s",
    "published",
    "difference",
    "state",
    "differs in",
)
NOTHING = "-"
_SAYS_NOTHING = {
    "published": {NOTHING, "scaled"},
    "difference": {NOTHING},
    "state": {FINISHED},
    "differs in": {NOTHING},
}
# What a narrow terminal keeps, the first ones before all others.
_KEPT = (
    "batch",
    "best top-1 %",
    "state",
    "LR policy",
    "lr",
    "published",
    "difference",
    "final top-1 %",
    "differs in",
    "time",
    "epochs",
    "images/s",
    "warm-up epochs",
    "updates",
)
_RESULTS = {"best top-1 %", "final top-1 %", "time", "images/s", "difference", "state"}
# Characters of a cell on a terminal.
_LONGEST_BATCH = 30
# A backslash would not do for all of them: behind one that the text has itself, it is taken literally.
_ENTITIES = str.maketrans({c: f"&#{ord(c)};" for c in "&<>|[`"})


def cells(row: Row) -> tuple[str, ...]:
    """The text of a row, by the columns of `HEADER`."""
    run = row.first
    difference, rate = row.difference, row.mean(lambda run: run.images_per_s)
    seconds = row.mean(lambda run: run.seconds)
    return (
        batch_name(run),
        policy(run),
        _number(run, "optimizer.lr"),
        _number(run, "schedule.warmup_epochs", format_number),
        _number(run, "epochs"),
        _updates(run),
        _percent(row.mean(lambda run: run.best_top1), row),
        _percent(row.mean(lambda run: run.final_top1), row),
        NOTHING if seconds is None else elapsed_time(seconds.value),
        NOTHING if rate is None else f"{rate.value:,.0f}",
        _published(row),
        NOTHING if difference is None else f"{difference:+.2f}",
        state(row),
        "; ".join(f"{key}: {value}" for key, value in row.differs.items()) or NOTHING,
    )


def batch_name(run: RunRecord) -> str:
    """The batch as its row is called, and what became of it on this data set."""
    if not run.scaled:
        return run.batch
    return f"{run.batch} (scaled: {run.global_batch:,}{', raised' if run.raised else ''})"


def policy(run: RunRecord) -> str:
    """How the learning rate comes about: ``LARS + poly(2)``."""
    base = run.setting("optimizer.base")
    parts = ["LARS"] if run.settings.get("optimizer.name") == "lars" else []
    parts += [base] if base not in ("", "SGD") else []
    return " + ".join([*parts, _decay(run)])


def _decay(run: RunRecord) -> str:
    if run.settings.get("schedule.form") == "steps":
        epochs = ", ".join(f"{epoch:.3g}" for epoch in run.settings["schedule.steps"])
        return f"x{_number(run, 'schedule.step_factor')} at epochs {epochs}"
    return f"poly({_number(run, 'schedule.power')})"


def state(row: Row) -> str:
    """What became of the row's runs."""
    run, parts = row.first, [row.first.state]
    if run.state == FINISHED and len(row.runs) > 1:
        parts = [f"{FINISHED}, {len(row.runs)} seeds"]
    if run.state == CUT_SHORT:
        parts = [f"{CUT_SHORT} {run.reason}"]
    elif run.diverged:
        # The reason names the update.
        parts = [f"{FAILED}: {run.reason.rstrip('.')}"]
    elif run.state != FINISHED:
        parts.append(f"at update {run.updates:,}" + (f": {run.reason}" if run.reason else ""))
        if run.state == FAILED and run.reason:
            parts[-1] = parts[-1].rstrip(".")
    text = " ".join(parts)
    for what, count in (
        ("resumed", sum(r.resumes for r in row.runs)),
        ("rolled back", sum(r.rollbacks for r in row.runs)),
    ):
        if count:
            text += f"; {what} {'once' if count == 1 else f'{count} times'}"
    return text


def elapsed_time(seconds: float) -> str:
    """Seconds as a person would say them: ``1 h 23 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def notes(rows: Sequence[Row], *, brief: bool = False) -> list[str]:
    """What must be said below the table, a sentence or two each; `brief`: without what no figure depends on."""
    runs = [run for row in rows for run in row.runs]
    told: list[str] = []
    differing = list(dict.fromkeys(key for row in rows if row.first.recorded for key in row.differs if key != RUN))
    if differing:
        told.append(f"The runs differ in more than batch and recipe row: {', '.join(differing)}.")
    versions = list(dict.fromkeys(version for run in runs for version in run.versions))
    if len(versions) > 1:
        told.append(f"The runs were made by different versions: {' / '.join(versions)}.")
    if any(run.scaled for run in runs):
        what = " and ".join(
            dict.fromkeys(f"{run.setting('data.name')} with {run.setting('model.name')}" for run in runs if run.scaled)
        )
        told.append(
            f"scaled: measured on {what}, the batch in proportion to the data set; what is published is of ResNet-50 "
            "on ImageNet, and is not compared."
        )
    departures = list(dict.fromkeys(key for row in rows for key in row.departures))
    if departures:
        told.append(
            f"own settings: not as the recipe's row has them ({', '.join(departures)}), so that what is published "
            "for it is not compared."
        )
    told += [
        f"raised: in proportion the batch would be less than {size}, the least that batch norm works with."
        for size in sorted({run.global_batch for run in runs if run.raised and run.global_batch is not None})
    ]
    if any(len(row.runs) > 1 for row in rows):
        told.append("±: sample standard deviation over the seeds, beside their mean.")
    for row in rows:
        if row.repeats:
            again = ", ".join(printable(run.directory.name) for run in row.repeats)
            told.append(f"Not in the mean, as their seeds are there already: {again}.")
    unknown = [printable(run.directory.name) for run in runs if not run.recorded]
    if unknown and len(rows) > 1:
        told.append(
            f"Their settings are not known, as run.json has none that can be read: {', '.join(unknown)}. "
            "Each has a row of its own, and is in no mean."
        )
    for row in rows:
        for name, values in (("best", [r.best_top1 for r in row.runs]), ("final", [r.final_top1 for r in row.runs])):
            without = [printable(r.directory.name) for r, v in zip(row.runs, values, strict=True) if v is None]
            if without and len(row.runs) > 1:
                told.append(f"Not in the mean of the {name} top-1, as they have none: {', '.join(without)}.")
    if any(run.state != FINISHED for run in runs):
        told.append(
            "Runs that are not finished have rows of their own, with the best top-1 so far, and are in no mean."
        )
    if not brief:
        told.append(
            "time: training and evaluation, over all starts of a run, without the gaps between them and without what a "
            "kill made undone; images/s: training images over that time"
            + (", of several seeds the mean." if any(len(row.runs) > 1 for row in rows) else ".")
        )
    told += [f"{as_line(run.directory.name)}: {problem}." for run in runs for problem in run.problems]
    return [printable(note) for note in told]


def terminal(rows: Sequence[Row], width: int | None = None) -> str:
    """The table and its notes for a terminal: the columns that say something here and fit, and what they leave out.

    `width`: of the lines; None: the terminal's, or 80 where standard output is none.
    """
    width = terminal_width(sys.stdout) if width is None else width
    lines = [dict(zip(HEADER, cells(row), strict=True)) for row in rows]
    # A row's label names its state.
    reasons = [
        "" if row.first.state == FINISHED else re.sub(rf"^{row.first.state}\W*", "", line["state"])
        for row, line in zip(rows, lines, strict=True)
    ]
    for row, line in zip(rows, lines, strict=True):
        line["state"] = row.first.state
        if len(line["batch"]) > _LONGEST_BATCH:
            line["batch"] = f"{line['batch'][:_LONGEST_BATCH]}..."
    telling = [name for name in HEADER if any(line[name] not in _SAYS_NOTHING.get(name, set()) for line in lines)]
    kept, room = list[str](), width - len("|")
    for name in sorted(telling, key=_KEPT.index):
        size = len(" |") + 1 + max(len(escaped(cell)) for cell in (name, *(line[name] for line in lines)))
        if size <= room or not kept:
            kept.append(name)
            room -= size
    kept.sort(key=HEADER.index)
    text = [markdown_table(kept, [[line[name] for name in kept] for line in lines])]
    # What a row is, beside its results: where two are alike in it, what sets them apart stands below.
    kinds = [tuple(line[name] for name in kept if name not in _RESULTS) for line in lines]
    for label, kind, line, reason in zip(labels(rows), kinds, lines, reasons, strict=True):
        apart = line["differs in"] if "differs in" not in kept and kinds.count(kind) > 1 else NOTHING
        told = "; ".join(part for part in (reason, apart) if part not in ("", NOTHING))
        text += wrap_line(f"  {label}: {told}", width) if told else []
    left_out = [name for name in telling if name not in kept]
    if left_out:
        text += wrap_line(
            f"Left out in {width} columns: {', '.join(left_out)}; lars-report's table.md has them.", width
        )
    for note in notes(rows, brief=True):
        text += wrap_line(note, width)
    return "\n".join(text)


def markdown(rows: Sequence[Row]) -> str:
    """The table with its notes as a Markdown file that shows the curves, too."""
    parts = ["# Results", markdown_table(HEADER, [cells(row) for row in rows])]
    parts.append("\n".join(f"- {escaped(note)}" for note in notes(rows)))
    parts.append("![Top-1 and training loss against epochs, updates and time](curves.svg)")
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned, that reads well in a terminal."""
    lines = [list(header), *([escaped(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def escaped(text: str) -> str:
    """Text that cannot end its cell, and is neither HTML nor a link, where it is shown as Markdown."""
    text = printable(text).translate(_ENTITIES)
    # GitHub makes links of bare addresses.
    return text.replace("://", "&#58;//").replace("www.", "www&#46;")


def csv_text(rows: Sequence[Row], folder: Path) -> str:
    """The table for programs: plain numbers, one unit per column, empty where there is none.

    `folder`: what the paths of the run directories are relative to. In the cell ``directories`` a semicolon stands
    between them; one that a path has itself is spelt ``%3B`` there, and a percent sign ``%25``.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header: list[str] = []
    for row in rows:
        run, best, final = row.first, row.mean(lambda run: run.best_top1), row.mean(lambda run: run.final_top1)
        seconds, rate = row.mean(lambda run: run.seconds), row.mean(lambda run: run.images_per_s)
        values: dict[str, str | float | None] = {
            "batch": _cell(run.batch),
            "nominal_batch": run.nominal_batch,
            "global_batch": run.global_batch,
            "scaled": str(run.scaled).lower(),
            "raised": str(run.raised).lower(),
            "recipe": _cell(run.setting("recipe.name")),
            "lr_policy": _cell(policy(run)),
            "lr": as_number(run.settings.get("optimizer.lr")),
            "warmup_epochs": as_number(run.settings.get("schedule.warmup_epochs")),
            "epochs": as_number(run.settings.get("epochs")),
            "updates": run.updates,
            "planned_updates": run.planned_updates,
            "state": run.state,
            "reason": _cell(run.reason),
            "seeds": _cell(" ".join(r.setting("seed") for r in row.runs)),
            "best_top1_percent": best.value if best else None,
            "best_top1_deviation": best.deviation if best else None,
            "final_top1_percent": final.value if final else None,
            "final_top1_deviation": final.deviation if final else None,
            "seconds": seconds.value if seconds else None,
            "images_per_s": rate.value if rate else None,
            "published_top1_percent": row.published,
            "difference_points": row.difference,
            "resumes": sum(r.resumes for r in row.runs),
            "rollbacks": sum(r.rollbacks for r in row.runs),
            "differs_in": _cell("; ".join(f"{key}: {value}" for key, value in row.differs.items())),
            "directories": _cell(";".join(_in_list(relative_path(r.directory, folder)) for r in row.runs)),
        }
        if not header:
            header = list(values)
            writer.writerow(header)
        writer.writerow(["" if v is None else f"{v:.10g}" if isinstance(v, float) else v for v in values.values()])
    return out.getvalue()


def _in_list(path: str) -> str:
    return path.replace("%", "%25").replace(";", "%3B")


def _cell(text: str) -> str:
    # A spreadsheet takes text that begins so for a formula, and works it out.
    return f"'{printable(text)}" if text[:1] in ("=", "+", "-", "@") else printable(text)


def _number(run: RunRecord, key: str, to_text: Callable[[float], str] = "{:g}".format) -> str:
    value = as_number(run.settings.get(key))
    return NOTHING if value is None else to_text(value)


def _updates(run: RunRecord) -> str:
    if run.planned_updates is None or (run.planned_updates == run.updates and run.state == FINISHED):
        return f"{run.updates:,}"
    return f"{run.updates:,} of {run.planned_updates:,}"


def _published(row: Row) -> str:
    value = row.published
    if value is not None:
        return f"{value:.2f}"
    return "own settings" if row.departures else "scaled" if row.first.scaled else NOTHING


def _percent(mean: Mean | None, row: Row) -> str:
    if mean is None:
        return NOTHING
    few = f" ({mean.count} of {len(row.runs)} seeds)" if mean.count < len(row.runs) else ""
    return f"{mean.value:.2f}" + ("" if mean.deviation is None else f" ± {mean.deviation:.2f}") + few
