"""Packing signs and unpacking them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import INPUTS, activation, device_of, gradient, vectors
from tritonbnn import eager, kernels, ops


def bit_by_bit(x):
    """The definition, in Python integers: channel c is bit c % 32 of word c // 32."""
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    packed = []
    for row in rows.tolist():
        values = [0] * -(-len(row) // 32)
        for channel, value in enumerate(row):
            values[channel // 32] |= (value >= 0) << channel % 32
        packed.append([word - (word >> 31 << 32) for word in values])
    return torch.tensor(packed, dtype=torch.int32)


@pytest.mark.parametrize(("shape", "dtype", "layout"), INPUTS)
def test_a_bit_is_one_where_the_shifted_value_is_not_negative(
    launchers, device, shape, dtype, layout
):
    x = activation(*shape, dtype=dtype, layout=layout)
    (shift,) = vectors(1, shape[1])
    packed = launchers.pack_signs(x.to(device))
    shifted = launchers.pack_signs(x.to(device), shift.to(device))
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert packed.shape == (shape[0], *shape[2:], -(-shape[1] // 32))
    assert torch.equal(packed.flatten(0, -2).cpu(), bit_by_bit(x))
    sums = x.float() + shift.view(-1, *[1] * (len(shape) - 2))
    assert torch.equal(shifted.flatten(0, -2).cpu(), bit_by_bit(sums))


@pytest.mark.parametrize(("shape", "dtype", "layout"), INPUTS)
def test_unpacking_gives_the_signs_back(launchers, device, shape, dtype, layout):
    x = activation(*shape, dtype=dtype, layout=layout)
    packed = eager.pack_signs(x).to(device)
    signs = launchers.unpack_signs(packed, shape[1], dtype)
    assert signs.dtype == dtype
    assert torch.equal(signs.cpu(), torch.where(x >= 0, 1.0, -1.0).to(dtype))
    assert signs.movedim(1, -1).is_contiguous()


def test_zero_is_positive_whatever_its_sign(launchers, device):
    x = torch.tensor([[0.0, -0.0, -1e-30, 1e-30]], device=device)
    assert launchers.pack_signs(x).tolist() == [[0b1011]]


@pytest.mark.parametrize("shape", [(0, 33, 5, 3), (2, 33, 0, 3), (0, 33)], ids=str)
def test_nothing_packs_to_nothing(launchers, device, shape):
    packed = launchers.pack_signs(torch.zeros(shape, device=device))
    assert packed.shape == (shape[0], *shape[2:], 2)
    assert launchers.unpack_signs(packed, 33, torch.float32).shape == shape


@pytest.mark.parametrize("shape", [(5, 33, 3, 3), (5, 70, 1, 1), (6, 40)], ids=str)
def test_a_weight_packs_to_signs_and_mean_magnitude(launchers, device, shape):
    weight = gradient(*shape)
    packed, alpha = launchers.pack_weight(weight.to(device))
    assert packed.shape == (shape[0], *shape[2:], -(-shape[1] // 32))
    assert torch.equal(packed.flatten(0, -2).cpu(), bit_by_bit(weight))
    torch.testing.assert_close(alpha.cpu(), weight.flatten(1).double().abs().mean(1).float())


@settings(derandomize=True, deadline=None, max_examples=10)
@given(rows=st.integers(1, 40), channels=st.integers(1, 70), seed=st.integers(0, 999))
def test_packing_undoes_unpacking(rows, channels, seed):
    for launchers in (eager, kernels):
        x = activation(rows, channels, seed=seed).to(device_of(launchers))
        packed = launchers.pack_signs(x)
        signs = launchers.unpack_signs(packed, channels, torch.float32)
        assert torch.equal(signs, torch.where(x >= 0, 1.0, -1.0))
        assert torch.equal(launchers.pack_signs(signs), packed)


@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (300, 32), (7, 70), (0, 4)], ids=str)
def test_difference_counts_the_bits_that_differ(launchers, device, shape):
    generator = torch.Generator().manual_seed(shape[1])
    a, b = torch.randint(-(2**31), 2**31, (2, *shape), generator=generator).int()
    b[::2] = a[::2]
    b[1::4] = ~a[1::4]
    expected = [
        sum(((x ^ y) & 0xFFFFFFFF).bit_count() for x, y in zip(*pair, strict=True))
        for pair in zip(a.tolist(), b.tolist(), strict=True)
    ]
    counts = launchers.packed_difference(a.to(device), b.to(device))
    assert (counts.dtype, counts.tolist()) == (torch.int32, expected)
    assert ops.packed_difference(a.to(device).T.contiguous().T, b.to(device)).tolist() == expected


def test_difference_refuses_what_it_cannot_compare():
    a = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"b must be packed signs in int32, not torch.int64"):
        ops.packed_difference(a, a.long())
    with pytest.raises(ValueError, match="a must have 2 dimensions, not 1"):
        ops.packed_difference(a[0], a)
    with pytest.raises(ValueError, match=r"one shape, not a \(2, 3\), b \(2, 2\)"):
        ops.packed_difference(a, a[:, :2])


def test_bad_input_is_named():
    packed = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"packed must be packed signs in int32, not torch.int64"):
        kernels.unpack_signs(packed.long(), 33, torch.float32)
    with pytest.raises(ValueError, match="packed must hold 1 words for 32 channels"):
        kernels.unpack_signs(packed, 32, torch.float32)
    with pytest.raises(ValueError, match=r"shift must have shape \(33,\), one value per channel"):
        kernels.pack_signs(torch.zeros(2, 33), torch.zeros(32))


def test_float64_is_sent_to_the_cpu():
    with pytest.raises(TypeError, match=r"x is float64.*tritonbnn.eager runs it"):
        kernels.pack_signs(torch.zeros(2, 3, dtype=torch.float64))
