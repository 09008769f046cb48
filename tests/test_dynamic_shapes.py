"""One compiled program for images of any number and size: what it computes is what eager mode does.

Batches of 8, 8 and 5, as an epoch ends with a smaller one, then another image size.
"""

import shutil

import pytest
import torch
from torch import nn

from tests.helpers import gradient
from tests.test_compiled_gradients import Program, parts
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryUnit

SHAPES = ((8, 8, 6, 4), (8, 8, 6, 4), (5, 8, 6, 4), (3, 8, 8, 6), (5, 8, 4, 8))
BACKENDS = [
    ("aot_eager", None, True),
    ("aot_eager", True, True),
    ("aot_eager", True, False),
    ("eager", None, True),
    ("inductor", None, True),
]
"""Backend, torch.compile's ``dynamic`` (None: where a size changes), and training mode."""


@pytest.fixture(autouse=True)
def _forgetful():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def passes(run, model, shapes):
    """Outputs, all gradients and averages of a pass with each shape, by name."""
    seen = {}
    for step, shape in enumerate(shapes):
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


class Shared(nn.Module):
    """All parts read one input: images, or rows of 8 channels."""

    def __init__(self, count=None):
        super().__init__()
        torch.manual_seed(0)
        chosen = list(parts())[:count]
        self.rows = [len(shape) == 3 for _, shape in chosen]
        self.program = Program([part for part, _ in chosen])
        self.tied = BinaryUnit(8, 8, 3)
        for parameter in self.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        self.tied.shift_out = self.tied.shift_mid
        self.tied.bn.bias = self.tied.slope
        self.other = BinaryUnit(8, 8, 3, norm=lambda channels: nn.GroupNorm(2, channels))

    def forward(self, x):
        rows = x.movedim(1, -1).flatten(1, 2)
        images = self.program(*(rows if by_row else x for by_row in self.rows))
        return [*images, self.tied(x), self.other(x)]


@pytest.mark.parametrize(("backend", "dynamic", "training"), BACKENDS)
def test_every_operator_and_module(backend, dynamic, training):
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    count = 4 if backend == "inductor" else None
    model, twin = (Shared(count).train(training) for _ in range(2))
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    assert_same(passes(compiled, model, SHAPES), passes(twin, twin, SHAPES))
