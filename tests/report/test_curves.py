from __future__ import annotations

import io
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from lars_train.report import curves
from lars_train.report.compare import Row, make_rows
from lars_train.report.read import Ratios, read_run
from lars_train.report.table import notes

MakeRun = Callable[..., Path]
EPOCHS, UPDATES, TIME, LOSS = curves.PANELS


def rows(*directories: Path) -> list[Row]:
    return make_rows([read_run(directory) for directory in directories])


def test_a_curve_is_mean_and_deviation_at_common_updates(make_run: MakeRun) -> None:
    one, other = make_run("a", top1=(10.0, 20.0, 30.0)), make_run("b", top1=(16.0, 20.0, 31.0), seed=1)
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(line for line in lines if '"epoch": 2.0' not in line))
    (row,) = rows(one, other)
    found = curves.curve(row, EPOCHS)
    assert found is not None
    assert (found.x, found.mean) == ([1.0, 3.0], [13.0, 30.5])
    assert found.deviation == pytest.approx([statistics.stdev((10, 16)), statistics.stdev((30, 31))])
    assert [curves.curve(row, panel).x for panel in (UPDATES, TIME)] == [[4.0, 12.0], [40.0, 120.0]]  # type: ignore[union-attr]


def test_a_single_run_has_no_band_and_may_lack_times(make_run: MakeRun) -> None:
    directory = make_run("a")
    text = (directory / "metrics.jsonl").read_text()
    (directory / "metrics.jsonl").write_text(text.replace('"run/seconds"', '"other"'))
    (row,) = rows(directory)
    assert curves.curve(row, TIME) is None
    found = curves.curve(row, EPOCHS)
    assert found is not None
    assert found.deviation is None


def test_a_seed_without_a_log_does_not_change_the_curve(make_run: MakeRun) -> None:
    one, other = make_run("a"), make_run("b", seed=1)
    (other / "metrics.jsonl").unlink()
    (row,), (alone,) = rows(one, other), rows(one)
    assert len(row.runs) == 2
    assert curves.curve(row, EPOCHS) == curves.curve(alone, EPOCHS) is not None


def test_a_long_log_is_thinned_by_averaging(make_run: MakeRun) -> None:
    directory = make_run("a", top1=[float(k % 2) for k in range(1000)])
    (row,) = rows(directory)
    found = curves.curve(row, EPOCHS)
    assert found is not None
    assert len(found.x) == 250
    assert set(found.mean) == {0.5}
    assert found.x[0] == statistics.mean((1, 2, 3, 4))


def test_rows_of_one_experiment_share_a_color(make_run: MakeRun) -> None:
    found = rows(make_run("a", "8k"), make_run("b", "8k", ended=None), make_run("c"), make_run("d", optimizer__lr=1.0))
    assert curves.labels(found) == ["8k", "8k (unfinished)", "32k", "32k (lr 1.0)"]
    assert [look.style for look in curves._looks(found)] == [0, 0, 1, 2]


def test_labels_are_short_and_unique(make_run: MakeRun) -> None:
    many = {f"data__key{n}": n for n in range(20)}
    found = rows(make_run("a", "8k"), make_run("b", ended=None), make_run("c", ended=None), make_run("d", **many))
    labels = curves.labels(found)
    assert len(set(labels)) == 4
    assert labels[1] == "32k (run d)"
    alike = rows(make_run("e", ended=None), make_run("f", ended=None))
    assert curves.labels(alike) == [f"32k (unfinished, run {name})" for name in "ef"]
    assert max(map(len, labels)) < 60
    # Color, marker, line and the table distinguish them, too.
    assert [look.style for look in curves._looks(alike)] == [0, 1]
    assert [row.differs for row in alike] == [{"run": "e"}, {"run": "f"}]
    assert not [note for note in notes(alike) if "differ in more" in note]
    long = rows(*(make_run(f"g{n}{'x' * 60}", ended=None) for n in (1, 2)))
    assert curves.labels(long) == [f"32k (unfinished, row {n} of the table)" for n in (1, 2)]


@pytest.mark.parametrize("top1", [(88.1, 88.2, 88.3), (100.0,)])
def test_no_marker_is_cut_off_by_the_axes(make_run: MakeRun, top1: tuple[float, ...]) -> None:
    figure = Figure(figsize=(4.6, 3.5))
    for number, panel in enumerate(curves.PANELS[:3], 1):
        curves._draw(axes := figure.add_subplot(1, 3, number), rows(make_run(f"a{number}", top1=top1)), panel)
        bottom, top = axes.get_ylim()
        assert bottom == 0
        assert top >= 1.04 * max(top1)


def test_labels_of_many_differences_show_optimizer_and_lr(make_run: MakeRun) -> None:
    much = {"optimizer__name": "sgd", "optimizer__weight_decay": 0.00012345, "schedule__warmup_epochs": 1.66667}
    runs = [make_run("lars"), *(make_run(f"sgd{lr}", optimizer__lr=lr, **much) for lr in (1.5, 2.5))]
    sgd = ["32k (optimizer sgd, lr 1.5)", "32k (optimizer sgd, lr 2.5)"]
    assert curves.labels(rows(*runs)) == ["32k", *sgd]
    other = make_run("other", optimizer__lr=2.5, **{**much, "schedule__warmup_epochs": 2.66667})
    assert curves.labels(rows(*runs, other)) == ["32k", sgd[0], "32k (run sgd2.5)", "32k (run other)"]


def luminance(color: str) -> float:
    """Relative luminance (https://www.w3.org/TR/WCAG21/#dfn-relative-luminance)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colors_have_distinct_markers_and_lines_and_contrast() -> None:
    assert len(set(curves.COLORS)) == len(set(curves.MARKERS)) == len(set(map(str, curves.LINES))) == 7
    for color in curves.COLORS:
        on_white, on_dark = (
            1.05 / (luminance(color) + 0.05),
            (luminance(color) + 0.05) / (luminance("#16181a") + 0.05),
        )
        assert min(on_white, on_dark) > 2


def test_the_overview_is_reproducible_and_shows_all_rows(make_run: MakeRun) -> None:
    found = rows(
        make_run("a", "8k"), make_run("b", seed=1), make_run("c", seed=2), make_run("d", ended="failed", reason="x")
    )
    files = curves.overview(found)
    with Image.open(io.BytesIO(files["png"])) as png:
        png.load()
        assert png.size[0] >= 1200
    text = files["svg"].decode()
    ElementTree.fromstring(text)
    for part in ("8k", "32k (mean of 2 seeds)", "32k (failed)", "Top-1 against updates", "training loss (nats)"):
        assert part in text
    assert curves.overview(found)["svg"] == files["svg"]


def test_names_with_markup_are_shown_literally(make_run: MakeRun) -> None:
    evil = r"$\frac{$</text><script>x</script>"
    found = rows(make_run("a", batch__size=evil))
    svgs = [curves.overview(found)["svg"].decode(), *(svg for _, svg in curves.panels(found))]
    for text in svgs:
        shown = "".join(ElementTree.fromstring(text).itertext())
        assert evil in shown
        assert "<script" not in text


def test_rows_without_values_draw_nothing(make_run: MakeRun) -> None:
    directory = make_run("a", ended=None)
    (directory / "metrics.jsonl").unlink()
    found = rows(directory)
    assert list(curves.panels(found)) == []
    assert curves.overview(found)["png"]


def test_an_exploding_loss_leaves_others_visible(make_run: MakeRun) -> None:
    wild = make_run("b", top1=(1.0, 60.0), seed=1, optimizer__lr=9.0)
    text = (wild / "metrics.jsonl").read_text()
    (wild / "metrics.jsonl").write_text(text.replace('"train/loss": 1.0', '"train/loss": 1e14'))
    # A top-1 that grows from nearly zero is not limited.
    svgs = {panel.title: svg for panel, svg in curves.panels(rows(make_run("a", top1=(1.0, 60.0)), wild))}
    assert [("cut off" in svg) for svg in svgs.values()] == [False, False, False, True]


@pytest.mark.parametrize(
    ("layers", "values"),
    [
        (("a", "b"), ((1.0, 0.001), (0.5, None))),
        (("a",), ((1.0,),)),
        (("a",), ((None,), (0.0,), (-1.0,))),
        (tuple(f"layer{n}" for n in range(300)), (tuple([0.1] * 300),) * 3),
    ],
)
def test_any_trust_ratios_can_be_drawn(layers: tuple[str, ...], values: tuple[tuple[float | None, ...], ...]) -> None:
    svg = curves.heat_map(Ratios(layers, tuple(range(1, len(values) + 1)), values))
    shown = "".join(ElementTree.fromstring(svg).itertext())
    assert layers[0] in shown
    assert "prefers-color-scheme:dark" in svg
