"""Ghost batch norm against `nn.BatchNorm2d` applied slice by slice, and its statistics against their formula."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from tape import Operations
from torch import Tensor, nn

from lars_train.models.batchnorm import GhostBatchNorm2d, RunningStatistics

CHANNELS = 3


def pair(ghost_batch: int, dtype: torch.dtype = torch.float64) -> tuple[GhostBatchNorm2d, nn.BatchNorm2d]:
    """Return a ghost and a plain layer with the same weights and running statistics, none of them trivial."""
    draw = torch.Generator().manual_seed(0)
    plain = nn.BatchNorm2d(CHANNELS, dtype=dtype)
    with torch.no_grad():
        for tensor in (plain.weight, plain.bias, plain.running_mean, plain.running_var):
            assert tensor is not None
            tensor.copy_(torch.rand(CHANNELS, generator=draw) + 0.5)
    ghost = GhostBatchNorm2d(CHANNELS, ghost_batch=ghost_batch, dtype=dtype)
    ghost.load_state_dict(plain.state_dict())
    return ghost, plain


def images(samples: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(samples, CHANNELS, 5, 4, generator=draw, dtype=dtype) * 2 + 1


def output_and_gradients(layer: nn.Module, x: Tensor, apply: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return the output, and the gradients of a weighted sum of it with respect to input, weight and bias."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = apply(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])]


def statistics_of(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sample-weighted mean of the parts' means and unbiased variances, in float64."""
    weights = torch.tensor([len(p) for p in parts], dtype=torch.float64)
    rows = [p.double().transpose(0, 1).flatten(1) for p in parts]
    means = torch.stack([r.mean(1) for r in rows])
    variances = torch.stack([r.var(1, correction=1) for r in rows])
    share = (weights / weights.sum())[:, None]
    return (means * share).sum(0), (variances * share).sum(0)


def updated_statistics(plain: nn.BatchNorm2d, parts: Sequence[Tensor], momentum: float = 0.1) -> tuple[Tensor, Tensor]:
    mean, variance = statistics_of(parts)
    assert plain.running_mean is not None
    assert plain.running_var is not None
    return (
        (1 - momentum) * plain.running_mean + momentum * mean,
        (1 - momentum) * plain.running_var + momentum * variance,
    )


def close(got: Tensor | None, expected: Tensor, tolerance: float = 1e-13) -> None:
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("samples", [2, 4, 12])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_ghost_batch_is_normalized_separately(samples: int, layout: torch.memory_format) -> None:
    ghost, plain = pair(4)
    x = images(samples).contiguous(memory_format=layout)
    got = output_and_gradients(ghost, x, ghost)
    expected = output_and_gradients(plain, x, lambda x: torch.cat([plain(part) for part in x.split(4)]))
    for g, e in zip(got, expected, strict=True):
        close(g, e)
    assert got[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_ghost_batch_is_plain_batch_norm_bit_for_bit(dtype: torch.dtype, layout: torch.memory_format) -> None:
    ghost, plain = pair(8, dtype)
    x = images(8, dtype).contiguous(memory_format=layout)
    for g, e in zip(output_and_gradients(ghost, x, ghost), output_and_gradients(plain, x, plain), strict=True):
        assert torch.equal(g, e)
    RunningStatistics(ghost).update()
    ulp = torch.finfo(dtype).eps
    assert plain.running_mean is not None
    assert plain.running_var is not None
    close(ghost.running_mean, plain.running_mean, 2 * ulp)
    close(ghost.running_var, plain.running_var, 2 * ulp)
    assert torch.equal(ghost.state_dict()["num_batches_tracked"], plain.state_dict()["num_batches_tracked"])


def test_running_statistics_average_the_updates_ghost_batches() -> None:
    ghost, plain = pair(4)
    statistics = RunningStatistics(ghost)
    for update in range(2):
        x = images(12, seed=update)
        before = ghost.state_dict()
        frozen = {k: v.clone() for k, v in before.items()}
        for micro in x.split([8, 4]):
            ghost(micro)
        assert all(torch.equal(frozen[k], v) for k, v in ghost.state_dict().items())
        mean, variance = updated_statistics(plain, x.split(4))
        statistics.update()
        close(ghost.running_mean, mean)
        close(ghost.running_var, variance)
        plain.load_state_dict(ghost.state_dict())
    assert int(ghost.state_dict()["num_batches_tracked"]) == 2


def test_a_smaller_ghost_batch_is_weighted_by_its_samples() -> None:
    ghost, plain = pair(4)
    parts = images(6).split([4, 2])
    for part in parts:
        ghost(part)
    mean, variance = updated_statistics(plain, parts)
    RunningStatistics(ghost).update()
    close(ghost.running_mean, mean)
    close(ghost.running_var, variance)


def test_waiting_statistics_are_collected_at_once() -> None:
    layers = nn.Sequential(*(GhostBatchNorm2d(CHANNELS, ghost_batch=4, dtype=torch.float64) for _ in range(3)))
    plain = copy.deepcopy(layers)
    statistics = RunningStatistics(layers, collected=True)
    x = images(6)
    for part in x.split([4, 2]):
        with Operations() as forward:
            output = layers(part)
        # Before the backward pass, as a caller may. Within `Operations`, autograd would not notice a changed tensor.
        statistics.collect()
        output.sum().backward()
        with Operations() as collecting:
            layers(part)
            del collecting.calls[:]
            statistics.collect()
        # Without waiting statistics, a layer computes nothing but batch norm.
        views = {"aten::unbind.int", "aten::detach", "aten::empty.memory_format"}
        assert {name for name in names(forward) if "batch_norm" not in name} <= views
        assert [name.split(".")[0] for name in names(collecting)] == [
            "aten::_foreach_add_",
            "aten::_foreach_add_",
            "aten::_foreach_zero_",
        ]
    statistics.update()
    # A layer that is called again before they are collected adds the new ones on its own.
    others = RunningStatistics(plain, collected=True)
    for part in x.split([4, 2]):
        plain(part)
        plain(part)
    others.update()
    for got, expected in zip(layers, plain, strict=True):
        close(got.running_mean, expected.running_mean)
        close(got.running_var, expected.running_var)
    close(layers[0].running_mean, 0.1 * statistics_of(x.split([4, 2]))[0])


def test_statistics_that_are_not_finite_leave_with_their_update() -> None:
    ghost, plain = pair(4)
    statistics = RunningStatistics(ghost, collected=True)
    ghost(torch.full_like(images(4), torch.nan))
    statistics.update()
    assert ghost.running_mean is not None
    assert ghost.running_mean.isnan().all()
    ghost.load_state_dict(plain.state_dict())
    x = images(4)
    mean, variance = updated_statistics(plain, [x])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ghost(x[:1, :, :1, :1])  # leaves nothing, either
    ghost(x)
    statistics.update()
    close(ghost.running_mean, mean)
    close(ghost.running_var, variance)


def test_every_layer_has_its_own_momentum_and_count() -> None:
    ghost, plain = pair(4)
    other = GhostBatchNorm2d(CHANNELS, ghost_batch=2, momentum=0.5, dtype=torch.float64)
    other_plain = nn.BatchNorm2d(CHANNELS, dtype=torch.float64)
    x = images(8)
    ghost(x)
    for _ in range(2):
        other(x)
    expected = (*updated_statistics(plain, x.split(4)), *updated_statistics(other_plain, x.split(2), 0.5))
    RunningStatistics(nn.Sequential(ghost, nn.ReLU(), other)).update()
    got = (ghost.running_mean, ghost.running_var, other.running_mean, other.running_var)
    for g, e in zip(got, expected, strict=True):
        close(g, e)


@pytest.mark.parametrize("shares", [[8, 4], [12, 0], [4, 4, 4]])
def test_several_ranks_equal_one_rank(shares: list[int]) -> None:
    alone, _ = pair(4)
    x = images(12)
    alone(x)
    RunningStatistics(alone).update()

    ranks = [pair(4)[0] for _ in shares]
    sent: list[Tensor] = []
    for layer, part in zip(ranks, x.split(shares), strict=True):
        if len(part):
            layer(part)
        # Record what a rank sends on a copy, so that its layer does not change.
        RunningStatistics(copy.deepcopy(layer)).update(lambda flat: sent.append(flat.clone()))
    total = torch.stack(sent).sum(0)
    for layer in ranks:
        calls: list[int] = []

        def all_reduce(flat: Tensor, calls: list[int] = calls) -> None:
            calls.append(flat.ndim)
            flat.copy_(total)

        RunningStatistics(layer).update(all_reduce)
        assert calls == [1]
        close(layer.running_mean, alone.state_dict()["running_mean"])
        close(layer.running_var, alone.state_dict()["running_var"])
        assert torch.equal(layer.state_dict()["running_mean"], ranks[0].state_dict()["running_mean"])


def test_a_layer_without_samples_keeps_its_statistics() -> None:
    used, _ = pair(4)
    unused, plain = pair(4)
    used(images(4))
    RunningStatistics(nn.ModuleList([used, unused])).update()
    for name in ("running_mean", "running_var"):
        close(getattr(unused, name), getattr(plain, name))
        assert not torch.equal(getattr(used, name), getattr(plain, name))
    RunningStatistics(nn.ReLU()).update()


def test_evaluation_is_plain_batch_norm_without_accumulation() -> None:
    ghost, plain = pair(4)
    x = images(5)
    assert torch.equal(ghost.eval()(x), plain.eval()(x))
    assert not ghost.ghost_samples.any()


def test_the_state_dict_is_that_of_plain_batch_norm() -> None:
    ghost, plain = pair(4)
    ghost(images(4))
    assert ghost.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(ghost.state_dict(), strict=True)


def test_a_copy_keeps_the_accumulated_statistics() -> None:
    ghost, plain = pair(4)
    x = images(8)
    ghost(x[:4])
    twin = copy.deepcopy(ghost)
    twin(x[4:])
    mean, _ = updated_statistics(plain, x.split(4))
    RunningStatistics(twin).update()
    close(twin.running_mean, mean)
    close(ghost.running_mean, plain.state_dict()["running_mean"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_have_float32_statistics(dtype: torch.dtype) -> None:
    ghost, plain = pair(4, torch.float32)
    conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
    with torch.autocast("cpu", dtype=dtype):
        activations = conv(images(8, torch.float32))
        out = ghost(activations)
        expected = torch.cat([plain(part) for part in activations.split(4)])
    assert out.dtype is dtype
    assert torch.equal(out, expected)
    fresh = pair(4, torch.float32)[1]
    mean, variance = updated_statistics(fresh, activations.detach().split(4))
    RunningStatistics(ghost).update()
    assert ghost.running_mean is not None
    assert ghost.running_mean.dtype is torch.float32
    close(ghost.running_mean.double(), mean, 1e-6)
    close(ghost.state_dict()["running_var"].double(), variance, 1e-5)


def names(operations: Operations) -> list[str]:
    return [operator.name() for operator, *_ in operations.calls]


def test_the_host_never_waits_for_a_value() -> None:
    ghost, _ = pair(4)
    statistics = RunningStatistics(ghost)
    with Operations() as made:
        torch.ones(()).item()
        ghost(images(8))
        statistics.update()
    assert names(made).count("aten::_local_scalar_dense") == 1


@pytest.mark.parametrize("samples", [0, 5, 7, 10])
def test_a_partial_ghost_batch_is_refused(samples: int) -> None:
    ghost, _ = pair(4)
    with pytest.raises(ValueError, match=f"micro-batch of {samples} samples .* ghost batches of 4"):
        ghost(images(samples))


def test_layers_refuse_invalid_sizes() -> None:
    ghost = GhostBatchNorm2d(CHANNELS, ghost_batch=1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ghost(torch.zeros(2, CHANNELS, 1, 1))
    with pytest.raises(ValueError, match="ghost_batch=0"):
        GhostBatchNorm2d(CHANNELS, ghost_batch=0)
    with pytest.raises(ValueError, match="4D"):
        ghost(torch.zeros(2, CHANNELS))


@pytest.mark.parametrize("collected", [True, False])
@pytest.mark.parametrize("moved", [True, False])
def test_running_statistics_follow_replaced_tensors(moved: bool, collected: bool) -> None:
    layer = GhostBatchNorm2d(3, ghost_batch=4, dtype=torch.float32 if moved else torch.float64)
    statistics = RunningStatistics(layer, collected=collected)
    if moved:
        layer.double()
    else:
        other = GhostBatchNorm2d(3, ghost_batch=4, dtype=torch.float64)
        layer.load_state_dict(other.state_dict(), assign=True)
    images = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    layer(images)
    statistics.collect()
    statistics.update()
    mean, variance = images.mean((0, 2, 3)), images.var((0, 2, 3))
    assert layer.running_mean is not None
    assert layer.running_var is not None
    close(layer.running_mean, 0.1 * mean)
    close(layer.running_var, 0.9 + 0.1 * variance)
    assert layer.num_batches_tracked == 1
