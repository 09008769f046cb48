"""The convolution with a real weight whose signs lie in registers, in numpy or on a GPU."""

import pytest
import torch

from tests.conftest import HAS_GPU
from tests.helpers import KERNEL_DEVICE, activation, gradient
from tritonbnn import eager, reference
from tritonbnn.kernels import below_triton, config, conv, targets
from tritonbnn.kernels.candidates import candidates
from tritonbnn.kernels.config import Choice, TileConfig
from tritonbnn.kernels.geometry import Geometry

SMALL, LARGE = TileConfig(64, 32, 32, 4, 3), TileConfig(128, 128, 64, 8, 4)
H100 = targets.TARGETS["sm_90"]

NEAR_ZERO = 1e-4
"""Error of a float32 sum: of K products of about 1 it is some K 2^-24, 4e-5 for the 648 here."""


@pytest.fixture
def warpgroup(one_bit_core):
    if HAS_GPU and not below_triton.runs(KERNEL_DEVICE, "warpgroup"):
        pytest.skip("needs a GPU with the warpgroup's tensor core: sm_90")


@pytest.mark.parametrize(
    ("layer", "tile", "dtype"),
    [
        (Geometry(2, 7, 9, 72, 136, 3, 1, 1), LARGE, torch.bfloat16),
        (Geometry(3, 7, 5, 40, 24, 3, 2, 1), SMALL, torch.bfloat16),
        (Geometry(3, 5, 9, 33, 40, 1, 1, 0), SMALL, torch.float16),
        (Geometry(1, 1, 1, 1, 8, 3, 1, 1), SMALL, torch.float16),
    ],
    ids=str,
)
def test_it_is_that_of_torch_and_so_are_its_moments(warpgroup, layer, tile, dtype):
    size, outputs = layer.kernel_size, layer.out_channels
    x = activation(layer.batch, layer.channels, layer.height, layer.width)
    weight = gradient(outputs, layer.channels, size, size, dtype=dtype, seed=4)
    operands = eager.pack_signs(x).to(KERNEL_DEVICE), weight.to(KERNEL_DEVICE)
    with config.using(Choice("warpgroup", tile)):
        y, moments = conv.real_convolved(*operands, layer, dtype, summed=True)
        alone, none = conv.real_convolved(*operands, layer, dtype, summed=False)
    window = {"stride": layer.stride, "padding": layer.padding, "binary_weight": False}
    exact = reference.binary_conv2d(x.double(), weight.double(), **window)
    torch.testing.assert_close(y.cpu().double(), exact, rtol=2**-8, atol=NEAR_ZERO)
    assert y.dtype == dtype
    assert torch.equal(y, alone)
    assert none is None
    blocks = y.cpu().double().permute(0, 2, 3, 1).reshape(-1, outputs).split(moments.rows)
    squares = [(block - block.mean(0)).square().sum(0) for block in blocks]
    expected = torch.stack((torch.stack([block.sum(0) for block in blocks]), torch.stack(squares)))
    found = moments.sums.cpu().double().transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=NEAR_ZERO)


@pytest.mark.parametrize(
    ("layer", "dtype", "formulation"),
    [
        (Geometry(256, 14, 14, 512, 512, 3, 1, 1), "bfloat16", "warpgroup"),
        (Geometry(256, 112, 112, 64, 64, 3, 2, 1), "float16", "warpgroup"),
        (Geometry(256, 112, 112, 32, 64, 1, 1, 0), "bfloat16", "warpgroup"),
        (Geometry(256, 14, 14, 512, 512, 3, 1, 1), "float32", "dot"),
        (Geometry(256, 14, 14, 512, 510, 1, 1, 0), "bfloat16", "dot"),
    ],
)
def test_what_it_does_not_take_is_tritons(layer, dtype, formulation):
    key = layer.key("conv_real", dtype)
    assert config.default(key, target=H100).formulation == formulation
    assert all(config.takes(each.formulation, key) for each in candidates(key, H100))
    assert config.default(key, target=targets.TARGETS["sm_80"]).formulation == "dot"


def test_what_is_not_trusted_is_tritons(monkeypatch):
    layer = Geometry(2, 5, 3, 64, 8, 3, 1, 1)
    with config.using(H100):
        for trusted, formulation in ((True, "warpgroup"), (False, "dot")):
            monkeypatch.setattr(below_triton, "runs", lambda *_, known=trusted: known)
            found = conv._real_choice(layer, torch.bfloat16, torch.device("meta"))
            assert found.formulation == formulation
