from __future__ import annotations

import pytest

from lars_train.units import rate, size


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 kB"),
        (12, "0.012 kB"),
        (4_560, "4.56 kB"),
        (999_400, "999 kB"),
        (999_600, "1 MB"),
        (98_765_432, "98.8 MB"),
        (999_499_999, "999 MB"),
        (999_500_001, "1 GB"),
        (1.44e11, "144 GB"),
        (6.4e12, "6.4 TB"),
    ],
)
def test_sizes_have_three_digits_and_the_largest_unit_that_they_reach(count: float, shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(("per_s", "shown"), [(0.1234, "0.123"), (45.678, "45.7"), (12_345.6, "12,346")])
def test_rates_are_whole_where_that_is_enough(per_s: float, shown: str) -> None:
    assert rate(per_s) == shown
