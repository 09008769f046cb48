"""BatchNorm's per-channel kernels against torch's own batch_norm and autograd, in float64."""

import pytest
import torch
from torch import distributed
from torch.nn import functional as F

from tests.helpers import KERNEL_DEVICE
from tritonbnn.contract import Averages, Options, Statistics
from tritonbnn.kernels import unit_norm

CHANNELS, EPS = 19, 1e-3


def options(**changes):
    given = Options(1, "identity", True, EPS, "keep", None, False)
    return given._replace(**changes)


def problem(kind, parts=7, rows=23):
    """a in parts, as passes divide it, and the sums that they leave; integers, or reals far off."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(parts, rows, CHANNELS, generator=generator) * 9
    a = a.round() if kind == "integers" else a + 100
    pivot = None if kind == "integers" else a[0, 0].clone()
    d = a if pivot is None else a - pivot
    sums = torch.stack((d.sum(1), (d * d).sum(1)), dim=1)
    sums = sums.to(torch.int64) if kind == "integers" else sums
    return a.view(-1, CHANNELS).double(), sums, pivot


def vectors():
    generator = torch.Generator().manual_seed(4)
    alpha, gamma, beta = torch.randn(3, CHANNELS, generator=generator)
    alpha = alpha.abs()
    alpha[3] = 0  # a dead filter
    return alpha, gamma, beta


def there(*tensors):
    return [None if t is None else t.to(KERNEL_DEVICE) for t in tensors]


def close(found, expected, tolerance=2e-6):
    scale = expected.abs().max().clamp(min=1)
    return (found.cpu().double() - expected).abs().max() <= tolerance * scale


def normalised(a, found):
    """a by the vectors that were found, as the passes apply them."""
    centre, scale, offset = found[:3].cpu().double()
    return (a - centre) * scale + offset


@pytest.mark.parametrize("scaled", [True, False], ids=["alpha", "no-alpha"])
@pytest.mark.parametrize("kind", ["integers", "reals"])
def test_the_batchs_statistics_and_the_averages_that_they_move(unwritten_memory, kind, scaled):
    a, sums, pivot = problem(kind)
    alpha, gamma, beta = vectors()
    alpha = alpha if scaled else None
    mean, variance, counter = torch.ones(CHANNELS), torch.ones(CHANNELS), torch.tensor(4)
    moved = there(mean.clone(), variance.clone(), counter)
    averages = Averages(*moved, momentum=0.3)
    operands = there(sums, pivot)
    found, statistics = unit_norm.batch_norm(
        *operands, len(a), *there(alpha, gamma, beta), options(averages=averages)
    )
    y = a if alpha is None else a * alpha
    running = [mean.double(), variance.double()]
    expected = F.batch_norm(y, *running, gamma.double(), beta.double(), True, 0.3, EPS)
    assert close(normalised(a, found), expected, 3e-6)
    assert close(statistics[0], y.mean(0))
    assert close(statistics[1], y.var(0), 1e-5)
    for after, exact in zip(moved[:2], running, strict=True):
        assert close(after, exact, 1e-5)
    assert moved[2] == 5


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("most", [1024, 3], ids=["at-once", "in-splits"])
def test_blocks_moments_are_joined(unwritten_memory, monkeypatch, most, shared):
    """Each block's squares are about its own mean; the last block is short."""
    monkeypatch.setattr(unit_norm, "MOST_PARTS", most)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor, group: tensor.mul_(2))
    rows, generator = 4, torch.Generator().manual_seed(6)
    a = torch.randn(1027, CHANNELS, generator=generator) + 1000
    a[:600] += 3  # blocks differ by more than chance
    blocks = a.double().split(rows)
    sums = [torch.stack((b.sum(0), (b - b.mean(0)).square().sum(0))) for b in blocks]
    shares, *norm = there(torch.stack(sums).float(), None, *vectors()[1:])
    taken = options(group=object() if shared else None)
    joined = (shares, None, len(a), *norm, taken)
    found, statistics = unit_norm.batch_norm(*joined, rows=rows)
    wide = a.double()
    assert close(statistics[0], wide.mean(0), 1e-6)
    exact = torch.cat((wide, wide)).var(0) if shared else wide.var(0)
    # blocks' sums are rounded to float32
    assert ((statistics[1].cpu() - exact).abs() <= 1e-5 * exact).all()
    gamma, beta = vectors()[1:]
    expected = F.batch_norm(wide, None, None, gamma.double(), beta.double(), True, 0.0, EPS)
    assert close(normalised(wide, found), expected, 1e-4)  # the centre is float32


def test_a_batch_without_values_is_counted_and_moves_nothing(unwritten_memory):
    averages = Averages(*there(torch.ones(CHANNELS), torch.ones(CHANNELS), torch.tensor(4)), 0.3)
    sums = torch.empty((0, 2, CHANNELS), dtype=torch.int64, device=KERNEL_DEVICE)
    alpha, gamma, beta = there(*vectors())
    found, _ = unit_norm.batch_norm(sums, None, 0, alpha, gamma, beta, options(averages=averages))
    assert found.isfinite().all()
    assert (averages.mean == 1).all()
    assert (averages.variance == 1).all()
    assert averages.counter == 5


@pytest.mark.parametrize("scaled", [True, False], ids=["alpha", "no-alpha"])
def test_given_statistics(unwritten_memory, scaled):
    a, _, _ = problem("integers")
    alpha, gamma, beta = vectors()
    alpha = alpha if scaled else None
    given = Statistics(torch.linspace(-1, 1, CHANNELS), torch.linspace(0.5, 2, CHANNELS))
    on_device = Statistics(*there(*given))
    found, copied = unit_norm.given_norm(on_device, *there(alpha, gamma, beta), EPS)
    y = a if alpha is None else a * alpha
    wide = [v.double() for v in (*given, gamma, beta)]
    assert close(normalised(a, found), F.batch_norm(y, *wide, False, 0.0, EPS), 3e-6)
    assert torch.equal(copied.cpu(), torch.stack(given))


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("kind", ["integers", "reals"])
def test_gradients_are_autograds(unwritten_memory, monkeypatch, kind, shared):
    """Of this process's values; shared with one that has the very same, means do not change."""
    a, sums, pivot = problem(kind)
    alpha, gamma, beta = vectors()
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor, group: tensor.mul_(2))
    group = object() if shared else None
    taken = options(group=group)
    found, _ = unit_norm.batch_norm(*there(sums, pivot), len(a), *there(alpha, gamma, beta), taken)
    generator = torch.Generator().manual_seed(5)
    du, others = torch.randn(len(a), CHANNELS, generator=generator), torch.randn(7, 2, CHANNELS)
    centred = a - found[0].cpu().double()
    parts = [each.view(7, -1, CHANNELS).sum(1).float() for each in (du, du * centred)]
    partial = torch.stack((*parts, *others.unbind(1)), dim=1)
    grads, coefficients = unit_norm.norm_grads(*there(partial), found, *there(alpha, gamma), group)
    y = (a * alpha).requires_grad_()
    wide = [v.double().requires_grad_() for v in (gamma, beta)]
    z = F.batch_norm(y, None, None, *wide, True, 0.0, EPS)
    dy, dgamma, dbeta = torch.autograd.grad(z, (y, *wide), du.double())
    du_scale, a_scale, constant = coefficients.cpu().double()
    assert close(du_scale * du + a_scale * a + constant, dy, 1e-5)
    rows = (dgamma, dbeta, dbeta, *others.double().sum(0))
    for row, exact in zip(grads, rows, strict=True):
        assert close(row, exact, 1e-5)
