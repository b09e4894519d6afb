"""Format the table, one row per batch and setting, for a terminal, as Markdown and as CSV."""

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
_UNINFORMATIVE = {
    "published": {NOTHING, "scaled"},
    "difference": {NOTHING},
    "state": {FINISHED},
    "differs in": {NOTHING},
}
# Columns in the order in which a narrow terminal keeps them.
_PRIORITY = (
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
# Characters of the batch's cell on a terminal.
_MAX_BATCH_LENGTH = 30
# HTML entities instead of backslash escapes: a backslash that precedes an escape would cancel it.
_ENTITIES = str.maketrans({c: f"&#{ord(c)};" for c in "&<>|[`"})


def cells(row: Row) -> tuple[str, ...]:
    """Return the cells of a row, in the order of `HEADER`."""
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
    """Return the batch's name, and its size if it is scaled to this data set."""
    if not run.scaled:
        return run.batch
    return f"{run.batch} (scaled: {run.global_batch:,}{', raised' if run.raised else ''})"


def policy(run: RunRecord) -> str:
    """Return the optimizer and the schedule's decay, as in the published table: ``LARS + poly(2)``."""
    base = run.setting("optimizer.base")
    parts = ["LARS"] if run.settings.get("optimizer.name") == "lars" else []
    parts += [base] if base not in ("", "SGD") else []
    return " + ".join([*parts, _decay(run)])


def _decay(run: RunRecord) -> str:
    form = run.settings.get("schedule.form")
    if form == "cosine":
        return "cosine"
    if form == "steps":
        epochs = ", ".join(f"{epoch:.3g}" for epoch in run.settings["schedule.steps"])
        return f"x{_number(run, 'schedule.step_factor')} at epochs {epochs}"
    return f"poly({_number(run, 'schedule.power')})"


def state(row: Row) -> str:
    """Describe the state of the row's runs."""
    run, parts = row.first, [row.first.state]
    if run.state == FINISHED and len(row.runs) > 1:
        parts = [f"{FINISHED}, {len(row.runs)} seeds"]
    if run.state == CUT_SHORT:
        parts = [f"{CUT_SHORT} {run.reason}"]
    elif run.diverged:
        # The reason already names the update.
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


def format_energy(kwh: float) -> str:
    """Return an energy as text, with three digits below 1,000 kWh: ``31.4 Wh``, ``1.54 kWh``, ``12,346 kWh``."""
    if kwh < 0.9995:  # rounds to less than 1,000 Wh
        return f"{1000 * kwh:.3g} Wh"
    return f"{kwh:,.0f} kWh" if kwh >= 999.5 else f"{kwh:.3g} kWh"


def elapsed_time(seconds: float) -> str:
    """Return seconds as text that still shows small differences: ``1 h 23 min``, ``9 min 5 s``, ``0.4 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def notes(rows: Sequence[Row], *, brief: bool = False) -> list[str]:
    """Return the notes below the table. `brief`: omit the definitions of the columns."""
    runs = [run for row in rows for run in row.runs]
    texts: list[str] = []
    differing = list(dict.fromkeys(key for row in rows if row.first.recorded for key in row.differs if key != RUN))
    if differing:
        texts.append(f"The runs differ in more than batch and recipe row: {', '.join(differing)}.")
    versions = list(dict.fromkeys(version for run in runs for version in run.versions))
    if len(versions) > 1:
        texts.append(f"The runs used different versions: {' / '.join(versions)}.")
    if any(run.scaled for run in runs):
        what = " and ".join(
            dict.fromkeys(f"{run.setting('data.name')} with {run.setting('model.name')}" for run in runs if run.scaled)
        )
        texts.append(
            f"scaled: measured on {what}, with the batch in proportion to the data set. The published values are for "
            "ResNet-50 on ImageNet and are not comparable."
        )
    departures = list(dict.fromkeys(key for row in rows for key in row.departures))
    if departures:
        texts.append(
            f"own settings: not those of the recipe's row ({', '.join(departures)}), so the published value is not "
            "comparable."
        )
    texts += [
        f"raised: scaled to the data set, the batch would be below {size}, the minimum for batch norm."
        for size in sorted({run.global_batch for run in runs if run.raised and run.global_batch is not None})
    ]
    if any(run.settings.get("model.ema") is not None for run in runs):
        texts.append("Runs with model.ema: top-1 is that of the average of the weights.")
    if any(len(row.runs) > 1 for row in rows):
        texts.append("±: mean and sample standard deviation over the seeds.")
    for row in rows:
        if row.repeats:
            again = ", ".join(printable(run.directory.name) for run in row.repeats)
            texts.append(f"Not in the mean, because another run has the same seed: {again}.")
    unknown = [printable(run.directory.name) for run in runs if not run.recorded]
    if unknown and len(rows) > 1:
        texts.append(
            f"Unknown settings, because run.json has none that can be read: {', '.join(unknown)}. Each of these runs "
            "has a separate row and is in no mean."
        )
    for row in rows:
        for name, values in (("best", [r.best_top1 for r in row.runs]), ("final", [r.final_top1 for r in row.runs])):
            without = [printable(r.directory.name) for r, v in zip(row.runs, values, strict=True) if v is None]
            if without and len(row.runs) > 1:
                texts.append(f"Not in the mean of the {name} top-1, because it is missing: {', '.join(without)}.")
    if any(run.state != FINISHED for run in runs):
        texts.append("Unfinished runs have separate rows, with the best top-1 so far, and are in no mean.")
    if not brief:
        texts.append(
            "time: training and evaluation over all starts of a run, excluding gaps between starts and work lost to a "
            "kill. images/s: training images over that time."
            + (" Both are means over the seeds." if any(len(row.runs) > 1 for row in rows) else "")
        )
    texts += [f"{as_line(run.directory.name)}: {problem}." for run in runs for problem in run.problems]
    return [printable(note) for note in texts]


def terminal(rows: Sequence[Row], width: int | None = None) -> str:
    """Return the table and its notes for a terminal, with the informative columns that fit.

    `width`: the most characters in a line; None for the terminal's width, or 80 if standard output is no terminal.
    """
    width = terminal_width(sys.stdout) if width is None else width
    lines = [dict(zip(HEADER, cells(row), strict=True)) for row in rows]
    # The label of a row already names its state.
    reasons = [
        "" if row.first.state == FINISHED else re.sub(rf"^{row.first.state}\W*", "", line["state"])
        for row, line in zip(rows, lines, strict=True)
    ]
    for row, line in zip(rows, lines, strict=True):
        line["state"] = row.first.state
        if len(line["batch"]) > _MAX_BATCH_LENGTH:
            line["batch"] = f"{line['batch'][:_MAX_BATCH_LENGTH]}..."
    informative = [name for name in HEADER if any(line[name] not in _UNINFORMATIVE.get(name, set()) for line in lines)]
    kept, room = list[str](), width - len("|")
    for name in sorted(informative, key=_PRIORITY.index):
        size = len(" |") + 1 + max(len(escaped(cell)) for cell in (name, *(line[name] for line in lines)))
        if size <= room or not kept:
            kept.append(name)
            room -= size
    kept.sort(key=HEADER.index)
    text = [markdown_table(kept, [[line[name] for name in kept] for line in lines])]
    # Rows that look alike except for their results get a line below that says how they differ.
    kinds = [tuple(line[name] for name in kept if name not in _RESULTS) for line in lines]
    for label, kind, line, reason in zip(labels(rows), kinds, lines, reasons, strict=True):
        difference = line["differs in"] if "differs in" not in kept and kinds.count(kind) > 1 else NOTHING
        details = "; ".join(part for part in (reason, difference) if part not in ("", NOTHING))
        text += wrap_line(f"  {label}: {details}", width) if details else []
    left_out = [name for name in informative if name not in kept]
    if left_out:
        text += wrap_line(
            f"Columns left out to fit {width} characters: {', '.join(left_out)}. See table.md of lars-report.", width
        )
    for note in notes(rows, brief=True):
        text += wrap_line(note, width)
    return "\n".join(text)


def markdown(rows: Sequence[Row]) -> str:
    """Return a Markdown file with the table, its notes and the curves."""
    parts = ["# Results", markdown_table(HEADER, [cells(row) for row in rows])]
    parts.append("\n".join(f"- {escaped(note)}" for note in notes(rows)))
    parts.append("![Top-1 and training loss against epochs, updates and time](curves.svg)")
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns, readable in a terminal."""
    lines = [list(header), *([escaped(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def escaped(text: str) -> str:
    """Escape text for a Markdown cell: it cannot end the cell, and is neither HTML nor a link."""
    text = printable(text).translate(_ENTITIES)
    # GitHub turns bare addresses into links.
    return text.replace("://", "&#58;//").replace("www.", "www&#46;")


def csv_text(rows: Sequence[Row], folder: Path) -> str:
    """Return the table as CSV: plain numbers, one unit per column, an empty cell for a missing value.

    Paths of run directories are relative to `folder`. In the column ``directories``, semicolons separate them; in a
    path, a semicolon is written as ``%3B`` and a percent sign as ``%25``.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header: list[str] = []
    for row in rows:
        run, best, final = row.first, row.mean(lambda run: run.best_top1), row.mean(lambda run: run.final_top1)
        seconds, rate = row.mean(lambda run: run.seconds), row.mean(lambda run: run.images_per_s)
        kwh = row.mean(lambda run: run.kwh)
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
            "kwh": kwh.value if kwh else None,
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
    # A spreadsheet would evaluate text that starts like this as a formula.
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
