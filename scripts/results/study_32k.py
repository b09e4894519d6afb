"""Find what closes the gap between batch 256 and the 32K row at reduced scale, and in how many epochs.

    python scripts/results/study_32k.py --data cifar10_jpeg.zip --write docs/results/study_32k
    python scripts/results/study_32k.py --data cifar10_jpeg.zip --write quick --quick

`--data`: a folder or .zip of small images with train/ and test/ (or val/), or a set that torchvision downloads, cifar10
or fashion_mnist. `--write`: the folder for the page, the plots, and the record of each run, written when it ends. The
same command resumes after an interruption, and does not train a run again that has a record.

1. Choices: changes of the 32K row, one at a time, and other optimizers and recipes, one run each, evaluated on a
   held-out tenth of the training images. The test images are not read.
2. Together: the best of each kind that gains at least 0.2 points, in one run on the held-out images. If a single
   change is better, that one is taken. Then the 32K row on the test images with five seeds, batch 256 with the same
   methods with three, and 64K with three, whose learning rate is the better of two on held-out images.
3. Sooner: the same settings in 10, 15 and 20 epochs, on the test images, and with three seeds in the fewest epochs in
   which the first seed reaches 79.0 %; beside them the recipe and SGD with a tuned learning rate.

All runs share network, data, batch by the scaled rule, and precision. Batch 256 has the best learning rate of
docs/results/scaled.

Takes three to five hours on two quiet cores, with --quick ten minutes. Figures: docs/results.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from scaled_report import STYLE, spread
from study_runs import Study, add_data, add_write

MARKER = "study"
EPOCHS, QUICK_EPOCHS = 30, 2
MARGIN = 0.2
"""Points that a change must gain on the held-out images. Seeds of the same settings differ by more."""
TARGET = 79.0
LENGTHS = (10, 15, 20)
SEEDS_32K, SEEDS_256, SEEDS_64K, SEEDS_LENGTH = 5, 3, 3, 3
# Updates of an epoch of the 32K row and of batch 256, and the first one's average of the weights: over 100 updates, or
# 2.6 epochs. Batch 256 averages over as many epochs.
UPDATES_32K, UPDATES_256, EMA_32K = 39, 5000, 0.99
EMA_256 = 1 - (1 - EMA_32K) * UPDATES_32K / UPDATES_256
LR_FACTORS_64K = (1.0, math.sqrt(2.0))
"""Learning rates that are tried at 64K, as factors of the one at 32K."""


@dataclass(frozen=True)
class Change:
    """A change of the 32K row.

    At most one change of each `kind` is part of the combination. `at_256`: the settings with the same effect at batch
    256, empty for what concerns LARS or the warm-up, which batch 256 does not have.
    """

    name: str
    kind: str
    settings: tuple[str, ...]
    at_256: tuple[str, ...] = ()


# Optimizers and whole recipes, which take the place of the recipe torchlars.
BASE = "optimizer"
RECIPE = Change("recipe", BASE, ())
# The learning rate is the best for the 32K row in docs/results/scaled, as is the weight decay of the recipe's SGD.
SGD = Change("sgd", BASE, ("optimizer=sgd", "optimizer.weight_decay=1e-4", "optimizer.lr=3.2"))
# The schedule that Nado et al. 2021 publish for Nesterov momentum could not be verified. This is SGD's.
NESTEROV = Change("nesterov", BASE, (*SGD.settings, "optimizer.nesterov=true"), ("optimizer.nesterov=true",))
# The ratio of a step with momentum is lower than that of a gradient, so that twice the rate moves weights about as far.
STEP = Change("ratio-of-step", BASE, ("optimizer.ratio_of=step", "optimizer.lr=58"))
# With the ghost batch of all other runs, because theirs, 128, belongs to other numbers of images.
WHOLE = tuple(
    Change(name, BASE, (f"recipe={name}", "model.ghost_batch=32"), ("label_smoothing=0.1",))
    for name in ("lamb", "nus", "mlperf")
)
"""Recipes whose methods and hyper-parameters belong together: of the changes, only the average joins them."""
OF_LARS = ("weight decay", "lr placement")
"""Kinds that were measured with the recipe's LARS, and are not combined with other optimizers."""
CHANGES = (
    RECIPE,
    Change("ema", "average", (f"model.ema={EMA_32K}",), (f"model.ema={EMA_256:.6f}",)),
    Change("label-smoothing", "loss", ("label_smoothing=0.1",), ("label_smoothing=0.1",)),
    Change("cosine", "decay", ("schedule.form=cosine",), ("schedule.form=cosine",)),
    Change("decay-1e-4", "weight decay", ("optimizer.weight_decay=1e-4",)),
    Change("decay-2e-4", "weight decay", ("optimizer.weight_decay=2e-4",)),
    # Shares of the run; the recipe's are 5.6 %.
    Change("warmup-3", "warm-up", ("warmup=0.03",)),
    Change("warmup-8", "warm-up", ("warmup=0.08",)),
    Change("ghost-16", "ghost batch", ("model.ghost_batch=16",)),
    Change("ghost-64", "ghost batch", ("model.ghost_batch=64",)),
    Change("lr-inside", "lr placement", ("optimizer.lr_placement=inside",)),
    STEP,
    NESTEROV,
    *WHOLE,
)


@dataclass(frozen=True)
class Run:
    """A run: the name of its folder, without the seed, and its settings."""

    title: str
    row: tuple[str, ...]
    epochs: int
    seed: int = 0
    held_out: bool = False

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{'choice' if self.held_out else 'test'}-{self.title}-epochs{self.epochs}-seed{self.seed}"

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings of the run, besides those that all runs of the study share."""
        row = [_warmup(setting, self.epochs) for setting in self.row]
        holdout = ("data.holdout=0.1",) if self.held_out else ()
        log_every = UPDATES_256 if "batch=256" in row else UPDATES_32K
        return (*row, *holdout, f"epochs={self.epochs}", f"seed={self.seed}", f"log_every={log_every}")


def _warmup(setting: str, epochs: int) -> str:
    """Replace ``warmup=SHARE`` by the epochs of a run's warm-up."""
    key, _, share = setting.partition("=")
    return f"schedule.warmup_epochs={float(share) * epochs:g}" if key == "warmup" else setting


def at_32k(title: str, changes: Sequence[Change], epochs: int, seed: int = 0, *, held_out: bool = False) -> Run:
    """Return a run of the 32K row with these changes."""
    row = ("batch=32k", *(setting for change in changes for setting in change.settings))
    return Run(f"32k-{title}", row, epochs, seed, held_out)


def choices(epochs: int) -> list[Run]:
    """Return the runs of the first part, in the order of `CHANGES`."""
    return [at_32k(change.name, [change], epochs, held_out=True) for change in CHANGES]


def combine(top1: Mapping[str, float]) -> list[Change]:
    """Return the best changes of each kind that gain at least `MARGIN` points. `top1` by name, held out.

    Some kinds exclude each other (`WHOLE`, `OF_LARS`). Of the possible combinations, the one with the largest sum of
    gains is returned.
    """
    gains = {
        change: gain
        for change in CHANGES
        if (gain := top1.get(change.name, -math.inf) - top1[RECIPE.name]) >= MARGIN or change is RECIPE
    }

    def joined(base: Change) -> list[Change]:
        kinds = {"average"} if base in WHOLE else {change.kind for change in gains} - {BASE}
        if base is not RECIPE:
            kinds -= set(OF_LARS)
        own = [[change for change in gains if change.kind == kind] for kind in kinds]
        best = [max(changes, key=lambda change: gains[change]) for changes in own if changes]
        return [change for change in CHANGES if change in best or (change is base and change is not RECIPE)]

    bases = [change for change in gains if change.kind == BASE]
    return max(map(joined, bases), key=lambda changes: sum(gains[change] for change in changes))


def together(
    study: Study, epochs: int, top1: Mapping[str, float], beside: Sequence[Run]
) -> tuple[list[Change], list[str]]:
    """Return the best combination by the held-out images: `combine`'s, or the best single change, or nothing.

    Also returns the top-1 of what was compared, for the page.

    `beside`: runs of the third part that need no choice, so that no core waits.
    """
    combination = combine(top1)
    best = max(CHANGES, key=lambda change: top1.get(change.name, -math.inf))
    if len(combination) > 1:
        run = at_32k("together", combination, epochs, held_out=True)
        study.train([run, *beside])
        found = study.outcome(run).get("final_top1", -math.inf)
        compared = [f"{names(combination)} together: {found:.2f}", f"{best.name} alone: {top1[best.name]:.2f}"]
        return (combination if found >= top1[best.name] else [best]), compared
    return [] if best is RECIPE else [best], []


def names(changes: Sequence[Change]) -> str:
    """Return the names of changes as a list in words."""
    return ", ".join(change.name for change in changes) or "nothing"


def rows_of_table(
    study: Study, changes: Sequence[Change], epochs: int, *, quick: bool
) -> tuple[dict[str, list[Run]], list[str]]:
    """Train the second part. Return its runs by row, and the held-out top-1 of the learning rates tried at 64K."""
    seeds_32k, seeds_256, seeds_64k = (1, 1, 1) if quick else (SEEDS_32K, SEEDS_256, SEEDS_64K)
    small = ("batch=256", "optimizer.lr=0.1", *(setting for change in changes for setting in change.at_256))
    large = [at_32k("together", changes, epochs, seed) for seed in range(seeds_32k)]
    reference = [Run("256-together", small, epochs, seed) for seed in range(seeds_256)]
    # The longest runs first.
    study.train([*reference, *large])
    lr_32k = study.outcome(large[0]).get("lr", math.nan)
    own = [s for change in changes for s in change.settings if not s.startswith("optimizer.lr=")]

    def at_64k(factor: float, seed: int = 0, *, held_out: bool = False) -> Run:
        row = ("batch=32k", "batch.size=65536", "batch.scaled=true", f"optimizer.lr={lr_32k * factor:.3g}", *own)
        return Run(f"64k-together-{factor:.3g}-times-lr", row, epochs, seed, held_out)

    tried = [at_64k(factor, held_out=True) for factor in LR_FACTORS_64K]
    study.train(tried)
    top1 = [study.outcome(run).get("final_top1", -math.inf) for run in tried]
    factor = LR_FACTORS_64K[top1.index(max(top1))]
    largest = [at_64k(factor, seed) for seed in range(seeds_64k)]
    study.train(largest)
    compared = [
        f"64K, lr {lr_32k * factor:.3g}: {found:.2f}" for factor, found in zip(LR_FACTORS_64K, top1, strict=True)
    ]
    return {"256": reference, "32K": large, "64K": largest}, compared


def at_lengths(title: str, changes: Sequence[Change], epochs: int, *, quick: bool) -> list[Run]:
    """Return runs of the 32K row with these changes, in fewer epochs and in all."""
    return [at_32k(title, changes, length) for length in (*((1,) if quick else LENGTHS), epochs)]


def sooner(study: Study, changes: Sequence[Change], epochs: int, *, quick: bool) -> list[Run]:
    """Train the third part: with one seed, and with more in the fewest epochs to `TARGET`. Return its runs."""
    first = at_lengths("together", changes, epochs, quick=quick)
    study.train(first)
    answer = next((run for run in first if study.outcome(run).get("final_top1", 0.0) >= TARGET), None)
    if answer is not None and answer.epochs < epochs:
        more = [at_32k("together", changes, answer.epochs, seed) for seed in range(1, SEEDS_LENGTH)]
        study.train(more)
        first += more
    return first


# The page


def difference(values: Sequence[float], baseline: Sequence[float]) -> str:
    """Format the difference of two means with its standard error, the root of the sum of variances over seeds."""
    if not values or not baseline:
        return ""
    text = f"{fmean(values) - fmean(baseline):+.2f}"
    if min(len(values), len(baseline)) < 2:
        return text
    return f"{text} ± {math.sqrt(sum(stdev(own) ** 2 / len(own) for own in (values, baseline))):.2f}"


def choice_table(top1: Mapping[str, float], epochs: int) -> list[str]:
    """Return the table of the first part."""
    rows = []
    for change in CHANGES:
        own = top1.get(change.name)
        gain = "" if change is RECIPE or own is None else f"{own - top1[RECIPE.name]:+.2f}"
        settings = " ".join(_warmup(setting, epochs) for setting in change.settings)
        rows.append(
            [change.name, change.kind, settings and f"`{settings}`", "diverged" if own is None else f"{own:.2f}", gain]
        )
    return shared.table(["change", "kind", "settings", "top-1 %, held out", "gain"], rows)


def result_table(study: Study, table: Mapping[str, Sequence[Run]]) -> list[str]:
    """Return the table of the second part."""
    found = {name: _top1(study, runs) for name, runs in table.items()}
    baseline = next(iter(found.values()))
    rows = []
    for name, own in found.items():
        final = study.outcome(table[name][0])
        gap = "" if own is baseline else difference(own, baseline)
        rows.append(
            [
                name,
                final.get("global_batch", ""),
                f"{final.get('lr', math.nan):g}",
                len(own),
                spread(own, len(table[name]) - len(own)),
                gap,
            ]
        )
    heads = ["row", "images", "lr", "seeds", "top-1 %, test", "minus 256, with standard error"]
    return shared.table(heads, rows)


def sooner_table(study: Study, runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """Return the table of the third part: top-1 by method and epochs."""
    lengths = sorted({run.epochs for own in runs.values() for run in own})
    rows = []
    for name, own in runs.items():
        by_length = [[run for run in own if run.epochs == length] for length in lengths]
        found = [_top1(study, some) for some in by_length]
        rows.append([name, *(spread(top1, len(some) - len(top1)) for some, top1 in zip(by_length, found, strict=True))])
    return shared.table(["top-1 %, test", *(f"epochs={length}" for length in lengths)], rows)


def _top1(study: Study, runs: Sequence[Run]) -> list[float]:
    return [final["final_top1"] for run in runs if (final := study.outcome(run))]


def draw(study: Study, runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Plot top-1 over images and over minutes as PATH.svg and PATH.png: a curve per run of the first seed.

    Minutes are images over the rate of the method's fastest run, because other programs slowed some of the runs.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from lars_train.report.read import read_run

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for (name, own), color in zip(runs.items(), ("#D55E00", "#0072B2", "#000000"), strict=True):
            records = [read_run(study.place(run)) for run in own if run.seed == 0]
            rate = max((record.images_per_s or 0.0 for record in records), default=0.0)
            for number, record in enumerate(records):
                images = [point.epoch * (record.samples or 0) / 1e6 for point in record.top1]
                top1 = [point.value for point in record.top1]
                for axes, xs in ((left, images), (right, [x * 1e6 / rate / 60 for x in images] if rate else [])):
                    if xs:
                        axes.plot(xs, top1, color=color, linewidth=1, label=None if number else name)
                        axes.plot(xs[-1:], top1[-1:], "o", color=color)
        lowest = min(line.get_ydata()[-1] for line in left.lines) if left.lines else 0.0
        left.set(xlabel="million images", ylabel="top-1 on test images (%)", ylim=(max(0.0, lowest - 5), None))
        right.set(xlabel="minutes on one core")
        for axes in (left, right):
            axes.axhline(TARGET, color="#999999", linestyle=":", linewidth=1)
            axes.grid(alpha=0.3)
        left.legend(loc="lower right")
        shared.save_figure(figure, path)


def draw_gap(study: Study, top1: Mapping[str, float], table: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Plot the gain of each change on held-out images, and top-1 of each seed on test images by row.

    Changes that lose more than 1.5 points are at the left edge. A bar is the mean of a row with its standard error.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        gains = sorted((top1.get(change.name, -math.inf) - top1[RECIPE.name], change.name) for change in CHANGES[1:])
        left.plot([max(gain, -1.5) for gain, _ in gains], [name for _, name in gains], "o", color="#D55E00")
        left.axvline(0, color="#999999", linestyle=":", linewidth=1)
        left.set(xlabel="points gained on held-out images, one run each", xlim=(-1.6, None))
        for place, runs in enumerate(table.values()):
            own = _top1(study, runs)
            right.plot([place] * len(own), own, "o", color="#0072B2")
            if len(own) > 1:
                error = stdev(own) / math.sqrt(len(own))
                right.errorbar([place + 0.15], [fmean(own)], [error], fmt="_", color="#000000", capsize=3)
        right.set(ylabel="top-1 on test images (%)", xticks=range(len(table)), xticklabels=list(table))
        right.set(xlabel="batch: seeds, and their mean with its standard error")
        for axes in (left, right):
            axes.grid(alpha=0.3)
        shared.save_figure(figure, path)


def main() -> None:
    """Train the three parts; write each table when its runs have finished."""
    parser = shared.make_parser(__doc__)
    add_data(parser)
    add_write(parser, "What closes the gap at 32K", MARKER, required=True)
    parser.add_argument("--quick", action="store_true", help="two epochs and one seed: the shape, not the figures")
    args = parser.parse_args()
    epochs = QUICK_EPOCHS if args.quick else EPOCHS
    name = f"study-{Path(args.data).stem}{'-quick' if args.quick else ''}"
    study = Study(args.data, Path("runs") / name, records=args.write / "runs")
    first = choices(epochs)
    study.train(first)
    top1 = {
        change.name: final["final_top1"]
        for change, run in zip(CHANGES, first, strict=True)
        if (final := study.outcome(run))
    }
    if RECIPE.name not in top1:
        sys.exit("The recipe diverged: nothing to compare with.")
    lines = [f"`{shared.command_line(__file__)} --write {args.write}` on {shared.cpu_name()}, {shared.software()}."]

    def publish(title: str, *section: str) -> None:
        lines.extend(("", f"## {title}", "", *section))
        shared.write_page(lines, args.write / "README.md", MARKER)

    once = f"Runs of {epochs} epochs, one for each row."
    publish("What helps at 32K", once, "", *choice_table(top1, epochs))
    peers = {
        "LARS, the recipe": at_lengths("recipe", [RECIPE], epochs, quick=args.quick),
        "SGD, tuned": at_lengths("sgd", [SGD], epochs, quick=args.quick),
    }
    beside = [run for runs in peers.values() for run in runs]
    changes, compared = together(study, epochs, top1, beside)
    table, rates = rows_of_table(study, changes, epochs, quick=args.quick)
    tried = f"Compared on held-out images: {'; '.join([*compared, *rates])}."
    publish("Against batch 256", f"With {names(changes)}, {epochs} epochs.", "", tried, "", *result_table(study, table))
    draw_gap(study, top1, table, args.write / "gap")
    study.train(beside)
    short = {"LARS, with what helps": sooner(study, changes, epochs, quick=args.quick), **peers}
    publish("Sooner", "One seed, or mean and standard deviation.", "", *sooner_table(study, short))
    draw(study, short, args.write / "sooner")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
