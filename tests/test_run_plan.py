"""The arithmetic of a plan equals the numbers in design.md, and a brute-force count."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lars_train.config import Config
from lars_train.data.order import micro_bounds
from lars_train.errors import ConfigError
from lars_train.run_plan import Plan, accumulation, check_micro_batch, check_world, make_plan, scaled_batch

IMAGENET, CIFAR, MINI = 1_281_167, 50_000, 10_000
NOMINAL = {"256": 256, "8k": 8192, "16k": 16384, "32k": 32768}


def config(
    row: str = "32k",
    *,
    size: int | None = None,
    scaled: bool = False,
    ghost: int = 32,
    epochs: int = 90,
    warmup: float = 5.0,
    max_updates: int | None = None,
) -> Config:
    """Return a resolved config with the values that a plan reads."""
    made = Config(epochs=epochs, max_updates=max_updates)
    made.batch.name, made.batch.nominal, made.batch.size, made.batch.scaled = row, NOMINAL[row], size, scaled
    made.model.ghost_batch, made.schedule.warmup_epochs = ghost, warmup
    return made


def refusal(made: Config, samples: int) -> str:
    with pytest.raises(ConfigError) as caught:
        make_plan(made, samples)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "per_epoch", "warmup"), [("256", 5004, 0), ("8k", 156, 780), ("16k", 78, 390), ("32k", 39, 195)]
)
def test_imagenet_has_the_updates_of_the_published_runs(row: str, per_epoch: int, warmup: int) -> None:
    plan = make_plan(config(row, warmup=0 if row == "256" else 5), IMAGENET)
    assert (plan.global_batch, plan.ghost_batch, plan.ghosts) == (NOMINAL[row], 32, NOMINAL[row] // 32)
    assert (plan.updates_per_epoch, plan.updates, plan.warmup_updates) == (per_epoch, per_epoch * 90, warmup)
    assert (plan.scaled, plan.raised, plan.stop) == (False, False, plan.updates)


@pytest.mark.parametrize(
    ("samples", "row", "size", "raised", "per_epoch"),
    [
        (CIFAR, "256", 10, False, 5000),
        (CIFAR, "8k", 320, False, 156),
        (CIFAR, "16k", 640, False, 78),
        (CIFAR, "32k", 1280, False, 39),
        (MINI, "256", 8, True, 1250),
        (MINI, "8k", 64, False, 156),
        (MINI, "16k", 128, False, 78),
        (MINI, "32k", 256, False, 39),
    ],
)
def test_the_scaled_table_matches_the_design(samples: int, row: str, size: int, raised: bool, per_epoch: int) -> None:
    plan = make_plan(config(row, scaled=True, warmup=0), samples)
    assert (plan.global_batch, plan.raised, plan.updates_per_epoch) == (size, raised, per_epoch)
    assert (plan.nominal_batch, plan.scaled) == (NOMINAL[row], True)
    assert plan.ghost_batch == min(size, 32)


def test_the_scaling_is_described_in_one_line() -> None:
    def describe(row: str, samples: int, scaled: bool = True) -> str:
        return make_plan(config(row, scaled=scaled, warmup=0), samples).arithmetic()

    assert describe("32k", CIFAR) == "32,768 x 50,000 / 1,281,167 = 1278.8, rounded to a multiple of 32: 1,280"
    assert describe("256", CIFAR) == "256 x 50,000 / 1,281,167 = 10.0, rounded to a whole number: 10"
    # One ghost batch of 32, which is less than the scaled batch.
    assert describe("32k", 1_500) == "32,768 x 1,500 / 1,281,167 = 38.4, rounded to a multiple of 32: 32"
    assert describe("256", MINI) == "256 x 10,000 / 1,281,167 = 2.0, raised to 8"
    assert describe("32k", IMAGENET, scaled=False) == "32,768, not scaled"


@given(nominal=st.integers(1, 2**17), samples=st.integers(8, 3_000_000), ghost=st.integers(1, 512))
def test_a_scaled_batch_is_the_nearest_number_of_ghost_batches(nominal: int, samples: int, ghost: int) -> None:
    size, raised = scaled_batch(nominal, samples, ghost)
    exact = Fraction(nominal * samples, IMAGENET)
    assert size >= 8
    assert size % ghost == 0 or size < ghost
    unit = ghost if exact > ghost else 1
    nearest = abs(size - exact) <= Fraction(unit, 2)
    if raised:
        assert not nearest
        assert size - min(ghost, 8) < 8
    else:
        assert nearest


@given(samples=st.integers(16, 2_000_000), ghost=st.integers(1, 256), row=st.sampled_from(sorted(NOMINAL)))
def test_a_scaled_row_always_makes_a_plan(samples: int, ghost: int, row: str) -> None:
    plan = make_plan(config(row, scaled=True, ghost=ghost, warmup=0), samples)
    assert plan.ghosts * plan.ghost_batch == plan.global_batch
    assert plan.updates_per_epoch * plan.global_batch <= samples < (plan.updates_per_epoch + 1) * plan.global_batch


def test_batch_size_is_used_as_given() -> None:
    plan = make_plan(config(size=96), 1000)
    assert (plan.global_batch, plan.nominal_batch, plan.updates_per_epoch, plan.ghosts) == (96, 96, 10, 3)
    small = make_plan(config(size=5), 1000)
    assert (small.global_batch, small.ghost_batch, small.ghosts, small.raised) == (5, 5, 1, False)


@given(size=st.integers(1, 5000), ghost=st.integers(1, 300))
def test_a_batch_that_splits_a_ghost_batch_names_the_nearest(size: int, ghost: int) -> None:
    if size <= ghost or size % ghost == 0:
        assert make_plan(config(size=size, ghost=ghost), 10_000).global_batch == size
        return
    message = refusal(config(size=size, ghost=ghost), 10_000)
    assert message.startswith(f"batch.size={size}:")
    near = [int(n) for n in re.findall(r"\d+", message.partition("nearest multiples")[2])]
    multiples = range(ghost, 10_001, ghost)
    assert near == [max(n for n in multiples if n < size), min(n for n in multiples if n > size)]
    for n in near:
        assert make_plan(config(size=n, ghost=ghost), 10_000).global_batch == n


def test_a_batch_larger_than_the_data_names_the_remedy() -> None:
    message = refusal(config("8k"), 8191)
    assert message.startswith("batch=8k:")
    first, second = "batch.size=32 optimizer=sgd optimizer.lr=0.02", "batch.scaled=true"
    assert 0 < message.index(first) < message.index(second)
    assert make_plan(config("8k"), 8192).updates_per_epoch == 1
    # Scaling does not help if there are fewer images than batch norm needs.
    message = refusal(config("32k", scaled=True, warmup=0), 7)
    assert "batch.scaled" not in message
    assert "more images" in message


@given(samples=st.integers(8, 5000), ghost=st.integers(1, 300))
def test_the_batch_that_a_refusal_offers_makes_a_plan(samples: int, ghost: int) -> None:
    message = refusal(config("32k", ghost=ghost), samples)
    offered = re.search(r"batch\.size=(\d+)", message)
    if offered is None:
        # 32,768 images are not whole ghost batches, or even the smallest scaled batch does not fit.
        assert "nearest multiples" in message or "more images" in message
        return
    assert make_plan(config(size=int(offered[1]), ghost=ghost, warmup=0), samples).updates_per_epoch >= 1


def test_a_warm_up_that_fills_the_run_is_refused() -> None:
    # Shorter than the run in epochs, but rounded to as many updates.
    message = refusal(config(size=960, epochs=1, warmup=0.9), 960)
    assert message.startswith("schedule.warmup_epochs=0.9:")
    assert message.endswith("Lower it, or raise epochs.")
    assert make_plan(config(size=960, epochs=1, warmup=0.4), 960).warmup_updates == 0
    assert make_plan(config(size=96, epochs=1, warmup=0.9), 960).warmup_updates == 9


def test_max_updates_stops_early_and_keeps_the_schedule() -> None:
    whole, short = (make_plan(config("8k", max_updates=n), IMAGENET) for n in (None, 10))
    assert short.stop == 10
    assert (short.updates, short.warmup_updates, short.epochs) == (whole.updates, whole.warmup_updates, whole.epochs)
    assert make_plan(config("8k", max_updates=10**9), IMAGENET).stop == whole.updates


def plan_of(size: int, ghost: int) -> Plan:
    return make_plan(config(size=size, ghost=ghost, warmup=0), 10_000)


@given(ghosts=st.integers(1, 30), ghost=st.sampled_from([1, 8, 32]), world=st.integers(1, 40))
def test_more_ranks_than_ghost_batches_names_the_remedy(ghosts: int, ghost: int, world: int) -> None:
    plan = plan_of(ghosts * ghost, ghost)
    if world <= ghosts:
        check_world(plan, world)
        return
    with pytest.raises(ConfigError) as caught:
        check_world(plan, world)
    message = str(caught.value)
    found = re.search(r"Start at most (\d+) in total", message)
    assert found is not None
    check_world(plan, int(found.group(1)))
    if ghosts > 1:
        least = int(message.rstrip(".").rpartition("at least ")[2])
        check_world(plan_of(least, ghost), world)
        with pytest.raises(ConfigError):
            check_world(plan_of(least - ghost, ghost), world)


def test_the_remedy_for_too_small_a_batch_is_in_ghost_batches() -> None:
    # A batch of 16 is one ghost batch, like a batch of 8: too few for two ranks.
    with pytest.raises(ConfigError, match=r"2 times model\.ghost_batch"):
        check_world(plan_of(8, 32), 2)
    check_world(plan_of(2 * 32, 32), 2)


@given(micro=st.integers(1, 400), ghost=st.integers(1, 64))
def test_a_micro_batch_that_splits_a_ghost_batch_is_refused(micro: int, ghost: int) -> None:
    plan = plan_of(8 * ghost, ghost)
    if micro % ghost == 0:
        assert check_micro_batch(plan, micro) * ghost == micro
        return
    with pytest.raises(ConfigError, match=f"^micro_batch={micro} ") as caught:
        check_micro_batch(plan, micro)
    near = [int(n) for n in re.findall(r"\d+", str(caught.value).partition("nearest multiples")[2])]
    assert near == [n for n in (micro - micro % ghost, micro - micro % ghost + ghost) if n > 0]
    for n in near:
        check_micro_batch(plan, n)


@given(
    ghosts=st.integers(1, 40),
    ghost=st.integers(1, 16),
    world=st.integers(1, 12),
    per_micro=st.integers(1, 50),
)
def test_accumulation_is_the_most_micro_batches_of_any_rank(
    ghosts: int, ghost: int, world: int, per_micro: int
) -> None:
    plan = plan_of(ghosts * ghost, ghost)
    world = min(world, ghosts)
    counts = [len(micro_bounds(plan.global_batch, ghost, per_micro, rank, world)) for rank in range(world)]
    assert accumulation(plan, world, per_micro) == max(counts)
    # design.md: at most ceil(ghost batches / (world x ghost batches per micro-batch)).
    assert max(counts) == -(-ghosts // (world * per_micro))
