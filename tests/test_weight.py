"""A weight's forms and its gradient's last sum, against torch."""

import pytest
import torch

from tests.helpers import KERNEL_DEVICE
from tritonbnn import eager
from tritonbnn.kernels import weight as weights

SHAPES = [(3, 33, 3, 3), (3, 1, 1, 1), (2, 2080, 1, 1), (2, 64, 3, 3)]


def random_weight(shape, dtype=torch.float32, layout="contiguous"):
    """Around the clip's edges, with zeros of both signs, and on them."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator)
    w.view(-1)[::5] = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.5]).repeat(w.numel())[
        : len(w.view(-1)[::5])
    ]
    w = w.to(dtype).to(KERNEL_DEVICE)
    if layout == "channels_last" and w.dim() == 4:
        return w.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and w.dim() == 4:  # taps are not in a row
        return w.transpose(2, 3).contiguous().transpose(2, 3)
    return w


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((3, 33, 3, 3), torch.float32, "contiguous"),
        ((3, 33, 3, 3), torch.bfloat16, "transposed"),
        ((3, 1, 1, 1), torch.float16, "channels_last"),
        ((2, 2080, 1, 1), torch.float32, "channels_last"),
        ((2, 64, 3, 3), torch.bfloat16, "channels_last"),
        ((4, 40), torch.float16, "contiguous"),
    ],
)
def test_a_weight_is_prepared_in_one_launch(unwritten_memory, shape, dtype, layout):
    w = random_weight(shape, dtype, layout)
    packed, alpha, numbers = weights.prepare(w, numbers=True)
    expected = eager.pack_signs(w.cpu())
    assert torch.equal(packed.cpu(), expected)
    signs = torch.where(w.cpu() >= 0, 1, -1)
    rows = signs.movedim(1, -1).reshape(-1, shape[1])
    assert torch.equal(numbers.values.cpu().long(), rows)
    assert torch.equal(numbers.tap_sums.cpu().long(), rows.sum(1))
    mean = w.cpu().double().abs().flatten(1).mean(1)
    assert (alpha.cpu() - mean).abs().max() <= 1e-6 * mean.max()
    bare, again, nothing = weights.prepare(w, numbers=False)
    assert torch.equal(bare, packed)
    assert torch.equal(again, alpha)
    assert nothing is None


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_signs_expand_to_the_same_numbers(unwritten_memory, shape):
    w = random_weight(shape)
    packed, alpha, numbers = weights.prepare(w, numbers=True)
    for found, expected in zip(weights.expand(packed, shape[1]), numbers, strict=True):
        assert torch.equal(found, expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        real = weights.scaled(packed, alpha, shape[1], dtype)
        signs = torch.where(w >= 0, 1, -1)
        assert torch.equal(real, (alpha.to(dtype).view(-1, 1, 1, 1) * signs).to(dtype))
        assert real.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_splits_are_summed_and_clipped(unwritten_memory, shape, splits, layout):
    out, channels, k, _ = shape
    generator = torch.Generator().manual_seed(1)
    partial = torch.randn(splits, out * k * k, channels, generator=generator).to(KERNEL_DEVICE)
    total = partial.double().sum(0).view(out, k, k, channels).permute(0, 3, 1, 2)
    w = random_weight(shape, layout=layout)
    clipped = weights.summed(partial, w, shape)
    expected = torch.where(w.abs() > 1, 0.0, total)
    assert (clipped - expected).abs().max() <= 1e-6 * partial.abs().max() * splits
    assert (clipped == 0).sum() >= (w.abs() > 1).sum()
    if layout != "transposed":
        assert clipped.stride() == w.stride()
    bare = weights.summed(partial, None, shape)
    assert (bare - total).abs().max() <= 1e-6 * partial.abs().max() * splits
    assert bare.is_contiguous(memory_format=torch.channels_last)
