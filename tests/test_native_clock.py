"""The clock within the C functions: whose passes it has, and how much it says they had to do."""

import time

import pytest
import torch
from torch import nn

from tests.helpers import activation, gradient, vectors
from tritonbnn import ops
from tritonbnn.models import build_model
from tritonbnn.native import clock, library
from tritonbnn.nn import BinaryUnit

NANO = 1e9
BACKWARD = ("backward sums", "backward apply", "weight gradient", "slope, shift, skip")
STEPS = {
    2: {
        *("weights packed", "signs packed", "forward product", "norm, shortcut, RPReLU, signs"),
        *("input gradient", *BACKWARD),
    },
    1: {
        *("signs packed", "forward product", "moments", "norm, shortcut, RPReLU, signs"),
        *BACKWARD,  # oneDNN has the input gradient: no operand is signs
    },
}
"""The passes of a step of the schedule."""


@pytest.fixture(autouse=True)
def compiled():
    if not library.available():
        pytest.skip(library.reason())


@pytest.fixture(params=[2, 1])
def step(request):
    return request.param


def network(step):
    torch.manual_seed(0)
    options = {"num_classes": 10, "width": 0.25, "small_images": True}
    model = build_model("reactnet_a", binary_weights=step == 2, **options)
    return model.to(memory_format=torch.channels_last)


def images():
    return activation(3, 3, 32, 32, layout="channels_last")


def products(model):
    """Of the binary convolutions in one direction, by torch's own shapes."""
    found = []

    def note(unit, inputs, output):
        out_channels, channels, kernel, _ = unit.weight.shape
        z = output[0] if isinstance(output, tuple) else output
        n, _, height, width = z.shape
        found.append(n * height * width * out_channels * channels * kernel**2)

    hooks = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(module, BinaryUnit)
    ]
    model(images())
    for hook in hooks:
        hook.remove()
    assert len(found) == 26
    return sum(found)


def test_it_counts_the_products_of_the_network(step):
    model = network(step)
    expected = products(model)
    with clock.running() as passes:
        model(images()).square().sum().backward()
    assert set(passes) == STEPS[step]
    by_table = {name: taken.table_products for name, taken in passes.items()}
    by_bits = {name: taken.bit_products for name, taken in passes.items()}
    assert by_table.get("input gradient", expected) == by_table["weight gradient"] == expected
    assert by_table["forward product"] == (0 if step == 2 else expected)
    assert by_bits["forward product"] == (expected if step == 2 else 0)
    rest = passes.keys() - {"forward product", "input gradient", "weight gradient"}
    assert all(by_table[name] == by_bits[name] == 0 for name in rest)


def test_passes_take_no_longer_than_the_step(step):
    model = network(step)
    start = time.perf_counter()
    with clock.running() as passes:
        model(images()).square().sum().backward()
    elapsed = time.perf_counter() - start
    assert all(taken.nanoseconds > 0 for taken in passes.values())
    assert sum(taken.nanoseconds for taken in passes.values()) < elapsed * NANO


def work(passes):
    """All but the times."""
    return {name: taken._replace(nanoseconds=0) for name, taken in passes.items()}


def test_it_is_off_unless_asked_and_starts_from_nothing():
    model = network(2)
    with clock.running() as first:
        model(images())
    model(images())
    with clock.running() as nothing:
        nn.Conv2d(3, 3, 1)(images())
    with clock.running() as again:
        model(images())
    assert not nothing
    assert work(first) == work(again)
    table = torch.full((len(clock.PASSES), len(clock.Taken._fields)), -1)
    library.call("clock_read", table)
    before = table.clone()
    model(images())
    library.call("clock_read", table)
    assert torch.equal(table, before)


@pytest.mark.parametrize("shortcut", ["identity", "tensor"])
def test_bytes_are_those_of_the_tensors(shortcut):
    n, channels, size, float32, float16 = 2, 48, 5, 4, 2
    x = activation(n, channels, size, size, layout="channels_last").requires_grad_()
    weight = activation(channels, channels, 3, 3, seed=1).requires_grad_()
    gamma, beta, mid, slope, out = vectors(5, channels)
    residual = activation(*x.shape, seed=5, layout="channels_last").requires_grad_()
    with clock.running() as passes:
        z, *_ = ops.binary_unit(
            *(x, weight, gamma, beta, None, mid, slope, out),
            shortcut="identity" if shortcut == "identity" else residual,
            plan="keep",
            pack=True,
        )
        z.backward(gradient(*z.shape))
    numbers, words = x.numel(), n * size * size * 2
    packed, real = channels * 9 * 2 * 4, weight.numel() * float32
    skip = 0 if shortcut == "tensor" else numbers * float32
    assert {name: taken.bytes for name, taken in passes.items()} == {
        "weights packed": real + packed,
        "signs packed": numbers * float32 + words * 4,
        "forward product": words * 4 + packed + numbers * float16,
        "norm, shortcut, RPReLU, signs": numbers * (float16 + 2 * float32) + words * 4,
        "backward sums": numbers * (float16 + 2 * float32),
        "backward apply": numbers * (float16 + 4 * float32),
        "input gradient": numbers * 2 * float32 + packed,
        "weight gradient": numbers * float32 + words * 4 + 2 * real,
        "slope, shift, skip": numbers * 3 * float32 + skip,
    }


def test_the_peak_makes_the_products_that_it_says():
    """Its one result is a sum over them, by their definition."""
    times, sums, numbers = 7, 64, 30
    count, result = torch.empty(1, dtype=torch.int64), torch.empty(1)
    threads = torch.get_num_threads()
    library.call("table_peak", times, count, result)
    assert count.item() == threads * times * sums * 16 * numbers
    total = 0.0
    for i in range(1, sums + 1):
        word = 2654435761 * i % 2**32
        total += sum((1 if word >> j & 1 else -1) / (j + 1) for j in range(numbers))
    assert result.item() == pytest.approx(threads * times * total, rel=1e-4)
