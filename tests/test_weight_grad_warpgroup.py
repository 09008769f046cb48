"""The weight's gradient whose signs lie in registers, in numpy or on a GPU that has the core."""

import pytest
import torch

from tests.conftest import HAS_GPU
from tests.helpers import KERNEL_DEVICE, gradient
from tests.test_conv import operands
from tritonbnn import eager, kernels
from tritonbnn.checks import conv_output_size
from tritonbnn.kernels import below_triton, config, targets, weight_grad
from tritonbnn.kernels.candidates import candidates
from tritonbnn.kernels.config import Choice, TileConfig
from tritonbnn.kernels.geometry import Geometry

SMALL, LARGE = TileConfig(64, 64, 64, 4, 3), TileConfig(256, 128, 64, 8, 2)
H100 = targets.TARGETS["sm_90"]


@pytest.fixture
def warpgroup(one_bit_core):
    if HAS_GPU and not below_triton.runs(KERNEL_DEVICE, "warpgroup"):
        pytest.skip("needs a GPU with the warpgroup's tensor core: sm_90")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("problem", "tile"),
    [
        ((3, 33, 7, 5, 40, 3, 1), SMALL),
        ((2, 160, 5, 9, 264, 3, 1), LARGE),
        ((5, 64, 6, 7, 8, 1, 1), SMALL),
        ((1, 1, 1, 1, 8, 3, 1), SMALL),
        ((3, 33, 8, 12, 40, 3, 2), SMALL),
        ((2, 160, 7, 9, 264, 3, 2), LARGE),
        ((3, 40, 9, 7, 16, 3, 2), SMALL),
        ((2, 32, 5, 8, 8, 1, 2), SMALL),
    ],
)
def test_it_is_that_of_eager_torch(warpgroup, problem, tile, dtype):
    batch, channels, height, width, outputs, k, stride = problem
    window = {"channels": channels, "kernel_size": k, "stride": stride, "padding": k // 2}
    x = operands(problem)[2]
    size = conv_output_size(height, width, k, stride, k // 2)
    grad = gradient(batch, outputs, *size, dtype=dtype)
    with config.using(Choice("warpgroup", tile)):
        found = kernels.conv_weight_grad(grad.to(KERNEL_DEVICE), x.to(KERNEL_DEVICE), **window)
    exact = eager.conv_weight_grad(grad.double(), x, **window)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "dtype", "formulation"),
    [
        (Geometry(256, 14, 14, 512, 512, 3, 1, 1), "bfloat16", "warpgroup"),
        (Geometry(256, 14, 14, 512, 512, 3, 1, 1), "float32", "library"),
        (Geometry(256, 14, 14, 512, 512, 3, 2, 1), "bfloat16", "warpgroup"),
        (Geometry(256, 14, 14, 512, 510, 1, 1, 0), "bfloat16", "library"),
        (Geometry(256, 14, 14, 32, 64, 1, 1, 0), "bfloat16", "warpgroup"),
        (Geometry(256, 14, 14, 32, 32, 3, 1, 1), "bfloat16", "library"),
    ],
)
def test_what_it_does_not_take_is_the_librarys(layer, dtype, formulation):
    key = layer.key("conv_weight_grad", dtype)
    choice = config.default(key, target=H100)
    assert choice.formulation == formulation
    assert all(config.takes(each.formulation, key) for each in candidates(key, H100))
    assert config.default(key, target=targets.TARGETS["sm_80"]).formulation == "dot"


def test_what_is_not_trusted_is_the_librarys(monkeypatch):
    layer = Geometry(2, 5, 3, 64, 8, 3, 1, 1)
    with config.using(H100):
        for trusted, formulation in ((True, "warpgroup"), (False, "library")):
            monkeypatch.setattr(below_triton, "runs", lambda *_, known=trusted: known)
            found = weight_grad._choice(layer, torch.bfloat16, torch.device("meta"))
            assert found.formulation == formulation
