"""Convolutions by any window, and activations of any shape, against float64 autograd."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import activation, gradient, plus_minus, vectors
from tests.test_ops import compare
from tritonbnn import ops, reference
from tritonbnn.nn import BinaryConv1d, BinaryConv2d, BinaryUnit, RPReLU, RSign, pack_weights_

# of x and weight, and how they are convolved
WINDOWS = {
    "unpadded": ((2, 33, 5, 6), (7, 33, 3, 3), {}),
    "five": ((2, 9, 7, 6), (4, 9, 5, 5), {"padding": 2}),
    "seven_stride_3": ((2, 5, 9, 8), (4, 5, 7, 7), {"stride": 3, "padding": 1}),
    "oblong": ((2, 9, 6, 5), (4, 9, 1, 3), {"padding": (2, 0), "stride": (1, 2)}),
    "even_same": ((2, 9, 5, 4), (4, 9, 2, 4), {"padding": "same"}),
    "valid": ((2, 9, 5, 4), (4, 9, 3, 2), {"padding": "valid"}),
    "dilated_same": ((2, 9, 7, 6), (4, 9, 3, 3), {"padding": "same", "dilation": (2, 1)}),
    "grouped": ((2, 6, 5, 4), (9, 2, 3, 3), {"padding": 1, "groups": 3}),
    "depthwise": ((2, 5, 5, 4), (5, 1, 3, 3), {"padding": 1, "groups": 5}),
    "packed_same": ((2, 33, 5, 4), (7, 33, 3, 3), {"padding": "same"}),
    "lists": ((2, 9, 6, 5), (4, 9, 3, 3), {"padding": [1, 0], "stride": [1, 2]}),
    "packed_pairs": ((2, 33, 5, 4), (7, 33, 3, 3), {"padding": (1, 1), "stride": (2, 2)}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # the truth's
@pytest.mark.parametrize("binary_weight", [True, False], ids=["step2", "step1"])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_convolution_by_any_window(launchers, device, name, binary_weight):
    shape, weight_shape, options = WINDOWS[name]
    tensors = {
        "x": activation(*shape),
        "weight": activation(*weight_shape, seed=3) * 0.7,
        "shift": vectors(1, shape[1])[0],
        "bias": vectors(1, weight_shape[0], seed=4)[0],
    }
    options = options | {"binary_weight": binary_weight}
    compare(
        lambda **t: ops.binary_conv2d(**t, **options),
        lambda **t: reference.binary_conv2d(**t, **options),
        tensors,
        device,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_signs_are_exact_in_any_dtype(launchers, device, dtype):
    """Under autocast too, which would round them: 513 is none of bfloat16's numbers."""
    x, weight = plus_minus(2, 57, 3, 3).to(dtype), plus_minus(4, 57, 3, 3, seed=3)
    x[0], weight[0] = 1, 1
    y = ops.binary_conv2d(x.to(device), weight.to(device))
    exact = F.conv2d(x.double(), weight.double())
    assert exact.max() == 513
    assert torch.equal(y.cpu(), exact.to(dtype))
    with torch.autocast(device.type, dtype=dtype):
        cast = ops.binary_conv2d(x.float().to(device), weight.to(device))
    assert torch.equal(cast, y)


def test_an_input_that_is_binary_passes_its_gradient_by_any_window(launchers, device):
    x, weight = plus_minus(2, 5, 7, 6), activation(4, 5, 5, 5, seed=3)
    compare(ops.binary_conv2d, reference.binary_conv2d, {"x": x, "weight": weight}, device)


@pytest.mark.parametrize("binary_weight", [True, False], ids=["step2", "step1"])
def test_a_linear_layer_with_bias(launchers, device, binary_weight):
    x, weight = activation(5, 33), activation(7, 33, seed=3) * 0.7
    shift, bias = vectors(1, 33)[0], vectors(1, 7)[0]
    compare(
        lambda **t: ops.binary_linear(**t, binary_weight=binary_weight),
        lambda **t: reference.binary_linear(**t, binary_weight=binary_weight),
        {"x": x, "weight": weight, "shift": shift, "bias": bias},
        device,
    )


SEQUENCES = {
    "pointwise": {"kernel_size": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "same": {"kernel_size": (5,), "padding": "same", "dilation": 2, "bias": True},
    "grouped": {"kernel_size": 2, "groups": 3, "shift": True},
    "real": {"kernel_size": 3, "binary_weight": False},
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_convolution_of_sequences(name):
    options = SEQUENCES[name]
    layer = BinaryConv1d(6, 9, **options).double()
    x = activation(2, 6, 13).double().requires_grad_()
    y, grad = layer(x), gradient(*layer(x).shape, dtype=torch.float64)
    window = {k: options[k] for k in ("stride", "padding", "dilation", "groups") if k in options}
    weight = reference.binarize_weight(layer.weight) if layer.binary_weight else layer.weight
    truth = F.conv1d(reference.binarize(x, layer.shift), weight, layer.bias, **window)
    parameters = [x, *layer.parameters()]
    ours = torch.autograd.grad(y, parameters, grad)
    torch.testing.assert_close((y, ours), (truth, torch.autograd.grad(truth, parameters, grad)))
    torch.testing.assert_close(layer(x[0]), truth[0])


SHAPES = [
    ((9,), 1),
    ((4, 9), 1),
    ((4, 9, 7), 1),
    ((4, 7, 9), -1),
    ((9, 5, 3), -3),
    ((4, 9, 5, 3), -3),
    ((4, 5, 3, 9), 3),
    ((2, 9, 5, 3, 4), 1),
    ((2, 0, 9), 2),
]


@pytest.mark.parametrize("kind", [RSign, RPReLU])
@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_an_activation_of_any_shape(launchers, device, kind, shape, channel_dim, transposed):
    """The truth has the channels last, in rows."""
    layer = kind(9, channel_dim=channel_dim)
    for parameter, value in zip(layer.parameters(), vectors(3, 9), strict=False):
        parameter.data.copy_(value)
    layer.to(device)
    x = activation(*shape).to(device)
    x = x.mT.contiguous().mT if transposed and x.dim() > 1 else x
    x.requires_grad_()
    where = 0 if x.dim() == 1 else channel_dim
    rows = x.movedim(where, -1).reshape(-1, 9)
    function = reference.binarize if kind is RSign else reference.rprelu
    truth = function(rows, *layer.parameters()).view(x.movedim(where, -1).shape)
    truth = truth.movedim(-1, where)
    leaves, grad = [x, *layer.parameters()], gradient(*shape).to(device)
    ours = torch.autograd.grad(layer(x), leaves, grad)
    torch.testing.assert_close(
        (layer(x), ours), (truth, torch.autograd.grad(truth, leaves, grad)), check_stride=False
    )


@pytest.mark.parametrize("binary_weight", [True, False], ids=["step2", "step1"])
@pytest.mark.parametrize(("outputs", "size", "stride"), [(6, 5, 1), (12, 3, 2), (12, 7, 2)])
def test_a_unit_of_any_odd_kernel_that_may_widen_as_it_pools(outputs, size, stride, binary_weight):
    torch.manual_seed(0)
    unit = BinaryUnit(6, outputs, size, stride, binary_weight=binary_weight).double()
    for parameter in unit.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = torch.randn(3, 6, 8, 4, dtype=torch.float64, requires_grad=True)
    pooled = F.avg_pool2d(x, 2) if stride == 2 else x
    truth = reference.binary_unit(
        x,
        *(unit.shift_in, unit.weight, unit.bn.weight, unit.bn.bias),
        *(unit.shift_mid, unit.slope, unit.shift_out),
        shortcut=pooled if outputs == 6 else torch.cat((pooled, pooled), dim=1),
        stride=stride,
        padding=size // 2,
        binary_weight=binary_weight,
    )
    leaves, grad = [x, *unit.parameters()], torch.randn_like(truth)
    ours, z = dict(unit.named_parameters()), unit(x)
    order = ["shift_in", "weight", "bn.weight", "bn.bias", "shift_mid", "slope", "shift_out"]
    leaves = [x, *(ours[name] for name in order)]
    torch.testing.assert_close(
        (z, torch.autograd.grad(z, leaves, grad)), (truth, torch.autograd.grad(truth, leaves, grad))
    )


REFUSED = [
    (lambda: BinaryConv2d(8, 8, 0), "kernel_size must be an int or 2 ints, at least 1, not 0"),
    (lambda: BinaryConv2d(8, 8, (3, 3, 3)), "kernel_size must be an int or 2 ints"),
    (lambda: BinaryConv2d(8, 8, 2.5), "kernel_size must be an int or 2 ints"),
    (lambda: BinaryConv2d(8, 8, 3, stride=(2, 0)), "stride must be an int or 2 ints"),
    (lambda: BinaryConv2d(8, 8, 3, padding=-1), "padding must be an int or 2 ints, at least 0"),
    (lambda: BinaryConv2d(8, 8, 3, 2, padding="same"), "padding='same' needs stride 1, not 2 x 2"),
    (lambda: BinaryConv2d(8, 8, 3, padding="half"), "padding must be ints, 'same' or 'valid'"),
    (lambda: BinaryConv2d(8, 8, 3, groups=3), "in_channels must be a multiple of groups=3"),
    (lambda: BinaryConv2d(9, 8, 3, groups=3), "out_channels must be a multiple of groups=3"),
    (lambda: BinaryConv2d(8, 8, 3, padding_mode="reflect"), "torch.nn.functional.pad before"),
    (lambda: BinaryConv2d(0, 8, 3), "in_channels must be an int, at least 1, not 0"),
    (lambda: BinaryConv1d(8, 8, (3, 3)), "kernel_size must be an int, at least 1"),
    (lambda: pack_weights_(BinaryConv1d(8, 8, 3)), "use a BinaryConv2d with a kernel of one row"),
    (lambda: RSign(0), "num_features must be an int, at least 1, not 0"),
    (lambda: RPReLU(8.0), "num_features must be an int, at least 1, not 8.0"),
    (lambda: BinaryUnit(8, 12, 3), "does not lead from 8 to 12 channels: give it 8 or 16"),
    (lambda: BinaryUnit(8, 24, 3, stride=2), "does not lead from 8 to 24 channels"),
    (lambda: BinaryUnit(8, 8, 4), "kernel_size of a unit must be odd, not 4"),
    (lambda: BinaryUnit(8, 8, (3, 1)), "the same in both dimensions"),
    (lambda: BinaryUnit(8, 8, 3, stride=3), "stride of a unit must be 1 or 2, not 3"),
    (lambda: BinaryUnit(8, 8, 3, plan="forget"), "plan must be one of auto"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED)
def test_what_cannot_be_is_refused_when_it_is_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_wrong_number_of_channels_names_the_layers_own():
    for layer in (RSign(8), RPReLU(8)):
        with pytest.raises(ValueError, match=r"x must have 8 channels in dimension 1, not shape"):
            layer(torch.zeros(2, 7, 3))
        with pytest.raises(ValueError, match="dimension -1, give channel_dim=-1"):
            layer(torch.zeros(2, 7, 8))
