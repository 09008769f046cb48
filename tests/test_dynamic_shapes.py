"""One compiled program for images of any number and size: what it computes is what eager mode does.

Batches of 8, 8 and 5, as an epoch ends with a smaller one, then another image size.
"""

import shutil
from functools import partial

import pytest
import torch
from torch import nn

from tests.helpers import gradient
from tests.test_compiled_gradients import Program, parts, parts_in_torch
from tritonbnn.models.blocks import BinaryNetwork, conv_bn
from tritonbnn.models.resnet import DownsamplingUnit
from tritonbnn.nn import BinaryUnit, Chain

pytestmark = pytest.mark.slow

SHAPES = ((8, 8, 8, 4), (8, 8, 8, 4), (5, 8, 8, 4), (3, 8, 4, 12))


@pytest.fixture(autouse=True)
def _forgetful():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def passes(run, model):
    """Outputs, all gradients and averages of a pass with each shape, by name."""
    seen = {}
    for step, shape in enumerate(SHAPES):
        x = gradient(*shape, seed=step).requires_grad_()
        outputs = run(x)
        grads = [gradient(*y.shape, seed=7 + i) for i, y in enumerate(outputs)]
        model.zero_grad()
        torch.autograd.backward(outputs, grads)
        seen |= {f"{step} output {i}": y.detach() for i, y in enumerate(outputs)}
        seen |= {f"{step} dx": x.grad}
        seen |= {f"{step} d{name}": p.grad for name, p in model.named_parameters()}
        seen |= {f"{step} {name}": b.clone() for name, b in model.named_buffers()}
    return seen


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, n=name: f"{n}: {m}")


class Everything(nn.Module):
    """Every module and every path through an operator, all of one input."""

    def __init__(self):
        super().__init__()
        modules, shapes = zip(*parts(), *parts_in_torch(), strict=True)
        self.program = Program(modules)
        self.of_rows = [len(shape) == 3 for shape in shapes]

    def forward(self, x):
        rows = x.movedim(1, -1).flatten(1, 2)
        return self.program(*(rows if of_rows else x for of_rows in self.of_rows))


class Tied(BinaryUnit):
    """A unit whose operands are one tensor."""

    def __init__(self):
        super().__init__(8, 8, 3, 2)
        self.shift_out = self.bn.bias = self.shift_mid

    def forward(self, x):
        return [super().forward(x)]


class Units(nn.Module):
    """A network in which a norm is called, one unit projects its shortcut, and one is tied."""

    def __init__(self):
        super().__init__()
        tied, grouped = BinaryUnit(8, 8, 3, 2), BinaryUnit(8, 16, 1, norm=partial(nn.GroupNorm, 4))
        tied.shift_out = tied.bn.bias = tied.shift_mid
        last = BinaryUnit(24, 24, 3)
        blocks = Chain(tied, grouped, DownsamplingUnit(16, 24), last)
        size = {"in_channels": 8, "features": 24, "num_classes": 3, "size_multiple": 4}
        self.network = BinaryNetwork(conv_bn(8, 8, 3, 1), blocks, **size)

    def forward(self, x):
        return [self.network(x)]


def built(kind, training):
    torch.manual_seed(0)
    model = kind().train(training)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


CASES = [
    (Everything, "aot_eager", None, True),
    (Units, "eager", None, True),
    (Units, "aot_eager", True, False),
    pytest.param(Tied, "inductor", True, True, marks=pytest.mark.compile),
]
"""What is compiled, how, torch.compile's ``dynamic`` (None: what has changed), training mode."""


@pytest.mark.parametrize(("kind", "backend", "dynamic", "training"), CASES)
def test_images_of_any_number_and_size(kind, backend, dynamic, training):
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    model, twin = (built(kind, training) for _ in range(2))
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    assert_same(passes(compiled, model), passes(twin, twin))
