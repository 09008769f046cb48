"""Switches and tools of torch that users turn on around our operators: they work or say why not."""

import pytest
import torch

from tritonbnn import ops
from tritonbnn.kernels.library import contract
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryConv2d, BinaryLinear, BinaryUnit, RPReLU, RSign

MODULES = {
    "BinaryConv2d": (BinaryConv2d(8, 8, 3, padding=1), (2, 8, 5, 3)),
    "BinaryLinear": (BinaryLinear(8, 4), (3, 8)),
    "RSign": (RSign(8), (2, 8, 5, 3)),
    "RPReLU": (RPReLU(8), (2, 8, 5, 3)),
    "BinaryUnit": (BinaryUnit(8, 8, 3), (2, 8, 5, 3)),
    "network": (build_model("birealnet_18", width=0.125, num_classes=3), (2, 3, 32, 32)),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_trace_is_refused_in_one_line(name):
    """It turned sizes into tensors, whose addresses the C functions took for sizes."""
    module, shape = MODULES[name]
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace.* is not supported") as caught:
        torch.jit.trace(module.eval(), torch.randn(shape))
    assert "INTERNAL ASSERT" not in str(caught.value)


@pytest.mark.parametrize("name", MODULES)
def test_an_export_computes_the_same(name):
    module, shape = MODULES[name]
    x = torch.randn(shape)
    with torch.no_grad():
        exported = torch.export.export(module.eval(), (x,)).module()
        torch.testing.assert_close(exported(x), module(x), rtol=1e-4, atol=1e-4)


PRECISIONS = {
    "all": lambda: torch.backends,
    "cudnn": lambda: torch.backends.cudnn,
    "convolutions": lambda: torch.backends.cudnn.conv,
    "recurrent": lambda: torch.backends.cudnn.rnn,
    "products": lambda: torch.backends.cuda.matmul,
}


def precisions():
    return {name: owner().fp32_precision for name, owner in PRECISIONS.items()}


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_torch_s_precision_may_be_set_and_stays(name, precision):
    first = precisions()
    try:
        PRECISIONS[name]().fp32_precision = precision
        before = precisions()
        with contract():
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert torch.backends.cudnn.deterministic
        assert precisions() == before
        assert not torch.backends.cudnn.deterministic
    finally:
        for other, value in first.items():
            PRECISIONS[other]().fp32_precision = value


CALLS = {
    "binarize": lambda x: ops.binarize(x),
    "binary_conv2d": lambda x: ops.binary_conv2d(x, torch.ones(4, 8, 1, 1)),
    "binary_linear": lambda x: ops.binary_linear(x, torch.ones(4, 3)),
}


@pytest.mark.parametrize("name", CALLS)
def test_nan_is_seen_in_anomaly_mode(name):
    x = torch.ones(2, 8, 5, 3)
    with torch.autograd.set_detect_anomaly(True):
        assert CALLS[name](x).isfinite().all()
        x[1, 2, 3, 1] = float("nan")
        with pytest.raises(RuntimeError, match=r"\(.*3\) holds NaN, which the sign would hide"):
            CALLS[name](x)
    assert CALLS[name](x).isfinite().all()
