"""The forward binary convolution, with packed and with real weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.helpers import (
    KERNEL_DEVICE,
    activation,
    assert_no_worse_than_eager,
    device_of,
    gradient,
    plus_minus,
    vectors,
)
from tritonbnn import eager, kernels, reference
from tritonbnn.kernels import config, conv
from tritonbnn.kernels.geometry import Geometry

TILES = {
    "int8": config.TileConfig(32, 32, 64, 4, 2),
    "popcount": config.TileConfig(16, 32, 32, 4, 1),
}
# batch, channels, height, width, outputs, kernel size, stride
PROBLEMS = [
    pytest.param((2, 32, 7, 7, 32, 3, 1), id="ordinary"),
    pytest.param((2, 33, 5, 3, 31, 3, 2), id="odd_stride_2"),
    pytest.param((3, 1, 1, 1, 1, 3, 1), id="one_pixel"),
    pytest.param((2, 31, 1, 7, 33, 1, 1), id="one_row_1x1"),
    pytest.param((1, 96, 7, 7, 40, 1, 2), id="stride_2_1x1"),
    pytest.param((2, 96, 5, 3, 33, 3, 1), id="three_words"),
]


def operands(problem):
    """Signs of input and weight as numbers, and what they pack to."""
    n, c, h, w, o, k, _ = problem
    x, weight = plus_minus(n, c, h, w), plus_minus(o, c, k, k, seed=3)
    return x, weight, eager.pack_signs(x), eager.pack_signs(weight)


def by_unfolding(x, weight, stride, padding):
    """The exact convolution: patches times weights, in int64."""
    n, o, k = x.shape[0], weight.shape[0], weight.shape[2]
    patches = F.unfold(x, k, stride=stride, padding=padding).long()
    y = weight.flatten(1).long() @ patches
    return y.view(n, o, (x.shape[2] + 2 * padding - k) // stride + 1, -1)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_signs_with_signs_are_exact_integers(launchers, device, problem):
    _, c, _, _, o, k, stride = problem
    x, weight, packed_x, packed_weight = operands(problem)
    (alpha,) = vectors(1, o)
    truth = by_unfolding(x, weight, stride, k // 2)
    arguments = {"channels": c, "stride": stride, "padding": k // 2}
    for dtype in (torch.int16, torch.int32, torch.float32):
        y = launchers.conv_packed(
            packed_x.to(device), packed_weight.to(device), None, dtype=dtype, **arguments
        )
        assert y.dtype == dtype
        assert y.permute(0, 2, 3, 1).is_contiguous()
        assert torch.equal(y.cpu().long(), truth)
    scaled = truth.float() * alpha.view(-1, 1, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = launchers.conv_packed(
            packed_x.to(device),
            packed_weight.to(device),
            alpha.to(device),
            dtype=dtype,
            **arguments,
        )
        assert torch.equal(y.cpu(), scaled.to(dtype))


@pytest.mark.parametrize("formulation", TILES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_both_formulations_are_exact(formulation, problem):
    _, c, _, _, _, k, stride = problem
    x, weight, packed_x, packed_weight = operands(problem)
    with config.using(config.Choice(formulation, TILES[formulation])):
        y = kernels.conv_packed(
            packed_x.to(KERNEL_DEVICE),
            packed_weight.to(KERNEL_DEVICE),
            None,
            channels=c,
            stride=stride,
            padding=k // 2,
            dtype=torch.int16,
        )
    assert torch.equal(y.cpu().long(), by_unfolding(x, weight, stride, k // 2))


@settings(derandomize=True, deadline=None, max_examples=8)
@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels=st.integers(1, 70),
    outputs=st.integers(1, 40),
    kernel_size=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
)
def test_any_problem_agrees_with_unfolding(size, channels, outputs, kernel_size, stride):
    problem = (2, channels, *size, outputs, kernel_size, stride)
    x, weight, packed_x, packed_weight = operands(problem)
    truth = by_unfolding(x, weight, stride, kernel_size // 2)
    arguments = {"channels": channels, "stride": stride, "padding": kernel_size // 2}
    for launchers in (eager, kernels):
        device = device_of(launchers)
        y = launchers.conv_packed(
            packed_x.to(device), packed_weight.to(device), None, dtype=torch.int32, **arguments
        )
        assert torch.equal(y.cpu().long(), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_signs_with_a_real_weight(launchers, device, problem, dtype):
    n, c, h, w, o, k, stride = problem
    x = activation(n, c, h, w)
    weight = gradient(o, c, k, k, seed=4)
    arguments = {"stride": stride, "padding": k // 2}
    y = launchers.conv_real(
        eager.pack_signs(x).to(device), weight.to(device), dtype=dtype, **arguments
    )
    assert y.dtype == dtype
    assert y.permute(0, 2, 3, 1).is_contiguous()
    ordinary = reference.binary_conv2d(
        x.to(dtype), weight.to(dtype), binary_weight=False, **arguments
    )
    truth = reference.binary_conv2d(x.double(), weight.double(), binary_weight=False, **arguments)
    assert_no_worse_than_eager(y, ordinary, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_real_convolution_leaves_its_moments(unwritten_memory, problem, dtype):
    n, c, h, w, o, k, stride = problem
    x, weight = activation(n, c, h, w), gradient(o, c, k, k, seed=4)
    x[:, : c // 2] = x[:, : c // 2].abs()
    weight[:, : c // 2] += 100  # so that means are far from 0
    packed, weight = eager.pack_signs(x).to(KERNEL_DEVICE), weight.to(KERNEL_DEVICE)
    geometry = Geometry(n, h, w, c, o, k, stride, k // 2)
    with config.using(config.Choice("dot", config.TileConfig(16, 16, 32, 4, 1))):
        y, moments = conv.real_convolved(packed, weight, geometry, dtype, summed=True)
    blocks = y.cpu().double().permute(0, 2, 3, 1).reshape(-1, o).split(moments.rows)
    assert len(blocks) == len(moments.sums)
    for block, (total, squares) in zip(blocks, moments.sums.cpu().double(), strict=True):
        scale = block.abs().max().clamp(min=1)
        assert (total - block.sum(0)).abs().max() <= 1e-6 * scale * len(block)
        exact = (block - block.mean(0)).square().sum(0)
        # what the mean is rounded by is lost, never a share of its square
        lost = 1e-4 * exact + len(block) * (1e-6 * scale) ** 2
        assert ((squares - exact).abs() <= lost).all()


def test_the_library_leaves_no_moments():
    packed = eager.pack_signs(activation(2, 33, 5, 3)).to(KERNEL_DEVICE)
    weight = activation(7, 33, 1, 1, seed=4).to(KERNEL_DEVICE)
    geometry = Geometry(2, 5, 3, 33, 7, 1, 1, 0)
    with config.using(config.Choice("library", config.TileConfig(16, 16, 32, 4, 1))):
        y, moments = conv.real_convolved(packed, weight, geometry, torch.float32, summed=True)
    assert y.shape == geometry.output_shape
    assert moments is None


def test_the_library_formulation_agrees():
    x, weight = activation(2, 33, 5, 3), activation(7, 33, 3, 3, seed=4)
    packed = eager.pack_signs(x)
    arguments = {"stride": 2, "padding": 1, "dtype": torch.float32}
    tile = config.TileConfig(16, 16, 32, 4, 1)
    with config.using(config.Choice("library", tile)):
        y = kernels.conv_real(packed.to(KERNEL_DEVICE), weight.to(KERNEL_DEVICE), **arguments)
    torch.testing.assert_close(y.cpu(), eager.conv_real(packed, weight, **arguments))


def test_an_empty_batch_convolves_to_nothing(launchers, device):
    x = torch.zeros(0, 5, 3, 2, dtype=torch.int32, device=device)
    weight = torch.zeros(7, 1, 1, 2, dtype=torch.int32, device=device)
    arguments = {"channels": 40, "stride": 1, "padding": 0}
    y = launchers.conv_packed(x, weight, None, dtype=torch.int16, **arguments)
    assert y.shape == (0, 7, 5, 3)
    real = torch.zeros(7, 40, 1, 1, device=device)
    y = launchers.conv_real(x, real, stride=1, padding=0, dtype=torch.float32)
    assert y.shape == (0, 7, 5, 3)


def test_bad_input_is_named():
    x = torch.zeros(2, 5, 3, 2, dtype=torch.int32)
    weight = torch.zeros(7, 3, 3, 2, dtype=torch.int32)
    good = {"channels": 40, "stride": 1, "padding": 1, "dtype": torch.int16}
    for bad, message in (
        ({"stride": 3}, "stride must be 1 or 2, not 3"),
        ({"padding": 0}, "padding must be 1 for kernel_size 3, not 0"),
        ({"channels": 65}, "x must hold 3 words for 65 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.conv_packed(x, weight, None, **{**good, **bad})
    with pytest.raises(ValueError, match="kernel_size must be 1 or 3, not 5"):
        kernels.conv_packed(x, torch.zeros(7, 5, 5, 2, dtype=torch.int32), None, **good)
    with pytest.raises(TypeError, match=r"x must be packed signs in int32, not torch.float32"):
        kernels.conv_packed(x.float(), weight, None, **good)
    with pytest.raises(TypeError, match=r"dtype is float64.*tritonbnn.eager"):
        kernels.conv_packed(x, weight, None, **{**good, "dtype": torch.float64})
    wide, many = (torch.empty(n, 1, 1, 2048, dtype=torch.int32, device="meta") for n in (1, 2**15))
    with pytest.raises(ValueError, match="at most 2147483647 weights in a layer, not 2147483648"):
        kernels.conv_packed(wide, many, None, **{**good, "channels": 2**16, "padding": 0})
    with pytest.raises(ValueError, match="one device, not x on cpu, weight on meta"):
        kernels.conv_packed(x, weight.to("meta"), None, **good)
