"""Write ``report.html``: one file with the table, the curves, settings and links to the runs, without scripts."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Container, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from lars_train.messages import counted, printable
from lars_train.optim import __version__
from lars_train.report import curves
from lars_train.report.compare import Row
from lars_train.report.files import as_line, relative_path
from lars_train.report.read import FINISHED, Ratios, RunRecord, read_ratios
from lars_train.report.table import HEADER, NOTHING, batch_name, cells, elapsed_time, format_energy, notes, state

_MAX_HEAT_MAPS = 16
_FILES = (
    "config.yaml",
    "run.json",
    "final.json",
    "metrics.jsonl",
    "metrics.fields.json",
    "trust_ratios.jsonl",
    "divergence.jsonl",
    "bad_images.jsonl",
    "checkpoints",
    "tensorboard",
)
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1c1d; --paper: #fff; --faint: #5c6167; --line: #d5d8dc; --stripe: #f5f6f7;
  --link: #0b57d0; --open: #a63d00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181a; --faint: #a3a9b0; --line: #3a3f44;
  --stripe: #1e2124; --link: #8ab4f8; --open: #ffab70; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
a { color: var(--link); }
.faint, figcaption, .notes { color: var(--faint); font-size: .9rem; }
.notes { padding-left: 1.2rem; } .notes li, td, h3 { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .5rem; text-align: left; vertical-align: top; white-space: nowrap; }
td.wide { white-space: normal; min-width: 18rem; max-width: 30rem; }
thead th, tbody th, td.state { white-space: normal; } tbody th { min-width: 5rem; }
td.state { min-width: 8rem; max-width: 16rem; }
tr.open th { box-shadow: inset .3rem 0 var(--open); }
tr.open td.state { color: var(--open); font-weight: 600; }
thead th { border-bottom: 2px solid var(--line); } tbody tr:nth-child(even) { background: var(--stripe); }
tbody th { font-weight: 600; } .number { text-align: right; }
.plots { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; min-width: 0; } figure img { display: block; width: 100%; height: auto; max-width: 46rem; }
figcaption { margin-bottom: .3rem; } summary { cursor: pointer; }
"""
_NUMBERS = {"lr", "warm-up epochs", "epochs", "updates", "best top-1 %", "final top-1 %", "images/s", "published"}
_NUMBERS |= {"difference"}


def page(rows: Sequence[Row], folder: Path) -> str:
    """Return the page as HTML. Links are relative to `folder`, where the page is written."""
    return "\n".join(_parts(rows, folder)) + "\n"


def _parts(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    runs = [run for row in rows for run in (*row.runs, *row.repeats)]
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    # The page loads and runs nothing, whatever the files of a run contain.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>lars-train: report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<header>"
    yield f"<h1>lars-train: top-1 by batch</h1>\n<p class=faint>{_summary(runs)}</p>\n</header>\n<main>"
    yield '<section aria-labelledby="table">\n<h2 id="table">Table</h2>'
    yield _results(rows)
    items = "\n".join(f"<li>{escape(printable(note))}</li>" for note in notes(rows))
    yield f'<ul class="notes">\n{items}\n</ul>\n<p class=faint>{_links("table.md", "table.csv")}</p>\n</section>'
    yield '<section aria-labelledby="curves">\n<h2 id="curves">Curves</h2>\n<div class="plots">'
    for panel, svg in curves.panels(rows):
        yield _figure(svg, panel.title, f"{panel.title}; the table has the final values.")
    yield f"</div>\n{_bands(rows)}<p class=faint>{_links('curves.png', 'curves.svg')}</p>\n</section>"
    yield from _differences(rows)
    yield from _ratios(rows)
    yield from _runs(rows, folder)
    yield "</main>\n</body>\n</html>"


def _summary(runs: Sequence[RunRecord]) -> str:
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.state] = counts.get(run.state, 0) + 1
    states = ", ".join(f"{count} {name}" for name, count in counts.items())
    return escape(f"{counted(len(runs), 'run')}: {states}. Written by lars-train {__version__}.")


def _bands(rows: Sequence[Row]) -> str:
    if not any(len(row.runs) > 1 for row in rows):
        return ""
    return "<p class=faint>Bands: mean ± sample standard deviation over the seeds.</p>\n"


def _links(*names: str) -> str:
    return "Also as " + " and ".join(f'<a href="{quote(name)}">{escape(name)}</a>' for name in names) + "."


def _figure(svg: str, caption: str, alternative: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    image = f'<img alt="{escape(alternative)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>\n<figcaption>{escape(caption)}</figcaption>\n{image}\n</figure>"


def _results(rows: Sequence[Row]) -> str:
    """Return the table, with best top-1 and state right after the batch: the columns that fit on a phone."""
    first = [HEADER.index(name) for name in ("batch", "best top-1 %", "state")]
    order = [*first, *(i for i in range(len(HEADER)) if i not in first)]
    found = [cells(row) for row in rows]
    unfinished = {number for number, row in enumerate(rows) if row.first.state != FINISHED}
    return _table("Results", [HEADER[i] for i in order], ([line[i] for i in order] for line in found), unfinished)


def _table(
    name: str, header: Sequence[str], rows: Iterable[Sequence[str]], unfinished: Container[int] = frozenset()
) -> str:
    """Return a table in a scrolling box. Its first column has the row headers.

    `unfinished`: indices of rows to mark as unfinished.
    """
    kinds = ["number" if title in _NUMBERS else "state" if title == "state" else "" for title in header]
    head = "".join(
        f'<th scope="col"{_class(kind)}>{escape(printable(t))}</th>' for t, kind in zip(header, kinds, strict=True)
    )
    lines = []
    for number, row in enumerate(rows):
        first, *others = (escape(printable(cell)) for cell in row)
        kinds_here = [kind or ("wide" if len(cell) > 40 else "") for cell, kind in zip(others, kinds[1:], strict=True)]
        tail = "".join(f"<td{_class(kind)}>{cell}</td>" for cell, kind in zip(others, kinds_here, strict=True))
        lines.append(f'<tr{_class("open" if number in unfinished else "")}><th scope="row">{first}</th>{tail}</tr>')
    body = "\n".join(lines)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(printable(name))}">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _differences(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table of the settings that differ between rows, including values from the recipe."""
    keys = dict.fromkeys(key for row in rows for key in row.first.settings)
    values = {key: [row.first.setting(key) or NOTHING for row in rows] for key in keys}
    outside = ("run.", "recipe.rows.", "recipe.common.")
    differing = sorted(k for k, v in values.items() if len(set(v)) > 1 and not k.startswith(outside) and k != "seed")
    yield '<section aria-labelledby="configs">\n<h2 id="configs">Differing settings</h2>'
    if differing:
        header = ["key", *curves.labels(rows)]
        yield _table("Differing settings", header, ([key, *values[key]] for key in differing))
    else:
        yield "<p>None, except seeds and names.</p>"
    yield "</section>"


def _ratios(rows: Sequence[Row]) -> Iterator[str]:
    named = zip(curves.labels(rows), (read_ratios(row.first.directory) for row in rows), strict=True)
    found = [(name, ratios) for name, ratios in named if ratios is not None]
    if not found:
        return
    yield '<section aria-labelledby="ratios">\n<h2 id="ratios">Trust ratios by layer over time</h2>'
    yield "<p class=faint>First seed of each row with LARS. Blank: zero or not finite.</p>"
    yield '<div class="plots">'
    for name, ratios in found[:_MAX_HEAT_MAPS]:
        yield _figure(
            curves.heat_map(ratios),
            name,
            f"Trust ratios of {name}, by layer and update; the table below has the values.",
        )
    yield "</div>"
    for name, ratios in found[:_MAX_HEAT_MAPS]:
        table = _table(f"Trust ratios of {name}", ("layer", "first", "median", "last"), _ratio_rows(ratios))
        yield f"<details>\n<summary>{escape(name)}: values</summary>\n{table}\n</details>"
    if len(found) > _MAX_HEAT_MAPS:
        yield f"<p>{len(found) - _MAX_HEAT_MAPS} more rows have trust ratios. Report fewer runs to see them.</p>"
    yield "</section>"


def _ratio_rows(ratios: Ratios) -> Iterator[tuple[str, ...]]:
    for layer, name in enumerate(ratios.layers):
        values = [line[layer] for line in ratios.values]
        known = [value for value in values if value is not None]
        middle = statistics.median(known) if known else None
        yield (name, *(NOTHING if v is None else f"{v:.4g}" for v in (values[0], middle, values[-1])))


def _runs(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    yield '<section aria-labelledby="runs">\n<h2 id="runs">Runs and files</h2>'
    for row in rows:
        for run in (*row.runs, *row.repeats):
            yield f"<h3>{escape(printable(run.directory.name))}</h3>"
            seed = f"seed {run.setting('seed')}, " if run.setting("seed") else ""
            time = "" if run.seconds is None else f", {elapsed_time(run.seconds)}"
            time += "" if run.kwh is None else f", {format_energy(run.kwh)}"
            summary = f"{batch_name(run)}, {seed}{state(Row((run,), {}))}{time}"
            best = "" if run.best_top1 is None else f", best top-1 {run.best_top1:.2f} %"
            yield f"<p>{escape(printable(summary + best))}<br>{_file_links(run, folder)}</p>"
            if run.versions:
                yield f"<p class=faint>{escape(printable(' / '.join(map(as_line, run.versions))))}</p>"
    yield "</section>"


def _file_links(run: RunRecord, folder: Path) -> str:
    existing = [name for name in _FILES if (run.directory / name).exists()]
    base = relative_path(run.directory, folder)
    # `quote` escapes colons, so that a relative path is never read as a URL scheme.
    return " · ".join(f'<a href="{quote(f"{base}/{name}", errors="surrogateescape")}">{name}</a>' for name in existing)
