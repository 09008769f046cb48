"""The product of packed sign matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import KERNEL_DEVICE, plus_minus
from tritonbnn import eager, kernels
from tritonbnn.kernels import config

TILES = {
    "int8": config.TileConfig(32, 32, 64, 4, 2),
    "popcount": config.TileConfig(16, 32, 32, 4, 1),
}
SIZES = [(1, 1, 1), (3, 5, 31), (16, 33, 32), (33, 16, 33), (40, 70, 96), (5, 3, 300)]


def operands(m, n, k):
    """Two sign matrices as numbers, and packed."""
    a, b = plus_minus(m, k, seed=m), plus_minus(n, k, seed=n + 1)
    return a, b, eager.pack_signs(a), eager.pack_signs(b)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_product_is_exact(launchers, device, size):
    a, b, packed_a, packed_b = operands(*size)
    product = launchers.packed_matmul(packed_a.to(device), packed_b.to(device), size[2])
    assert product.dtype == torch.int32
    assert torch.equal(product.cpu().long(), a.long() @ b.long().T)


@pytest.mark.parametrize("formulation", TILES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_both_formulations_are_exact(formulation, size):
    a, b, packed_a, packed_b = operands(*size)
    with config.using(config.Choice(formulation, TILES[formulation])):
        on_device = packed_a.to(KERNEL_DEVICE), packed_b.to(KERNEL_DEVICE)
        product = kernels.packed_matmul(*on_device, size[2])
    assert torch.equal(product.cpu().long(), a.long() @ b.long().T)


@settings(derandomize=True, deadline=None, max_examples=12)
@given(m=st.integers(1, 20), n=st.integers(1, 20), k=st.integers(1, 80), data=st.data())
def test_any_size_agrees_with_int64(m, n, k, data):
    a, b, packed_a, packed_b = operands(m, n, k)
    formulation = data.draw(st.sampled_from(sorted(TILES)))
    with config.using(config.Choice(formulation, TILES[formulation])):
        product = kernels.packed_matmul(packed_a.to(KERNEL_DEVICE), packed_b.to(KERNEL_DEVICE), k)
    truth = a.long() @ b.long().T
    assert torch.equal(product.cpu().long(), truth)
    assert torch.equal(eager.packed_matmul(packed_a, packed_b, k).long(), truth)


@pytest.mark.parametrize(("m", "n"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_times_something_is_empty(launchers, device, m, n):
    a = torch.zeros(m, 2, dtype=torch.int32, device=device)
    b = torch.zeros(n, 2, dtype=torch.int32, device=device)
    assert launchers.packed_matmul(a, b, 40).shape == (m, n)


def test_bad_input_is_named():
    a = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="b must hold 2 words for 40 channels"):
        kernels.packed_matmul(a, a[:, :1], 40)
    with pytest.raises(TypeError, match="a must be packed signs in int32"):
        kernels.packed_matmul(a.float(), a, 40)
    with pytest.raises(ValueError, match="number of channels must be at least 1, not -1"):
        kernels.packed_matmul(a, a, -1)
