"""What is binary already passes its gradient: a sign, then a layer, against float64 autograd."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import activation, gradient, plus_minus, vectors
from tests.test_ops import compare
from tritonbnn import ops, reference
from tritonbnn.nn import BinaryConv2d, BinaryLinear, BinaryUnit, RSign, decayed_parameters

BETWEEN = {
    "nothing": lambda x: x,
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "shuffle": lambda x: x.unflatten(1, (3, 11)).transpose(1, 2).flatten(1, 2),
    "crop": lambda x: x[..., 1:],
}


@pytest.mark.parametrize(
    ("between", "binary_weight"), [*((name, True) for name in BETWEEN), ("nothing", False)]
)
def test_a_convolution_behind_a_sign(launchers, device, between, binary_weight):
    """The truth binarises once: its convolution is torch's own."""
    tensors = {
        "x": activation(2, 33, 6, 4),
        "weight": activation(7, 33, 3, 3, seed=3) * 0.7,
        "shift": vectors(1, 33)[0],
    }

    def ours(x, weight, shift):
        signs = BETWEEN[between](ops.binarize(x, shift))
        return ops.binary_conv2d(signs, weight, padding=1, binary_weight=binary_weight)

    def truth(x, weight, shift):
        signs = BETWEEN[between](reference.binarize(x, shift))
        weight = reference.binarize_weight(weight) if binary_weight else weight
        return F.conv2d(signs, weight, padding=1)

    compare(ours, truth, tensors, device)


def test_a_linear_layer_behind_a_sign_and_flatten(launchers, device):
    tensors = {
        "x": activation(3, 5, 3, 2),
        "weight": activation(7, 30, seed=3) * 0.7,
        "shift": vectors(1, 5)[0],
    }
    compare(
        lambda x, weight, shift: ops.binary_linear(ops.binarize(x, shift).flatten(1), weight),
        lambda x, weight, shift: F.linear(
            reference.binarize(x, shift).flatten(1), reference.binarize_weight(weight)
        ),
        tensors,
        device,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_layers_own_shift_does_the_same_as_an_rsign_before_it(launchers, device, dtype):
    torch.manual_seed(0)
    x, shift = activation(2, 8, 5, 3, dtype=dtype).to(device), vectors(1, 8)[0].to(device)
    layers = [BinaryConv2d(8, 7, 3, padding=1, shift=own).to(device) for own in (True, False)]
    sign = RSign(8).to(device)
    layers[1].weight = layers[0].weight
    layers[0].shift.data.copy_(shift)
    sign.shift.data.copy_(shift)
    results = []
    for stack in (layers[0], nn.Sequential(sign, layers[1])):
        leaf = x.clone().requires_grad_()
        y = stack(leaf)
        stack.zero_grad()
        y.backward(gradient(*y.shape, dtype=dtype).to(device))
        results.append([y, leaf.grad, *(p.grad.clone() for p in stack.parameters())])
    own, before = ({t.shape: t for t in result} for result in results)
    assert own.keys() == before.keys()
    for size, value in own.items():
        assert value.any()
        torch.testing.assert_close(before[size], value)


def test_an_input_with_one_real_value_is_real(launchers, device):
    """So the clipped quadratic holds for all of it, and stops what is +-1."""
    signs = plus_minus(2, 8, 3, 3).to(device)
    weight = activation(4, 8, 1, 1, seed=3).to(device)
    places = ((1, 2, 0, 1), (0, 7, 0, 0))  # the second in the first pixel, which is looked at first
    values = ((0.5, 1), (-0.0, 1), (1.5, 0))
    for place, (value, reached) in product(places, values):
        x = signs.clone()
        x[place] = value
        x.requires_grad_()
        ops.binary_conv2d(x, weight).backward(gradient(2, 4, 3, 3).to(device))
        assert x.grad.count_nonzero() == reached
        assert x.grad[place].count_nonzero() == reached


def test_a_shift_on_top_of_a_sign(launchers, device):
    """The input's gradient passes; the shift's is the clipped quadratic's, by both definitions."""
    x, weight, shift = plus_minus(5, 8), activation(7, 8, seed=3), vectors(1, 8)[0]
    tensors = {"x": x, "weight": weight, "shift": shift}
    compare(ops.binary_linear, reference.binary_linear, tensors, device)
    leaf, upstream = x.to(device).requires_grad_(), gradient(5, 7)
    ops.binary_linear(leaf, weight.to(device), shift.to(device)).backward(upstream.to(device))
    expected = upstream @ (weight.abs().mean(1, keepdim=True) * reference.hard_sign(weight))
    torch.testing.assert_close(leaf.grad.cpu(), expected)


def test_without_the_look_the_clipped_quadratic_always_holds(launchers, device):
    x, weight = plus_minus(2, 8, 3, 3).to(device), activation(4, 8, 1, 1).to(device)
    for call in (
        lambda x: ops.binary_conv2d(x, weight, may_be_binary=False),
        lambda x: ops.binary_linear(x[..., 0, 0], weight[..., 0, 0], may_be_binary=False),
    ):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.backward(gradient(*y.shape).to(device))
        assert not leaf.grad.any()


@pytest.mark.parametrize("rprelu", [True, False])
def test_a_unit_takes_its_stream_to_be_real_fused_or_not(launchers, device, rprelu):
    torch.manual_seed(0)
    units = [BinaryUnit(8, 8, 3, rprelu=rprelu, fused=fused).to(device) for fused in (True, False)]
    units[1].load_state_dict(units[0].state_dict())
    x = plus_minus(2, 8, 5, 3).to(device)
    grads = []
    for unit in units:
        leaf = x.clone().requires_grad_()
        unit(leaf).backward(gradient(2, 8, 5, 3).to(device))
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_under_autocast_signs_stay_signs():
    torch.manual_seed(0)
    sign, conv = RSign(8), BinaryConv2d(8, 7, 3, padding=1)
    x, upstream = activation(2, 8, 5, 3).requires_grad_(), gradient(2, 7, 5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(sign(x))
    assert y.dtype == torch.bfloat16
    y.backward(upstream.bfloat16())
    exact = [t.detach().double().requires_grad_() for t in (x, conv.weight, sign.shift)]
    reference.binary_conv2d(*exact, padding=1).backward(upstream.double())
    for leaf, truth in zip((x, conv.weight, sign.shift), exact, strict=True):
        assert (leaf.grad - truth.grad).norm() <= 0.01 * truth.grad.norm()


@pytest.mark.parametrize("kind", [BinaryConv2d, BinaryLinear])
def test_a_shift_is_asked_for_and_decayed(kind):
    sizes = (5, 7, 3, 1, 1) if kind is BinaryConv2d else (5, 7)
    plain, shifted = kind(*sizes), kind(*sizes, shift=True)
    assert set(plain.state_dict()) == {"weight"}
    assert set(shifted.state_dict()) == {"weight", "shift"}
    assert torch.equal(shifted.shift, torch.zeros(5))
    chosen = list(decayed_parameters(shifted))
    assert any(p is shifted.shift for p in chosen)
    assert [p is plain.weight for p in decayed_parameters(plain)] == [True] * (len(chosen) - 1)
    assert "shift=True" in repr(shifted)
