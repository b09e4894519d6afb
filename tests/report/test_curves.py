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

Made = Callable[..., Path]
EPOCHS, UPDATES, TIME, LOSS = curves.PANELS


def rows(*directories: Path) -> list[Row]:
    return make_rows([read_run(directory) for directory in directories])


def test_a_curve_is_the_mean_over_seeds_with_their_deviation_where_all_have_values(made: Made) -> None:
    one, other = made("a", top1=(10.0, 20.0, 30.0)), made("b", top1=(16.0, 20.0, 31.0), seed=1)
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(line for line in lines if '"epoch": 2.0' not in line))
    (row,) = rows(one, other)
    found = curves.curve(row, EPOCHS)
    assert found is not None
    assert (found.x, found.mean) == ([1.0, 3.0], [13.0, 30.5])
    assert found.deviation == pytest.approx([statistics.stdev((10, 16)), statistics.stdev((30, 31))])
    assert [curves.curve(row, panel).x for panel in (UPDATES, TIME)] == [[4.0, 12.0], [40.0, 120.0]]  # type: ignore[union-attr]


def test_a_single_run_has_no_band_and_one_without_times_none_of_time(made: Made) -> None:
    directory = made("a")
    text = (directory / "metrics.jsonl").read_text()
    (directory / "metrics.jsonl").write_text(text.replace('"run/seconds"', '"other"'))
    (row,) = rows(directory)
    assert curves.curve(row, TIME) is None
    found = curves.curve(row, EPOCHS)
    assert found is not None
    assert found.deviation is None


def test_a_seed_without_a_log_leaves_the_curve_to_the_others(made: Made) -> None:
    one, other = made("a"), made("b", seed=1)
    (other / "metrics.jsonl").unlink()
    (row,), (alone,) = rows(one, other), rows(one)
    assert len(row.runs) == 2
    assert curves.curve(row, EPOCHS) == curves.curve(alone, EPOCHS) is not None


def test_a_long_log_is_drawn_by_means_of_neighbours(made: Made) -> None:
    directory = made("a", top1=[float(k % 2) for k in range(1000)])
    (row,) = rows(directory)
    found = curves.curve(row, EPOCHS)
    assert found is not None
    assert len(found.x) == 250
    assert set(found.mean) == {0.5}
    assert found.x[0] == statistics.mean((1, 2, 3, 4))


def test_rows_of_one_experiment_have_one_colour_and_others_another(made: Made) -> None:
    found = rows(made("a", "8k"), made("b", "8k", ended=None), made("c"), made("d", optimizer__lr=1.0))
    assert curves.labels(found) == ["8k", "8k (unfinished)", "32k", "32k (lr 1.0)"]
    assert [look.style for look in curves._looks(found)] == [0, 0, 1, 2]


def test_no_two_rows_are_called_alike_and_none_at_length(made: Made) -> None:
    many = {f"data__key{n}": n for n in range(20)}
    found = rows(made("a", "8k"), made("b", ended=None), made("c", ended=None), made("d", **many))
    told = curves.labels(found)
    assert len(set(told)) == 4
    assert told[1] == "32k (run d)"
    alike = rows(made("e", ended=None), made("f", ended=None))
    assert curves.labels(alike) == [f"32k (unfinished, run {name})" for name in "ef"]
    assert max(map(len, told)) < 60
    # As different as their names: in colour, marker and line, and in the table.
    assert [look.style for look in curves._looks(alike)] == [0, 1]
    assert [row.differs for row in alike] == [{"run": "e"}, {"run": "f"}]
    assert not [note for note in notes(alike) if "differ in more" in note]
    long = rows(*(made(f"g{n}{'x' * 60}", ended=None) for n in (1, 2)))
    assert curves.labels(long) == [f"32k (unfinished, row {n} of the table)" for n in (1, 2)]


@pytest.mark.parametrize("top1", [(88.1, 88.2, 88.3), (100.0,)])
def test_no_marker_is_cut_at_the_edge_of_its_axes(made: Made, top1: tuple[float, ...]) -> None:
    figure = Figure(figsize=(4.6, 3.5))
    for number, panel in enumerate(curves.PANELS[:3], 1):
        curves._draw(axes := figure.add_subplot(1, 3, number), rows(made(f"a{number}", top1=top1)), panel)
        bottom, top = axes.get_ylim()
        assert bottom == 0
        assert top >= 1.04 * max(top1)


def test_of_what_differs_in_much_the_optimizer_and_its_rate_are_told_where_they_are_enough(made: Made) -> None:
    much = {"optimizer__name": "sgd", "optimizer__weight_decay": 0.00012345, "schedule__warmup_epochs": 1.66667}
    runs = [made("lars"), *(made(f"sgd{lr}", optimizer__lr=lr, **much) for lr in (1.5, 2.5))]
    sgd = ["32k (optimizer sgd, lr 1.5)", "32k (optimizer sgd, lr 2.5)"]
    assert curves.labels(rows(*runs)) == ["32k", *sgd]
    other = made("other", optimizer__lr=2.5, **{**much, "schedule__warmup_epochs": 2.66667})
    assert curves.labels(rows(*runs, other)) == ["32k", sgd[0], "32k (run sgd2.5)", "32k (run other)"]


def luminance(colour: str) -> float:
    """Relative luminance (https://www.w3.org/TR/WCAG21/#dfn-relative-luminance)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_colour_comes_with_a_marker_and_a_line_of_its_own_and_is_seen_on_white_and_on_black() -> None:
    assert len(set(curves.COLORS)) == len(set(curves.MARKERS)) == len(set(map(str, curves.LINES))) == 7
    for colour in curves.COLORS:
        on_white, on_dark = (
            1.05 / (luminance(colour) + 0.05),
            (luminance(colour) + 0.05) / (luminance("#16181a") + 0.05),
        )
        assert min(on_white, on_dark) > 2


def test_both_pictures_are_whole_the_same_each_time_and_show_all_rows(made: Made) -> None:
    found = rows(made("a", "8k"), made("b", seed=1), made("c", seed=2), made("d", ended="failed", reason="x"))
    pictures = curves.overview(found)
    with Image.open(io.BytesIO(pictures["png"])) as png:
        png.load()
        assert png.size[0] >= 1200
    text = pictures["svg"].decode()
    ElementTree.fromstring(text)
    for part in ("8k", "32k (mean of 2 seeds)", "32k (failed)", "Top-1 against updates", "training loss (nats)"):
        assert part in text
    assert curves.overview(found)["svg"] == pictures["svg"]


def test_names_that_mean_something_to_a_typesetter_or_a_browser_are_shown_as_they_are(made: Made) -> None:
    evil = r"$\frac{$</text><script>x</script>"
    found = rows(made("a", batch__size=evil))
    pictures = [curves.overview(found)["svg"].decode(), *(svg for _, svg in curves.panels(found))]
    for text in pictures:
        shown = "".join(ElementTree.fromstring(text).itertext())
        assert evil in shown
        assert "<script" not in text


def test_rows_without_a_single_value_are_drawn_as_nothing(made: Made) -> None:
    directory = made("a", ended=None)
    (directory / "metrics.jsonl").unlink()
    found = rows(directory)
    assert list(curves.panels(found)) == []
    assert curves.overview(found)["png"]


def test_a_loss_without_bounds_leaves_the_others_visible(made: Made) -> None:
    wild = made("b", top1=(1.0, 60.0), seed=1, optimizer__lr=9.0)
    text = (wild / "metrics.jsonl").read_text()
    (wild / "metrics.jsonl").write_text(text.replace('"train/loss": 1.0', '"train/loss": 1e14'))
    # A top-1 that grows from next to nothing is no such case.
    pictures = {panel.title: svg for panel, svg in curves.panels(rows(made("a", top1=(1.0, 60.0)), wild))}
    assert [("cut off" in svg) for svg in pictures.values()] == [False, False, False, True]


@pytest.mark.parametrize(
    ("layers", "values"),
    [
        (("a", "b"), ((1.0, 0.001), (0.5, None))),
        (("a",), ((1.0,),)),
        (("a",), ((None,), (0.0,), (-1.0,))),
        (tuple(f"layer{n}" for n in range(300)), (tuple([0.1] * 300),) * 3),
    ],
)
def test_trust_ratios_are_drawn_whatever_they_are(
    layers: tuple[str, ...], values: tuple[tuple[float | None, ...], ...]
) -> None:
    svg = curves.heat_map(Ratios(layers, tuple(range(1, len(values) + 1)), values))
    shown = "".join(ElementTree.fromstring(svg).itertext())
    assert layers[0] in shown
    assert "prefers-color-scheme:dark" in svg
