"""Modules behave as torch.nn's do: PyTorch's own checks of modules, for ours and for networks.

Arguments and attributes, pickling, meta device, memory formats, and views as input and gradient.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests.helpers import KERNEL_DEVICE, activation, gradient
from tritonbnn import ops
from tritonbnn.models import build_model
from tritonbnn.nn import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryLinear,
    BinaryUnit,
    RPReLU,
    RSign,
)

IMAGES = (3, 8, 6, 4)
SMALL = {"width": 0.25, "num_classes": 5, "small_images": True}

MODULES = {
    "conv": (lambda **p: BinaryConv2d(8, 16, 3, padding=1, shift=True, bias=True, **p), IMAGES),
    "conv_stride": (lambda **p: BinaryConv2d(8, 8, 3, 2, 1, **p), IMAGES),
    "conv_real": (lambda **p: BinaryConv2d(8, 16, 1, binary_weight=False, **p), IMAGES),
    "conv_library": (lambda **p: BinaryConv2d(8, 16, (5, 3), shift=True, groups=2, **p), IMAGES),
    "conv1d": (lambda **p: BinaryConv1d(8, 16, 3, shift=True, bias=True, **p), (3, 8, 7)),
    "linear": (lambda **p: BinaryLinear(8, 7, shift=True, bias=True, **p), (3, 5, 8)),
    "linear_real": (lambda **p: BinaryLinear(8, 7, binary_weight=False, **p), (5, 8)),
    "rsign": (lambda **p: RSign(8, **p), IMAGES),
    "rprelu": (lambda **p: RPReLU(8, **p), IMAGES),
    "rprelu_1d": (lambda **p: RPReLU(8, **p), (3, 8, 7)),
    "unit": (lambda **p: BinaryUnit(8, 8, 3, **p), IMAGES),
    "unit_pool": (lambda **p: BinaryUnit(8, 8, 3, 2, **p), IMAGES),
    "unit_widening": (lambda **p: BinaryUnit(8, 16, 3, 2, **p), IMAGES),
    "unit_real": (lambda **p: BinaryUnit(8, 16, 1, binary_weight=False, **p), IMAGES),
    "unit_recompute": (
        lambda **p: BinaryUnit(8, 8, 3, plan="recompute", binary_weight=False, **p),
        IMAGES,
    ),
    "unit_composed": (lambda **p: BinaryUnit(8, 8, 3, fused=False, **p), IMAGES),
}
NETWORKS = ("reactnet_a", "reactnet_18", "birealnet_18")
CONVOLUTIONS = [name for name in MODULES if "conv" in name or "unit" in name]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

MODULE = pytest.mark.parametrize("name", MODULES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def built(name, **place):
    torch.manual_seed(0)
    module = MODULES[name][0](**place)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def subject(name):
    """A module or a small network, in evaluation mode, and an input of it."""
    if name in NETWORKS:
        torch.manual_seed(0)
        return build_model(name, **SMALL).eval(), gradient(2, 3, 16, 16)
    return built(name).eval(), activation(*MODULES[name][1])


def passed(module, x, grad):
    """Output and all gradients."""
    leaves = [x.detach().requires_grad_(), *module.parameters()]
    y = module(leaves[0])
    return [y, *torch.autograd.grad(y, leaves, grad)]


@MODULE
@DTYPES
def test_device_and_dtype_are_those_of_all_that_is_made(name, dtype):
    module = built(name, dtype=dtype)
    floats = [t for t in module.state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {dtype}
    x = activation(*MODULES[name][1], dtype=dtype)
    assert module(x).dtype == dtype
    meta = MODULES[name][0](device="meta", dtype=dtype)
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}
    assert meta(x.to("meta")).shape == module(x).shape
    assert {n: t.shape for n, t in meta.state_dict().items()} == {
        n: t.shape for n, t in module.state_dict().items()
    }


@MODULE
def test_parameters_that_hold_anything_are_reset_to_what_they_were_at_the_start(name):
    module = MODULES[name][0](device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(3)
    module.reset_parameters()
    torch.manual_seed(3)
    fresh = MODULES[name][0]()
    for (key, a), b in zip(module.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_attributes_are_those_of_torchs_layers():
    options = {"stride": (2, 1), "padding": 1, "dilation": 2, "groups": 4, "bias": True}
    ours, theirs = (c(8, 12, (3, 5), **options) for c in (BinaryConv2d, nn.Conv2d))
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    for name in (*names, "groups", "padding_mode"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.bias.shape == theirs.bias.shape
    assert ours.weight.shape == theirs.weight.shape
    one, other = (c(8, 12, 3, padding="same") for c in (BinaryConv1d, nn.Conv1d))
    assert [getattr(one, n) for n in names] == [getattr(other, n) for n in names]
    assert (BinaryLinear(8, 7).in_features, BinaryLinear(8, 7).out_features) == (8, 7)
    unit = BinaryUnit(8, 16, (3, 3), (2, 2))
    assert (unit.in_channels, unit.out_channels, unit.kernel_size, unit.stride) == (8, 16, 3, 2)
    assert (RSign(8).num_features, RPReLU(8, channel_dim=-1).channel_dim) == (8, -1)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Linear])
def test_parameters_are_drawn_as_torchs_layers_draw_theirs(kind):
    ours = {nn.Conv1d: BinaryConv1d, nn.Conv2d: BinaryConv2d, nn.Linear: BinaryLinear}[kind]
    sizes = (6, 9) if kind is nn.Linear else (6, 9, 3)
    drawn = []
    for layer in (ours, kind):
        torch.manual_seed(5)
        drawn.append(layer(*sizes, bias=True))
    assert torch.equal(drawn[0].weight, drawn[1].weight)
    assert torch.equal(drawn[0].bias, drawn[1].bias)


@pytest.mark.parametrize("name", [*MODULES, *NETWORKS])
def test_a_copy_computes_the_same(name):
    module, x = subject(name)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(module)), copy.deepcopy(module)]
    copies.append(torch.load(file, weights_only=False))
    for twin in copies:
        assert repr(twin) == repr(module)
        assert torch.equal(twin(x), module(x))


def strided(x, dim):
    """The same numbers, every second of a wider tensor along a dimension."""
    dim %= x.dim()
    wide = torch.zeros(*x.shape[:dim], 2 * x.shape[dim], *x.shape[dim + 1 :], dtype=x.dtype)
    view = wide.unflatten(dim, (x.shape[dim], 2)).select(dim + 1, 0)
    view.copy_(x)
    return view


@MODULE
@DTYPES
def test_views_as_input_and_gradient(name, dtype):
    module = built(name, dtype=dtype)
    x = activation(*MODULES[name][1], dtype=dtype)
    grad = gradient(*module(x).shape, dtype=dtype)
    expected = passed(module, x, grad)
    views = [(strided(x, 1), grad), (x, strided(grad, 1)), (strided(x, 0), strided(grad, -1))]
    views += [(x, grad[:1].expand_as(grad)), (x.mT.contiguous().mT, grad.mT.contiguous().mT)]
    for x_view, grad_view in views:
        same = grad_view.stride()[0] != 0
        wanted = expected if same else passed(module, x, grad_view.contiguous())
        torch.testing.assert_close(passed(module, x_view, grad_view), wanted, check_stride=False)


def assert_in_format(tensor, memory_format):
    """By its strides, exactly: one channel or one pixel passes for both formats."""
    assert tensor.stride() == torch.empty_like(tensor, memory_format=memory_format).stride()


@pytest.mark.parametrize("name", [n for n in MODULES if len(MODULES[n][1]) == 4])
@pytest.mark.parametrize("input_format", FORMATS)
@pytest.mark.parametrize("module_format", FORMATS)
def test_memory_formats(name, input_format, module_format):
    """PyTorch's strict rule: an output is channels_last iff the input or a convolution's weight is.

    Gradients lie as what they are the gradients to.
    """
    device = KERNEL_DEVICE
    module = built(name).to(device, memory_format=FORMATS[module_format])
    module.train(input_format == "channels_last")  # both modes, in half the time
    x = activation(*MODULES[name][1]).to(device, memory_format=FORMATS[input_format])
    x.requires_grad_()
    y = module(x)
    converted = name in CONVOLUTIONS and module_format == "channels_last"
    last = input_format == "channels_last" or converted
    assert_in_format(y, torch.channels_last if last else torch.contiguous_format)
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(y, [x, *parameters.values()], gradient(*y.shape).to(device))
    for key, tensor, grad in zip(["x", *parameters], [x, *parameters.values()], grads, strict=True):
        if key == "x" and name == "unit_composed" and last != (input_format == "channels_last"):
            continue  # autograd adds what comes by two ways in the format of one of them
        assert grad.stride() == tensor.stride(), key


@pytest.mark.parametrize("size", [(3, 8, 1, 1), (3, 1, 5, 4), (1, 1, 1, 1), (0, 8, 3, 3)])
def test_one_channel_and_one_pixel_have_a_format_too(launchers, device, size):
    channels = size[1]
    weight = activation(8, channels, 1, 1).to(device)
    for memory_format in FORMATS.values():
        x = torch.empty(size, device=device, memory_format=memory_format)
        x = x.copy_(activation(*size) if x.numel() else x)
        both = [ops.binarize(x), nn.functional.conv2d(x, weight)]
        for ours, theirs in ((both[0], x), (ops.binary_conv2d(x, weight), both[1])):
            if x.numel():
                assert ours.stride() == theirs.stride()
        assert ops.binary_conv2d(x, weight).flatten(1).shape == (size[0], 8 * size[2] * size[3])


@pytest.mark.parametrize("name", ["conv", "conv_library", "linear_real", "rsign", "rprelu", "unit"])
def test_an_output_may_be_changed_in_place(launchers, device, name):
    """As nn.ReLU(inplace=True) does."""
    module = built(name).to(device)
    x = activation(*MODULES[name][1]).to(device).requires_grad_()
    y = module(x)
    grad = gradient(*y.shape).to(device)
    expected = torch.autograd.grad(y.mul(3), x, grad)
    torch.testing.assert_close(torch.autograd.grad(module(x).mul_(3), x, grad), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_converts_its_stream_once(name):
    """All units of a network that is given contiguous images see channels_last memory."""
    model, x = subject(name)
    seen = []
    for module in model.modules():
        if isinstance(module, BinaryUnit):
            module.register_forward_hook(lambda m, a, y: seen.extend((a[0], y)))
    for training in (False, True):
        model.train(training)
        model(x)
    assert len(seen) >= 64
    streams = [s if isinstance(s, torch.Tensor) else s[0] for s in seen]
    for stream in streams:
        assert_in_format(stream, torch.channels_last)


@pytest.mark.parametrize("name", NETWORKS)
@DTYPES
def test_a_network_takes_views_formats_and_dtypes(name, dtype):
    model, x = subject(name)
    model, x = model.to(dtype), x.detach().to(dtype)
    y = model(x)
    assert y.dtype == dtype
    grad = gradient(*y.shape, dtype=dtype)
    expected = passed(model, x, grad)
    last = x.contiguous(memory_format=torch.channels_last)
    views = [(strided(x, 1), grad), (strided(x, 0), strided(grad, 1)), (last, grad.mT.clone().mT)]
    for x_view, grad_view in views:
        torch.testing.assert_close(passed(model, x_view, grad_view), expected, check_stride=False)
    meta = copy.deepcopy(model).to("meta")
    assert meta(x.to("meta")).shape == y.shape
    with torch.device("meta"):
        fresh = build_model(name, **SMALL)
    assert {n: t.shape for n, t in fresh.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }


@pytest.mark.parametrize("name", ["conv", "linear", "conv1d"])
def test_input_without_a_batch(name):
    module, x = built(name), activation(*MODULES[name][1])
    one = module(x[0])
    assert one.stride() == module(x)[0].stride()
    torch.testing.assert_close(one, module(x)[0])


NO_TENSORS = [(torch.zeros(3),), [1.0], "text", torch.zeros(3, 8, 6, 4).numpy()]


@pytest.mark.parametrize("given", NO_TENSORS, ids=lambda x: type(x).__name__)
@MODULE
def test_what_is_no_tensor_is_named(name, given):
    """As a hook of the module before may return it."""
    module = nn.Sequential(nn.Identity(), built(name))
    module[0].register_forward_hook(lambda m, args, y: given)
    with pytest.raises(TypeError, match=f"must be .*not {type(given).__name__}"):
        module(activation(*MODULES[name][1]))


@pytest.mark.parametrize("part", ["stem", "blocks"])
def test_a_part_of_a_network_whose_hook_returns_no_tensor_is_named(part):
    model, x = subject("reactnet_a")
    model.get_submodule(part).register_forward_hook(lambda m, args, y: (y,))
    with pytest.raises(TypeError, match=f"the network's {part} must return a tensor, not tuple"):
        model(x)
