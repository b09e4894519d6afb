"""Each recipe's rows, and the optimizer built from them, against numbers computed by hand from the source's formulas.

Sources and formulas: configs/recipe/*.yaml. W and I are a row's updates in the warm-up and in the run, b its lr:

- torchlars: b (u + 1)/W, then b (1 - u/I)^2
- mlperf: b u/W up to and including u = W, then (b - e)(1 - (u - W)/D)^2 + e, e = 0.0001, D = I - W + 1
- mlperf, rows of NVIDIA's program: b (u + 1)/W, then (b - e)(1 - (u - W)/(I - W))^2 + e
- nus: b u/W, then b (1 - (u - W)/(I - W))^2
- lamb: b u/W, then b (1 - (u - W)/(I - W))
- ffcv: c + (b - c) u/W, c = b/10^4, then b (1 - (u - W)/(I - W))
- rsb: c + (b - c) u/W, c = 0.0001, then e + (b - e)(1 + cos(pi (u - W)/(I - W)))/2, e = 10^-6
- goyal: 0.1 + (b - 0.1) u/W, then b/10^n, where n of the epochs 30, 60 and 80 have passed
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, fields
from functools import lru_cache
from typing import Any, get_type_hints

import pytest
import torch
from omegaconf import OmegaConf
from resolving import resolved
from tiny import composed
from torch import Tensor, nn

from lars_train.config import Config, config_dir, lacks, nominal_batch, published_top1, resolve
from lars_train.config.lars_options import LARS_OPTIONS, options_of
from lars_train.config.recipe_schema import RowConfig
from lars_train.config.schema import OptimizerConfig
from lars_train.data.inventory import Inventory
from lars_train.errors import ConfigError
from lars_train.models.factory import build_model
from lars_train.monitoring.summary import experiment_lines
from lars_train.optim.lars import LARS
from lars_train.optim.options import DEFAULTS, PRESETS, Options
from lars_train.optim.rule import Rule
from lars_train.run_plan import describe_decay, make_plan, make_schedule
from lars_train.training.assemble import build_optimizer

IMAGES = 1_281_167

# Updates in the run and in the warm-up; lr of five updates, counted from 0.
RATES: dict[tuple[str, str], tuple[int, int, dict[int, float]]] = {
    ("torchlars", "256"): (450360, 0, {0: 0.2, 45036: 0.162, 112590: 0.1125, 225180: 0.05, 450359: 9.860759683497e-13}),
    ("torchlars", "8k"): (
        14040,
        780,
        {
            0: 0.01641025641026,
            390: 6.416410256410,
            780: 11.41728395062,
            7410: 2.854320987654,
            14039: 6.493453786901e-08,
        },
    ),
    ("torchlars", "16k"): (
        7020,
        390,
        {0: 0.06410256410256, 195: 12.56410256410, 390: 22.29938271605, 3705: 5.574845679012, 7019: 5.073010771016e-07},
    ),
    ("torchlars", "32k"): (
        3510,
        195,
        {0: 0.1487179487179, 97: 14.57435897436, 195: 25.86728395062, 1852: 6.470723127247, 3509: 2.353876997752e-06},
    ),
    ("mlperf", "1632"): (29045, 1570, {0: 0.0, 785: 3.7, 1570: 7.4, 15307: 1.850344332120, 29044: 1.000392083735e-04}),
    ("mlperf", "2k"): (22500, 1875, {0: 0.0, 937: 4.4976, 1875: 9.0, 12187: 2.250511358787, 22499: 1.000846189532e-04}),
    ("mlperf", "3200"): (14800, 800, {0: 0.01375, 400: 5.51375, 800: 11.0, 7800: 2.750075, 14799: 1.000561219388e-04}),
    ("mlperf", "3264"): (14504, 784, {0: 0.0, 392: 5.25, 784: 10.5, 7644: 2.625457635472, 14503: 1.002230866724e-04}),
    ("mlperf", "4k"): (13104, 1560, {0: 0.0, 780: 5.0, 1560: 10.0, 7332: 2.500508102342, 13103: 1.003001012289e-04}),
    ("mlperf", "8k"): (6864, 780, {0: 0.0, 390: 8.5, 780: 17.0, 3822: 4.251471984131, 6863: 1.018364757283e-04}),
    ("mlperf", "13056"): (4704, 882, {0: 0.0, 441: 6.4, 882: 12.8, 2793: 3.201749283817, 4703: 1.035031438567e-04}),
    ("mlperf", "16k"): (
        3744,
        702,
        {0: 0.03133903133903, 351: 11.03133903134, 702: 22.0, 2223: 5.500075, 3743: 1.023774001585e-04},
    ),
    ("mlperf", "20k"): (
        3224,
        744,
        {0: 0.02956989247312, 372: 11.02956989247, 744: 22.0, 1984: 5.500075, 3223: 1.035769868626e-04},
    ),
    ("mlperf", "35k"): (
        2100,
        595,
        {0: 0.03680672268908, 297: 10.96840336134, 595: 21.9, 1347: 5.482353131467, 2099: 1.096687233033e-04},
    ),
    ("mlperf", "40448"): (
        2170,
        744,
        {0: 0.0260752688172, 372: 9.726075268817, 744: 19.4, 1457: 4.850075, 2169: 1.095402650437e-04},
    ),
    ("mlperf", "56k"): (
        1716,
        704,
        {0: 0.03267045454545, 352: 11.53267045455, 704: 23.0, 1210: 5.750075, 1715: 1.224576817323e-04},
    ),
    ("mlperf", "67456"): (
        1620,
        558,
        {0: 0.04426344086022, 279: 12.39376344086, 558: 24.699, 1089: 6.174825, 1619: 1.218992165583e-04},
    ),
    ("mlperf", "32k"): (2262, 624, {0: 0.0, 312: 10.6, 624: 21.2, 1443: 5.306544300588, 2261: 1.315671879868e-04}),
    ("mlperf", "48k"): (1846, 624, {0: 0.0, 312: 9.7025, 624: 19.405, 1235: 4.859261563091, 1845: 1.518941599715e-04}),
    ("mlperf", "58880"): (
        1722,
        609,
        {0: 0.0, 304: 11.60391461412, 609: 23.246, 1165: 5.832460787303, 1721: 1.749265912219e-04},
    ),
    ("mlperf", "64k"): (
        1691,
        589,
        {0: 0.0, 294: 12.32853310696, 589: 24.699, 1140: 6.186026312891, 1690: 1.812057119420e-04},
    ),
    ("mlperf", "67840"): (
        1620,
        558,
        {0: 0.0, 279: 12.3495, 558: 24.699, 1089: 6.186448009193, 1619: 1.874321330939e-04},
    ),
    ("nus", "512"): (
        225180,
        391,
        {0: 0.0, 195: 1.994884910486, 391: 4.0, 112785: 1.000008897252, 225179: 7.9160746e-11},
    ),
    ("nus", "1k"): (
        112590,
        391,
        {0: 0.0, 195: 2.821193295783, 391: 5.656854249492, 56490: 1.414238771508, 112589: 4.4936270e-10},
    ),
    ("nus", "4k"): (
        28080,
        390,
        {0: 0.0, 195: 5.656854249492, 390: 11.31370849898, 14235: 2.828427124746, 28079: 1.4755675e-08},
    ),
    ("nus", "8k"): (14040, 390, {0: 0.0, 195: 8.0, 390: 16.0, 7215: 4.0, 14039: 8.5872613e-08}),
    ("nus", "16k"): (
        7020,
        390,
        {0: 0.0, 195: 11.31370849898, 390: 22.62741699797, 3705: 5.656854249492, 7019: 5.1476371e-07},
    ),
    ("nus", "32k"): (3510, 546, {0: 0.0, 273: 16.0, 546: 32.0, 2028: 8.0, 3509: 3.6424498e-06}),
    ("lamb", "4k"): (
        28080,
        780,
        {0: 0.0, 390: 0.00707106781187, 780: 0.0141421356237, 14430: 0.00707106781187, 28079: 5.18026945924e-07},
    ),
    ("lamb", "8k"): (14040, 780, {0: 0.0, 390: 0.01, 780: 0.02, 7410: 0.01, 14039: 1.50829562594e-06}),
    ("lamb", "16k"): (
        7020,
        780,
        {0: 0.0, 390: 0.0141421356237, 780: 0.0282842712475, 3900: 0.0141421356237, 7019: 4.53273577684e-06},
    ),
    ("lamb", "32k"): (3510, 780, {0: 0.0, 390: 0.02, 780: 0.04, 2145: 0.02, 3509: 1.4652014652e-05}),
    ("ffcv", "4k"): (27456, 624, {0: 1.7e-4, 312: 0.850085, 624: 1.7, 14040: 0.85, 27455: 6.335718545025e-05}),
    ("rsb", "2k"): (
        62500,
        3125,
        {0: 1e-4, 1562: 0.004048736, 3125: 0.008, 32812: 0.004000605808841, 62499: 1.000005598455e-06},
    ),
    ("goyal", "8k"): (14040, 780, {0: 0.1, 390: 1.65, 4679: 3.2, 4680: 0.32, 12480: 0.0032}),
}

# Momentum (None: not SGD), weight decay, eps (None: no LARS), epochs, samples per batch-norm statistic, published top-1
VALUES: dict[tuple[str, str], tuple[float | None, float, float | None, int, int, float]] = {
    ("torchlars", "256"): (0.9, 1e-4, None, 90, 32, 73.79),
    ("torchlars", "8k"): (0.9, 5e-4, 1e-8, 90, 32, 73.78),
    ("torchlars", "16k"): (0.9, 5e-4, 1e-8, 90, 32, 73.36),
    ("torchlars", "32k"): (0.9, 5e-4, 1e-8, 90, 32, 72.26),
    ("mlperf", "1632"): (0.9, 5e-5, 1e-7, 37, 204, 75.9),
    ("mlperf", "2k"): (0.9, 5e-5, 1e-7, 36, 256, 75.9),
    ("mlperf", "3200"): (0.9, 5e-5, 0.0, 37, 400, 75.9),
    ("mlperf", "3264"): (0.9, 5e-5, 1e-7, 37, 204, 75.9),
    ("mlperf", "4k"): (0.9, 2e-4, 1e-7, 42, 64, 75.9),
    ("mlperf", "8k"): (0.9, 2e-4, 1e-7, 44, 64, 75.9),
    ("mlperf", "13056"): (0.9, 2.5e-5, 1e-7, 48, 204, 75.9),
    ("mlperf", "16k"): (0.9, 2e-4, 0.0, 48, 128, 75.9),
    ("mlperf", "20k"): (0.9, 2.5e-5, 0.0, 52, 40, 75.9),
    ("mlperf", "32k"): (0.94, 2.5e-5, 1e-7, 58, 128, 75.9),
    ("mlperf", "35k"): (0.94, 2.5e-5, 0.0, 60, 35, 75.9),
    ("mlperf", "40448"): (0.95, 1e-4, 0.0, 70, 32, 75.9),
    ("mlperf", "48k"): (0.951807, 1e-4, 0.0, 71, 256, 75.9),
    ("mlperf", "56k"): (0.95, 2.5e-5, 0.0, 78, 32, 75.9),
    ("mlperf", "58880"): (0.951807, 1e-4, 0.0, 82, 230, 75.9),
    ("mlperf", "64k"): (0.951807, 1e-4, 1e-7, 89, 128, 75.9),
    ("mlperf", "67456"): (0.951807, 1e-4, 0.0, 90, 32, 75.9),
    ("mlperf", "67840"): (0.951807, 1e-4, 0.0, 90, 424, 75.9),
    ("nus", "512"): (0.9, 1e-4, 1e-5, 90, 64, 77.02),
    ("nus", "1k"): (0.9, 1e-4, 1e-5, 90, 128, 76.96),
    ("nus", "4k"): (0.9, 1e-4, 1e-5, 90, 128, 77.38),
    ("nus", "8k"): (0.9, 1e-4, 1e-5, 90, 128, 77.14),
    ("nus", "16k"): (0.9, 1e-4, 1e-5, 90, 128, 76.96),
    ("nus", "32k"): (0.9, 1e-4, 0.0, 90, 128, 76.75),
    ("lamb", "4k"): (None, 1.5, 0.0, 90, 64, 77.14),
    ("lamb", "8k"): (None, 1.5, 0.0, 90, 64, 77.31),
    ("lamb", "16k"): (None, 1.5, 0.0, 90, 64, 76.91),
    ("lamb", "32k"): (None, 1.5, 0.0, 90, 128, 76.34),
    ("ffcv", "4k"): (0.9, 1e-4, None, 88, 512, 78.4),
    ("rsb", "2k"): (None, 0.02, 0.0, 100, 512, 78.1),
    ("goyal", "8k"): (0.9, 1e-4, None, 90, 32, 76.26),
}

# Label smoothing, zero gamma, smallest crop, nesterov, decay and ratio of batch norm and biases, policy.
SHARED: dict[str, tuple[float, bool, float, bool, bool, bool, str]] = {
    "torchlars": (0.0, False, 0.08, False, True, True, "poly(2)"),
    "mlperf": (0.1, False, 0.05, False, False, False, "poly(2)"),
    "nus": (0.1, False, 0.08, False, False, False, "poly(2)"),
    "lamb": (0.1, False, 0.08, False, False, False, "poly(1)"),
    "ffcv": (0.1, False, 0.08, False, False, True, "poly(1)"),
    "rsb": (0.0, True, 0.08, False, False, False, "cosine"),
    "goyal": (0.0, True, 0.08, True, False, True, "x0.1 at epochs 30, 60, 80"),
}

# Options that differ from the defaults of `LARS`, except eps.
RULES: dict[str, dict[str, Any]] = {
    "torchlars": {},
    "mlperf": {"lr_placement": "inside"},
    "nvidia": {},
    "nus": {"ratio_placement": "outside", "clip": (0.0, 50.0), "clamp": 10.0},
}


@lru_cache
def imagenet(recipe: str, batch: str, *more: str, data: str = "imagenet") -> Config:
    # Not through the choices of `batch`, which other tests check: composing takes a quarter of a second.
    raw = composed(f"recipe={recipe}", f"data={data}", *more)
    raw.batch.name, raw.batch.nominal = batch, nominal_batch(batch)
    return resolve(raw)


def test_every_row_of_every_recipe_is_tested() -> None:
    rows = set()
    for path in (config_dir() / "recipe").glob("*.yaml"):
        content = OmegaConf.load(path)
        rows |= {(path.stem, str(name)) for name in content["rows"]}
    assert rows == RATES.keys() == VALUES.keys()


@pytest.mark.parametrize(("recipe", "batch"), RATES)
def test_a_row_has_the_learning_rates_of_its_source(recipe: str, batch: str) -> None:
    config = imagenet(recipe, batch)
    plan = make_plan(config, IMAGES)
    updates, warmup, rates = RATES[recipe, batch]
    assert (plan.updates, plan.warmup_updates) == (updates, warmup)
    assert len(rates) == 5
    schedule = make_schedule(plan, config)
    for update, rate in rates.items():
        assert schedule(update) == pytest.approx(rate, rel=1e-7, abs=0), update


@pytest.mark.parametrize(("recipe", "batch"), VALUES)
def test_a_row_has_the_values_of_its_source(recipe: str, batch: str) -> None:
    config = imagenet(recipe, batch)
    opt, ghost = config.optimizer, config.model.ghost_batch
    found = (opt.momentum, opt.weight_decay, opt.eps, config.epochs, ghost, published_top1(config))
    assert found == VALUES[recipe, batch]
    flags = (bool(opt.nesterov), opt.decay_norm_bias, opt.adapt_norm_bias if opt.name == "lars" else True)
    shared = (config.label_smoothing, config.model.zero_gamma, config.data.min_crop, *flags, describe_decay(config))
    assert shared == SHARED[recipe]
    assert "{" not in str(lacks(config)), "an item of lacks is text; YAML reads a colon and a space as a mapping"


@pytest.mark.parametrize(("recipe", "batch"), RATES)
def test_a_row_scaled_to_cifar10_keeps_its_updates(recipe: str, batch: str) -> None:
    config = imagenet(recipe, batch, data="cifar10")
    plan = make_plan(config, 50_000)
    assert plan.scaled
    # The scaled batch is rounded to ghost batches.
    assert plan.updates_per_epoch == pytest.approx(IMAGES // nominal_batch(batch), rel=0.25)
    assert (config.data.image_size, published_top1(config)) == (32, None)


@pytest.mark.parametrize(
    ("recipe", "batch", "rule"),
    [
        ("torchlars", "8k", "torchlars"),
        ("mlperf", "64k", "mlperf"),
        ("mlperf", "48k", "mlperf"),
        ("mlperf", "16k", "nvidia"),
        ("nus", "8k", "nus"),
        ("nus", "32k", "nus"),
    ],
)
def test_the_optimizer_has_the_rule_and_exclusions_of_the_recipe(recipe: str, batch: str, rule: str) -> None:
    config = imagenet(recipe, batch)
    with torch.device("meta"):
        network = build_model("resnet50", num_classes=1000, ghost_batch=32, zero_gamma=False)
    optimizer = build_optimizer(config.optimizer, network)
    assert isinstance(optimizer, LARS)
    momentum, decay, eps, *_ = VALUES[recipe, batch]
    assert asdict(optimizer.rule) == {**asdict(Rule()), **RULES[rule], "eps": eps, "trust_coef": 0.001}
    assert type(optimizer.base_optimizer) is torch.optim.SGD
    groups = [
        (len(group["params"]), group["weight_decay"], group.get("exclude", False), group["momentum"], group["nesterov"])
        for group in optimizer.param_groups
    ]
    if recipe == "torchlars":
        assert groups == [(161, decay, False, momentum, False)]
    else:
        # 53 convolutions and the last layer; a scale and a shift for each convolution, and the last layer's bias.
        assert groups == [(54, decay, False, momentum, False), (107, 0.0, True, momentum, False)]


@pytest.mark.parametrize(("recipe", "batch"), RATES)
def test_resolving_a_resolved_config_changes_nothing(recipe: str, batch: str) -> None:
    # A run directory's config.yaml is a resolved config.
    config = imagenet(recipe, batch)
    assert resolve(OmegaConf.structured(config)) == config


def test_goyal_is_nesterov_sgd_without_decay_of_batch_norm() -> None:
    with torch.device("meta"):
        network = build_model("resnet50", num_classes=1000, ghost_batch=32, zero_gamma=True)
    optimizer = build_optimizer(imagenet("goyal", "8k").optimizer, network)
    assert type(optimizer) is torch.optim.SGD
    groups = [(len(g["params"]), g["weight_decay"], g["momentum"], g["nesterov"]) for g in optimizer.param_groups]
    assert groups == [(54, 1e-4, 0.9, True), (107, 0.0, 0.9, True)]


@pytest.mark.parametrize(
    ("epochs", "ramp", "top1"),
    [
        (16, [11, 13], 73.8),
        (24, [17, 20], 75.6),
        (32, [23, 27], 76.6),
        (40, [29, 34], 77.2),
        (56, [41, 48], 78.0),
        (88, [65, 76], 78.4),
    ],
)
def test_each_length_of_ffcv_has_its_sizes_and_its_top1(epochs: int, ramp: list[int], top1: float) -> None:
    config = imagenet("ffcv", "4k", f"epochs={epochs}")
    plan = make_plan(config, IMAGES)
    # The two epochs of warm-up do not shrink.
    assert (plan.updates, plan.warmup_updates) == (312 * epochs, 624)
    assert config.data.size_schedule == [160, 192, *ramp]
    assert (config.data.image_size, config.data.eval_crop) == (256, 0.875)
    assert (config.model.blurpool, config.evaluate.flip, published_top1(config)) == (True, True, top1)
    assert resolve(OmegaConf.structured(config)) == config


def test_a_length_that_ffcv_does_not_give_has_no_published_top1() -> None:
    for epochs in (30, 90):
        with pytest.raises(ConfigError, match=rf"epochs={epochs}: recipe ffcv has the lengths 16, 24, 32, 40, 56, 88;"):
            imagenet("ffcv", "4k", f"epochs={epochs}")
    config = imagenet("ffcv", "4k", "epochs=44", "schedule.scale_warmup=true")
    assert (config.data.size_schedule, config.schedule.warmup_epochs) == ([160, 192, 32, 38], 1.0)
    assert published_top1(config) is None


def test_rsb_mixes_images_of_160_pixels_under_the_bce_loss() -> None:
    config = imagenet("rsb", "2k")
    assert (config.loss, config.bce_threshold) == ("bce", 0.2)
    assert (config.augment.mixup, config.augment.cutmix) == (0.1, 1.0)
    assert (config.augment.auto, config.augment.randaugment_ops, config.augment.randaugment_magnitude) == (
        "randaugment",
        1,
        18,
    )
    assert (config.data.train_size, config.data.image_size, config.data.eval_crop) == (160, 224, 224 / 235)


def test_lamb_is_adam_with_the_constants_of_its_source() -> None:
    config = imagenet("lamb", "32k")
    with torch.device("meta"):
        network = build_model("resnet50", num_classes=1000, ghost_batch=128, zero_gamma=False)
    optimizer = build_optimizer(config.optimizer, network)
    assert isinstance(optimizer, LARS)
    assert optimizer.rule == LARS.preset("lamb", torch.optim.AdamW(Net().parameters())).rule
    assert type(optimizer.base_optimizer) is torch.optim.AdamW
    names = ("weight_decay", "exclude", "betas", "eps")
    groups = [(len(group["params"]), *(group.get(name, False) for name in names)) for group in optimizer.param_groups]
    assert groups == [(54, 1.5, False, (0.9, 0.999), 1e-6), (107, 0.0, True, (0.9, 0.999), 1e-6)]
    given = imagenet("lamb", "32k", "optimizer.kwargs.eps=0.5", "optimizer.base=Adam", "optimizer.lr=0.1").optimizer
    assert (given.base, given.kwargs) == ("Adam", {"eps": 0.5})
    given = imagenet("lamb", "32k", "optimizer=lars", "optimizer.base=AdamW", "optimizer.kwargs.eps=0.5").optimizer
    assert (given.lr, given.kwargs) == (0.04, {"betas": [0.9, 0.999], "eps": 0.5})


class Net(nn.Module):
    """A matrix that LARS adapts, and a bias that some recipes exempt."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)


def ratio(w: Tensor, g: Tensor, decay: float, eps: float) -> Tensor:
    return 0.001 * w.norm() / (g.norm() + decay * w.norm() + eps)


def by_hand(rule: str, w: Tensor, grads: list[Tensor], rates: list[float], decay: float, adapted: bool) -> Tensor:
    """Return the weight after updates of the source's optimizer, with momentum m."""
    m = {"mlperf": 0.951807, "nvidia": 0.95}.get(rule, 0.9)
    eps = {"torchlars": 1e-8, "mlperf": 1e-7, "nus": 1e-5}.get(rule, 0.0)
    w, v, last = w.clone(), torch.zeros_like(w), rates[0]
    for g, lr in zip(grads, rates, strict=True):
        r = ratio(w, g, decay, eps) if adapted else torch.tensor(1.0, dtype=torch.float64)
        d = g + decay * w
        if rule == "torchlars":
            v = m * v + r * d
            w -= lr * v
        elif rule == "mlperf":
            v = m * v + lr * r * d
            w -= v
        elif rule == "nvidia":
            v = m * (lr / last) * v + lr * r * d
            w -= v
        elif rule == "nus":
            v = m * v + (d.clamp(-10, 10) if adapted else d)
            w -= lr * r * v
        else:
            v = m * v + d
            w -= lr * (d + m * v)
        last = lr
    return w


@pytest.mark.parametrize(
    ("recipe", "batch", "rule"),
    [
        ("torchlars", "8k", "torchlars"),
        ("mlperf", "64k", "mlperf"),
        ("mlperf", "56k", "nvidia"),
        ("nus", "8k", "nus"),
        ("goyal", "8k", "goyal"),
    ],
)
def test_five_updates_equal_those_of_the_sources_optimizer(recipe: str, batch: str, rule: str) -> None:
    torch.manual_seed(0)
    config = imagenet(recipe, batch)
    net = Net()
    optimizer = build_optimizer(config.optimizer, net)
    rates = [0.5, 1.0, 3.0, 2.0, 0.25]
    # Some elements exceed 10, where one of the rules clamps them.
    grads = {name: [torch.randn_like(p) * 8 for _ in rates] for name, p in net.named_parameters()}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for k, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, p in net.named_parameters():
            p.grad = grads[name][k].clone()
        optimizer.step()
    decay = VALUES[recipe, batch][1]
    alike = recipe == "torchlars"
    for name, adapted in (("linear.weight", recipe != "goyal"), ("linear.bias", alike)):
        wd = decay if alike or name == "linear.weight" else 0.0
        expected = by_hand(rule, before[name], grads[name], rates, wd, adapted)
        torch.testing.assert_close(dict(net.named_parameters())[name].detach(), expected, rtol=1e-12, atol=1e-13)


def test_64k_of_mlperf_works_on_the_embedded_images() -> None:
    config = resolved("batch=64k", "recipe=mlperf")
    plan = make_plan(config, 10_000)
    # 65,536 x 10,000 / 1,281,167 = 511.5: four ghost batches of 128; 31 of 89 epochs are 3.48 of 10, or 66 updates.
    assert (plan.global_batch, plan.updates_per_epoch, plan.warmup_updates) == (512, 19, 66)


def test_the_summary_names_the_rule_and_its_changes() -> None:
    config = imagenet("nus", "32k", "optimizer.clamp=none")
    text = "\n".join(experiment_lines(config, make_plan(config, IMAGES), Inventory()))
    assert "recipe         nus" in text
    assert "trust ratios as in nus-hpc except eps=0.0, clamp=none; none for batch norm and biases" in text
    goyal = imagenet("goyal", "8k")
    message = "\n".join(experiment_lines(goyal, make_plan(goyal, IMAGES), Inventory()))
    assert "then x0.1 at epochs 30, 60, 80" in message
    assert "trust ratios" not in message
    assert "not implemented: weight decay of the last layer's bias; a last layer that starts" in message
    torchlars = imagenet("torchlars", "8k")
    message = "\n".join(experiment_lines(torchlars, make_plan(torchlars, IMAGES), Inventory()))
    assert "not implemented" not in message


def test_every_option_is_a_keyword_of_lars_and_a_config_key() -> None:
    keywords = {name: p for name, p in inspect.signature(LARS).parameters.items() if name in DEFAULTS}
    hints = get_type_hints(Options)
    assert {name: p.default for name, p in keywords.items()} == DEFAULTS
    assert {name: hint for name, hint in get_type_hints(LARS.__init__).items() if name in DEFAULTS} == hints
    for group in (OptimizerConfig, RowConfig):
        of_lars = {f.name: f.default for f in fields(group) if f.name in LARS_OPTIONS}
        assert of_lars == dict.fromkeys(LARS_OPTIONS)
        assert list(of_lars) == list(LARS_OPTIONS)


def test_presets_in_the_config_equal_those_of_lars() -> None:
    for name in PRESETS:
        network = Net()
        raw = composed("recipe=torchlars", "data=imagenet")
        raw.optimizer.preset = name
        opt = resolve(raw).optimizer
        built = build_optimizer(opt, network)
        assert isinstance(built, LARS)
        theirs = LARS.preset(name, torch.optim.SGD(network.parameters(), lr=1.0))
        assert built.rule == theirs.rule
        assert {key: getattr(opt, key) for key in options_of(name, "")} == options_of(name, "")
