"""The small Functions: value and every gradient against float64 autograd, on both backends."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import activation, assert_no_worse_than_eager, vectors
from tritonbnn import ops, reference
from tritonbnn.nn import BinaryConv2d, BinaryLinear, RPReLU, RSign
from tritonbnn.ops.signs import clipped_weight_grad

SHAPES = [
    pytest.param((2, 32, 7, 7), "channels_last", id="ordinary"),
    pytest.param((3, 33, 5, 3), "contiguous", id="odd"),
    pytest.param((1, 1, 1, 7), "strided", id="one-channel-strided"),
    pytest.param((2, 96, 1, 1), "contiguous", id="one-pixel"),
]


def compare(function, truth, tensors, device, dtype=torch.float32):
    """Value and gradients of ``function``, no worse than ``truth`` run in the same dtype."""
    results = []
    for run, on, to in ((function, device, dtype), (truth, "cpu", dtype), (truth, "cpu", None)):
        leaves = {
            k: v.to(on, torch.float64 if to is None else v.dtype).detach().requires_grad_()
            for k, v in tensors.items()
        }
        y = run(**leaves)
        grad = activation(*y.shape, dtype=dtype, seed=11).to(y)
        results.append([y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad)])
    for result, plain, exact in zip(*results, strict=True):
        assert_no_worse_than_eager(result, plain, exact)


@pytest.mark.parametrize(("shape", "layout"), SHAPES)
def test_binarize(launchers, device, shape, layout):
    tensors = {"x": activation(*shape, layout=layout), "shift": vectors(1, shape[1])[0]}
    compare(ops.binarize, reference.binarize, tensors, device)


@pytest.mark.parametrize(("shape", "layout"), SHAPES)
def test_rprelu(launchers, device, shape, layout):
    shift_in, slope, shift_out = vectors(3, shape[1])
    tensors = {"x": activation(*shape, layout=layout), "shift_in": shift_in}
    tensors |= {"slope": slope, "shift_out": shift_out}
    compare(ops.rprelu, reference.rprelu, tensors, device)


@pytest.mark.parametrize("binary_weight", [True, False], ids=["step2", "step1"])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (1, 1)])
@pytest.mark.parametrize(("shape", "layout"), SHAPES)
def test_binary_conv2d(launchers, device, shape, layout, kernel_size, stride, binary_weight):
    tensors = {
        "x": activation(*shape, layout=layout),
        "weight": activation(40, shape[1], kernel_size, kernel_size, seed=3) * 0.7,
        "shift": vectors(1, shape[1])[0],
    }
    options = {"stride": stride, "padding": kernel_size // 2, "binary_weight": binary_weight}
    compare(
        lambda **t: ops.binary_conv2d(**t, **options),
        lambda **t: reference.binary_conv2d(**t, **options),
        tensors,
        device,
    )


@pytest.mark.parametrize(("rows", "features"), [(5, 32), (3, 33), (1, 1)])
def test_binary_linear(launchers, device, rows, features):
    tensors = {
        "x": activation(rows, features),
        "weight": activation(7, features, seed=3) * 0.7,
        "shift": vectors(1, features)[0],
    }
    compare(ops.binary_linear, reference.binary_linear, tensors, device)


def test_binary_linear_takes_leading_dimensions(launchers, device):
    x, weight = activation(2, 3, 5, 33).to(device), activation(7, 33, seed=3).to(device)
    rows = ops.binary_linear(x.reshape(-1, 33), weight)
    assert torch.equal(ops.binary_linear(x, weight), rows.view(2, 3, 5, 7))


def test_convolution_saw_only_signs_and_scales(launchers, device):
    """Changing magnitudes but no sign of x, and no |w| mean, changes nothing."""
    x, weight = activation(2, 33, 5, 5), activation(8, 33, 3, 3, seed=3)
    magnitude = weight.abs().mean(dim=(1, 2, 3), keepdim=True)
    flat = torch.where(weight >= 0, magnitude, -magnitude)
    y = ops.binary_conv2d(x.to(device), weight.to(device), padding=1)
    same = ops.binary_conv2d((x * 3).to(device), flat.to(device), padding=1)
    integers = F.conv2d(reference.hard_sign(x), reference.hard_sign(weight), padding=1)
    expected = integers.double() * magnitude.double().view(1, -1, 1, 1)
    assert torch.allclose(y, same, rtol=1e-6)
    assert torch.allclose(y.cpu().double(), expected, rtol=1e-6)


def test_gradient_at_the_corners(launchers, device):
    x = torch.tensor([[-1.0, -0.5, 0.0, -0.0, 0.5, 1.0, 2.0, 1e30]], device=device)
    x.requires_grad_()
    ops.binarize(x).sum().backward()
    assert x.grad.tolist() == [[0, 1, 2, 2, 1, 0, 0, 0]]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_clipped_gradient_has_the_weights_layout(memory_format):
    weight = (2 * activation(8, 33, 3, 3)).contiguous(memory_format=memory_format)
    grad = activation(8, 33, 3, 3, seed=1).contiguous(memory_format=torch.channels_last)
    expected = torch.where(weight.abs() <= 1, grad, 0)
    clipped = clipped_weight_grad(grad, weight)  # it may overwrite grad
    assert clipped.stride() == weight.stride()
    assert torch.equal(clipped, expected)


def test_weight_gradient_is_masked_outside_the_clip(launchers, device):
    edge = 1 + torch.finfo(torch.float32).eps
    weight = torch.tensor([[1.0, -1.0, edge, -edge]], device=device, requires_grad=True)
    ops.binary_linear(torch.ones(1, 4, device=device), weight).sum().backward()
    assert weight.grad.tolist() == [[1, 1, 0, 0]]


def test_only_the_gradients_asked_for_are_computed(launchers, device):
    x = activation(2, 8, 5, 5).to(device)
    weight = activation(8, 8, 3, 3, seed=3).to(device)
    shift = torch.zeros(8, device=device)
    for wanted in ("x", "weight", "shift"):
        t = {"x": x.clone(), "weight": weight.clone(), "shift": shift.clone()}
        t[wanted].requires_grad_()
        ops.binary_conv2d(**t, padding=1).square().sum().backward()
        assert [k for k, v in t.items() if v.grad is not None] == [wanted]


def test_an_empty_batch_has_shape_and_gradient(launchers, device):
    x = torch.zeros(0, 33, 4, 4, device=device, requires_grad=True)
    weight = activation(8, 33, 3, 3).to(device).requires_grad_()
    y = ops.binary_conv2d(x, weight, stride=2, padding=1)
    y.sum().backward()
    assert y.shape == (0, 8, 2, 2)
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_modules_call_the_functions():
    torch.manual_seed(0)
    x = activation(2, 33, 5, 5)
    conv, linear, sign, act = (
        BinaryConv2d(33, 8, 3, 2, 1),
        BinaryLinear(33, 8),
        RSign(33),
        RPReLU(33),
    )
    for parameter in (*sign.parameters(), *act.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert torch.equal(conv(x), ops.binary_conv2d(x, conv.weight, stride=2, padding=1))
    assert torch.equal(linear(x[:, :, 0, 0]), ops.binary_linear(x[:, :, 0, 0], linear.weight))
    assert torch.equal(sign(x), ops.binarize(x, sign.shift))
    assert torch.equal(act(x), ops.rprelu(x, act.shift_in, act.slope, act.shift_out))
    assert "33, 8, kernel_size=(3, 3), stride=(2, 2)" in repr(conv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_followed(dtype):
    x, weight = activation(2, 33, 5, 5).requires_grad_(), activation(8, 33, 3, 3).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = ops.binary_conv2d(x, weight, padding=1)
        z = ops.binary_linear(x[:, :, 0, 0], weight[:, :, 0, 0])
    (y.float().sum() + z.float().sum()).backward()
    assert y.dtype == z.dtype == dtype
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["binarize", "rprelu", "binary_conv2d", "binary_linear"])
def test_double_backward_raises(name):
    x = activation(2, 8).requires_grad_()
    vector = torch.ones(8)
    calls = {
        "binarize": lambda: ops.binarize(x),
        "rprelu": lambda: ops.rprelu(x, vector, vector, vector),
        "binary_conv2d": lambda: ops.binary_conv2d(x[:, :, None, None], torch.ones(3, 8, 1, 1)),
        "binary_linear": lambda: ops.binary_linear(x, torch.ones(3, 8)),
    }
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(calls[name]().sum(), x, create_graph=True)


X, W = torch.zeros(2, 8, 4, 4), torch.zeros(8, 8, 3, 3)
BAD = [
    (lambda: ops.binarize(X.int()), TypeError, "x must be a tensor of float32"),
    (lambda: ops.binarize(X[0, 0, 0, 0]), ValueError, r"channel_dim is 1, which .* \(\) does not"),
    (lambda: ops.binarize(X[:, :0]), ValueError, "at least one channel"),
    (lambda: ops.binarize(X, torch.zeros(7)), ValueError, "x must have 7 channels in dimension 1"),
    (lambda: ops.binarize(X[0], torch.zeros(8)), ValueError, "give channel_dim=-3"),
    (lambda: ops.binarize(X, torch.zeros(8, device="meta")), ValueError, "one device"),
    (lambda: ops.rprelu(X, *[torch.zeros(9)] * 3), ValueError, "x must have 9 channels"),
    (lambda: ops.rprelu(X, W[0, 0, 0], W[0, 0], W[0, 0, 0]), ValueError, r"slope \(3, 3\)"),
    (lambda: ops.binary_conv2d(X, W[:, :4], padding=1), ValueError, r"\(O, 8 / groups, kh, kw\)"),
    (lambda: ops.binary_conv2d(X, W[:7, :4], groups=2), ValueError, "multiple of groups=2"),
    (lambda: ops.binary_conv2d(X[0, 0], W), ValueError, "3 or 4 dimensions"),
    (lambda: ops.binary_conv2d(X, W.int(), padding=1), TypeError, "weight must be a tensor of"),
    (lambda: ops.binary_conv2d(X, W, padding=-1), ValueError, "padding must be an int or 2 ints"),
    (lambda: ops.binary_conv2d(X, W, padding=(1,)), ValueError, r"or 2 ints, .* not \(1,\)"),
    (lambda: ops.binary_conv2d(X, W, padding="full"), ValueError, "'same' or 'valid', not 'full'"),
    (lambda: ops.binary_conv2d(X, W, stride=2, padding="same"), ValueError, "needs stride 1"),
    (lambda: ops.binary_conv2d(X, W, stride=0), ValueError, "stride must be .* at least 1, not 0"),
    (lambda: ops.binary_conv2d(X, W, dilation=2), ValueError, "4 x 4 is too small for a kernel"),
    (lambda: ops.binary_conv2d(X, W, bias=torch.ones(7)), ValueError, r"bias must have shape \(8"),
    (lambda: ops.binary_conv1d(X, W[0]), ValueError, r"x must have shape \(N, C, L\)"),
    (lambda: ops.binary_linear(X, W[0, 0]), ValueError, "must share K"),
    (lambda: ops.pack_signs(X.long()), TypeError, "x must be a tensor of float32"),
    (lambda: ops.unpack_signs(X, 8), TypeError, "packed must be packed signs in int32"),
    (lambda: ops.unpack_signs(X.int(), 8), ValueError, "must hold 1 words for 8 channels"),
    (lambda: ops.unpack_signs(X[0].int()[..., :1], 8), ValueError, "2 or 4 dimensions"),
    (lambda: ops.packed_matmul(X[0, 0].int(), X[0, 0].int(), 0), ValueError, "at least 1"),
    (lambda: ops.packed_matmul(X[0, 0].int(), X[0, 0].int(), 33), ValueError, "a must hold 2"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
