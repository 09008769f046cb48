"""A weight's forms and its gradient's last sum, against torch."""

import itertools

import pytest
import torch

from tests.helpers import KERNEL_DEVICE
from tritonbnn import eager
from tritonbnn.kernels import weight as weights
from tritonbnn.kernels.cut import Cut

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
    bare, again, nothing = weights.prepare(w)
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
        real, nothing = weights.scaled(packed, alpha, shape[1], dtype)
        assert nothing is None
        signs = torch.where(w >= 0, 1, -1)
        assert torch.equal(real, (alpha.to(dtype).view(-1, 1, 1, 1) * signs).to(dtype))
        assert real.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("cut", [Cut(1, 4, 4, 2), Cut(2, 1, 2, 1)], ids=str)
@pytest.mark.parametrize("shape", [(20, 33, 3, 3), (3, 1, 1, 1), (17, 544, 1, 1)])
def test_fragments_hold_every_word_where_a_lane_reads_it(unwritten_memory, shape, cut):
    w = random_weight(shape)
    packed, alpha, fragments = weights.prepare(w, cut=cut)
    out, _, k, _ = shape
    rows = packed.cpu().view(out, -1)
    tiles, chunks = fragments.words.shape[:2]
    assert tiles % (cut.warps_o * cut.tiles_o) == 0
    padded = torch.zeros(16 * tiles, 16 * chunks, dtype=torch.int32)
    padded[:out, : rows.shape[1]] = rows
    filters, found = padded.tolist(), fragments.words.tolist()
    for tile, chunk, step, lane, register in itertools.product(
        range(tiles), range(chunks), range(2), range(32), range(4)
    ):
        first = tile // cut.tiles_o * 16 * cut.tiles_o
        channel = first + lane // 4 * 2 * cut.tiles_o + tile % cut.tiles_o * 2 + register % 2
        word = 16 * chunk + lane % 4 * 4 + step * 2 + register // 2
        assert found[tile][chunk][step][lane][register] == filters[channel][word]
    signs = torch.where(w.cpu() >= 0, 1, -1).sum(1)
    for border in range(len(fragments.base)):
        inside = torch.ones(k, k, dtype=torch.bool)
        for bit, side in enumerate((inside[0], inside[-1], inside[:, 0], inside[:, -1])):
            if border >> bit & 1:
                side.fill_(False)
        assert torch.equal(fragments.base[border].cpu().long(), -(signs * inside).sum((1, 2)))
    again = weights.fragments_of(packed, shape[1], cut)
    real, both = weights.scaled(packed, alpha, shape[1], torch.bfloat16, cut)
    assert torch.equal(real, weights.scaled(packed, alpha, shape[1], torch.bfloat16)[0])
    for other in (again, both):
        assert torch.equal(other.words, fragments.words)
        assert torch.equal(other.base, fragments.base)


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


def test_one_split_may_be_the_librarys_own_gradient(unwritten_memory):
    out, channels, k, _ = shape = SHAPES[0]
    partial = torch.randn(1, out * k * k, channels).to(KERNEL_DEVICE, torch.bfloat16)
    w = random_weight(shape)
    bare = weights.summed(partial, None, shape)
    assert bare.dtype == torch.float32
    assert torch.equal(bare.permute(0, 2, 3, 1).reshape(partial.shape), partial.float())
    clipped = weights.summed(partial, w, shape)
    assert clipped.dtype == torch.float32
    assert torch.equal(clipped, torch.where(w.abs() > 1, 0.0, bare))
