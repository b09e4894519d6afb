from __future__ import annotations

import pytest

from lars_train.training.metrics import Interval


def test_a_log_line_tells_the_rate_of_the_updates_since_the_one_before() -> None:
    interval = Interval(30, 100.0)
    interval.waited += 2.0
    values = interval.values(40, 116.0, global_batch=256, flops_per_image=2e9, peak_flops=1e12)
    assert values["train/images_per_s"] == 10 * 256 / 16
    assert values["train/mfu"] == pytest.approx(160 * 2e9 / 1e12)
    assert values["train/wait_share"] == 2 / 16
    assert values["checkpoint/wait_seconds"] == 0
    values = interval.values(40, 116.0, global_batch=256, flops_per_image=2e9, peak_flops=None)
    assert "train/mfu" not in values


def test_evaluations_and_checkpoints_are_left_out_of_the_rate() -> None:
    interval = Interval(0, 50.0)
    interval.waited += 1.0
    interval.save(3.0)
    interval.leave_out(20.0)
    interval.save(1.0)
    values = interval.values(5, 84.0, global_batch=32, flops_per_image=1.0, peak_flops=1.0)
    assert values["train/images_per_s"] == 5 * 32 / 10
    assert values["train/wait_share"] == 1 / 10
    assert values["checkpoint/wait_seconds"] == 4
