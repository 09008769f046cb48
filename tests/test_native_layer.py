"""A stand-alone layer in one C call a direction: the same bits as launcher by launcher."""

import pytest
import torch

from tests.helpers import activation, gradient, plus_minus, vectors
from tests.test_native_products import THREADS, isa, strided, turned, with_threads  # noqa: F401
from tritonbnn import ops
from tritonbnn.native import layer, library
from tritonbnn.ops.library import through_dispatcher
from tritonbnn.packed import PackedWeight

# images, channels, output channels, height, width, kernel size, stride
SHAPES = [
    pytest.param((3, 7, 20, 5, 4, 3, 1), id="3x3"),
    pytest.param((2, 64, 33, 7, 9, 3, 2), id="3x3-stride-2"),
    pytest.param((2, 200, 48, 3, 5, 1, 1), id="1x1"),
    pytest.param((1, 128, 17, 15, 13, 1, 2), id="1x1-stride-2"),
]


@pytest.fixture(autouse=True)
def compiled(unwritten_memory):
    if not library.available():
        pytest.skip(library.reason())


def operands(shape, *, binary=False, shifted=True):
    images, channels, out_channels, height, width, k, _ = shape
    size = (images, channels, height, width)
    x = plus_minus(*size) if binary else activation(*size)
    weight = gradient(out_channels, channels, k, k, seed=4) * 0.7
    return x, weight, vectors(1, channels)[0] if shifted else None


def results(shape, x, weight, shift, wanted=("x", "weight", "shift")):
    """Output, and the gradients that are wanted, by name."""
    k, stride = shape[-2:]
    leaves = {"x": x, "weight": weight, "shift": shift}
    leaves = {
        name: leaf.detach().requires_grad_(name in wanted)
        for name, leaf in leaves.items()
        if leaf is not None
    }
    y = ops.binary_conv2d(**leaves, stride=stride, padding=k // 2)
    grads = {name: leaf for name, leaf in leaves.items() if name in wanted}
    upstream = gradient(*y.shape, seed=5)
    found = torch.autograd.grad(y, list(grads.values()), upstream)
    return {"y": y.detach(), **dict(zip(grads, found, strict=True))}


def assert_same(at_once, one_by_one):
    assert at_once.keys() == one_by_one.keys()
    for name, result in at_once.items():
        assert result.stride() == one_by_one[name].stride(), name
        assert torch.equal(result, one_by_one[name]), name


def one_by_one(*args, **kwargs):
    with through_dispatcher():
        return results(*args, **kwargs)


@pytest.fixture
def calls(monkeypatch):
    """The names of the C functions that are called."""
    names, call = [], library.call

    def noting(name, *arguments):
        names.append(name)
        call(name, *arguments)

    monkeypatch.setattr(library, "call", noting)
    return names


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_call_has_the_bits_of_several(isa, shape, binary, shifted):  # noqa: F811
    tensors = operands(shape, binary=binary, shifted=shifted)
    wanted = ("x", "weight", "shift") if shifted else ("x", "weight")
    expected = one_by_one(shape, *tensors, wanted)
    for count in THREADS:
        found = with_threads(count, lambda: results(shape, *tensors, wanted))
        assert_same(found, expected)


def test_a_direction_is_one_call(calls):
    shape = (2, 33, 20, 5, 4, 3, 1)
    results(shape, *operands(shape))
    assert calls == ["layer_forward", "layer_backward"]


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("shift",), ("weight", "shift")])
@pytest.mark.parametrize("binary", [False, True])
def test_what_is_wanted_alone(binary, wanted):
    shape = (2, 33, 20, 5, 4, 3, 1)
    tensors = operands(shape, binary=binary)
    assert_same(results(shape, *tensors, wanted), one_by_one(shape, *tensors, wanted))


@pytest.mark.parametrize("moved", [strided, turned])
def test_any_memory(moved):
    shape = (2, 33, 20, 5, 4, 3, 2)
    x, weight, shift = operands(shape)
    tensors = moved(x), moved(weight), strided(shift)
    expected = one_by_one(shape, *tensors)
    assert_same(results(shape, *tensors), expected)
    for name, result in one_by_one(shape, x, weight, shift).items():
        assert torch.equal(expected[name], result), name


def test_a_weight_that_is_stored_as_bits(calls):
    shape = (2, 40, 20, 5, 4, 3, 1)
    x, weight, shift = operands(shape)
    stored = PackedWeight.of(weight)
    found = results(shape, x, stored, shift, ("x", "shift"))
    assert calls == ["layer_forward", "layer_backward"]
    assert_same(found, one_by_one(shape, x, stored, shift, ("x", "shift")))


def test_narrow_and_wide_numbers_are_left_to_the_launchers():
    x, weight, shift = operands((2, 40, 20, 5, 4, 3, 1))
    assert layer.takes(x, weight, shift)
    for dtype in (torch.bfloat16, torch.float64):
        assert not layer.takes(x.to(dtype), weight, shift)
        assert not layer.takes(x, weight.to(dtype), None)
