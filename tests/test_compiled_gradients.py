"""torch.compile gives the gradients of eager mode: all of them, for every operator and module.

A fault of the tracer loses a gradient without a word, and the output stays right. Modules share a
program, each with an input and an upstream gradient of its own, because compiling takes seconds.
"""

import copy
import shutil
from functools import partial
from itertools import islice

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from tests.helpers import gradient
from tritonbnn import ops
from tritonbnn.nn import BinaryConv1d, BinaryConv2d, BinaryLinear, BinaryUnit, RPReLU, RSign

IMAGES, ROWS = (2, 8, 6, 4), (3, 5, 8)


class Binarize(nn.Module):
    """Without a shift, which RSign always has."""

    def forward(self, x):
        return ops.binarize(x)


class Onto(BinaryUnit):
    """A unit whose shortcut is given: its own input."""

    def forward(self, x):
        return super().forward(x, x)


def parts():
    """Every module and every path through an operator, with the shape of its input."""
    yield RPReLU(8), IMAGES
    yield BinaryLinear(8, 7), ROWS
    yield nn.Sequential(RSign(8), BinaryConv2d(8, 7, 3, 2, 1)), IMAGES
    yield Onto(8, 8, 3), IMAGES
    yield Binarize(), IMAGES
    yield BinaryLinear(8, 7, shift=True), ROWS
    yield BinaryConv2d(8, 7, 1, shift=True, binary_weight=False), IMAGES
    yield BinaryUnit(8, 16, 1, plan="fused"), IMAGES
    yield BinaryUnit(8, 8, 3, 2, binary_weight=False, rprelu=False, plan="recompute"), IMAGES
    yield BinaryUnit(8, 8, 3, 2, fused=False), IMAGES
    yield BinaryUnit(8, 8, 1).eval(), IMAGES


class OfSequences(BinaryConv1d):
    """Of (N, L, C)."""

    def forward(self, x):
        return super().forward(x.mT)


def parts_in_torch():
    """What leaves a part of its work to torch's own operators."""
    yield BinaryConv2d(8, 4, 5, padding="same", groups=2, bias=True, shift=True), IMAGES
    yield BinaryConv2d(8, 4, 2, padding="same", stride=1, binary_weight=False), IMAGES
    yield BinaryLinear(8, 7, bias=True, binary_weight=False), ROWS
    yield RSign(8, channel_dim=-1), ROWS
    yield OfSequences(8, 4, 3), ROWS
    yield BinaryUnit(8, 16, 3, 2), IMAGES


FEW = 4
"""Of the parts, for the backend that makes machine code: it takes seconds for each."""


class Program(nn.Module):
    """Modules side by side."""

    def __init__(self, modules):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, *inputs):
        return [part(x) for part, x in zip(self.parts, inputs, strict=True)]


FROZEN = {
    "nothing": lambda name: False,
    "inputs": lambda name: name.startswith("input"),
    "shifts": lambda name: "shift" in name,
    "all_but_shifts": lambda name: "shift" not in name,
}


def program(frozen, dtype, count=None, kinds=parts):
    """A program and its inputs; ``frozen`` says by name what takes no gradient."""
    torch.manual_seed(0)
    modules, shapes = zip(*islice(kinds(), count), strict=True)
    model = Program(modules).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.requires_grad_(not frozen(name))
    inputs = [gradient(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    for i, x in enumerate(inputs):
        x.requires_grad_(not frozen(f"input.{i}"))
    return model, inputs


def two_steps(run, model, inputs):
    """What two steps of SGD leave: outputs, all gradients, parameters and buffers, by name."""
    leaves = dict(model.named_parameters()) | {f"input.{i}": x for i, x in enumerate(inputs)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    seen = {}
    for step in range(2):
        outputs = run(*inputs)
        upstream = [gradient(*y.shape, dtype=y.dtype, seed=7 + i) for i, y in enumerate(outputs)]
        pairs = [(y, g) for y, g in zip(outputs, upstream, strict=True) if y.requires_grad]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        seen |= {f"{step} output {i}": y.detach() for i, y in enumerate(outputs)}
        seen |= {f"{step} grad {name}": grad.clone() for name, grad in grads.items()}
        # in place: a gradient that two parameters share would be scaled twice
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        optimizer.step()
        for leaf in leaves.values():
            leaf.grad = None
    return seen | model.state_dict()


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(autouse=True)
def _forgetful():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


CASES = [
    *[("aot_eager", dtype, "nothing") for dtype in (torch.float32, torch.bfloat16, torch.float64)],
    *[("eager", torch.float32, frozen) for frozen in FROZEN],
    ("aot_eager", torch.float32, "all_but_shifts"),
    pytest.param("inductor", torch.float32, "nothing", marks=pytest.mark.compile),
]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype", "frozen"), CASES)
def test_two_steps_are_those_of_eager_mode(backend, dtype, frozen):
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    few = {"count": FEW if backend == "inductor" else None}
    assert_two_steps_agree(backend, FROZEN[frozen], dtype, few)


def test_two_steps_of_what_torch_does_in_part():
    assert_two_steps_agree("aot_eager", FROZEN["nothing"], torch.float32, {"kinds": parts_in_torch})


def assert_two_steps_agree(backend, frozen, dtype, which):
    model, inputs = program(frozen, dtype, **which)
    twin, same = program(frozen, dtype, **which)
    expected = two_steps(twin, twin, same)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same(two_steps(compiled, model, inputs), expected)
    grads = {name: value for name, value in expected.items() if " grad " in name}
    assert grads
    assert [name for name, grad in grads.items() if not grad.any()] == []


def repeated(x, w, t, s):
    """Each tensor in two places of one operator, where shapes allow it."""
    return [
        ops.rprelu(x, t, s, t),
        ops.rprelu(x, s, s, s),
        ops.binary_linear(w, w, t),
        ops.binary_conv2d(x, x, t, padding=1),
        ops.binary_unit(x, x, t, t, s, s, s, t, shortcut=x).z,
        ops.binary_unit(x, x, s, t, t, t, s, t).z,
    ]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_tensor_in_two_places_gets_the_gradient_of_both(backend):
    leaves = [
        gradient(*shape, seed=9).requires_grad_() for shape in ((8, 8, 3, 3), (5, 8), (8,), (8,))
    ]
    for function in (repeated, torch.compile(repeated, backend=backend, fullgraph=True)):
        outputs = function(*leaves)
        upstream = [gradient(*y.shape, seed=7 + i) for i, y in enumerate(outputs)]
        # one output at a time, so that no fault can hide behind another's gradient
        grads = [
            torch.autograd.grad(y, leaves, g, retain_graph=True, materialize_grads=True)
            for y, g in zip(outputs, upstream, strict=True)
        ]
        if function is repeated:
            expected = outputs, grads
    torch.testing.assert_close((outputs, grads), expected)


def test_tied_parameters_of_a_unit_train_together():
    torch.manual_seed(0)
    unit, x = BinaryUnit(8, 8, 3), gradient(2, 8, 5, 5)
    unit.shift_out = unit.shift_mid
    twin = copy.deepcopy(unit)
    assert twin.shift_out is twin.shift_mid
    for run in (twin, torch.compile(unit, backend="aot_eager")):
        run(x).square().sum().backward()
    for a, b in zip(unit.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


CALLS = {
    "binarize": ops.binarize,
    "rprelu": lambda x: ops.rprelu(x, *[torch.ones(8)] * 3),
    "binary_conv2d": lambda x: ops.binary_conv2d(x, torch.ones(8, 8, 1, 1)),
    "binary_conv2d_library": lambda x: ops.binary_conv2d(x, torch.ones(8, 8, 3, 1), padding=(1, 0)),
    "binary_linear": lambda x: ops.binary_linear(x, torch.ones(3, 4)),
    "binary_unit": lambda x: ops.binary_unit(x, torch.ones(8, 8, 1, 1), *[torch.ones(8)] * 2).z,
}


UPSTREAM = gradient(*IMAGES)


def loss(name, x):
    y = CALLS[name](x)
    return (y * UPSTREAM[..., : y.shape[3]]).sum()


@pytest.mark.parametrize("name", CALLS)
def test_function_transforms_are_refused_in_eager_mode(name):
    x, refused = gradient(*IMAGES), r"torch\.func.* not supported: use loss\.backward"
    for transform, batch in ((torch.func.grad, x), (torch.func.vmap, x[None])):
        with pytest.raises(RuntimeError, match=refused):
            transform(partial(loss, name))(batch)


@pytest.mark.parametrize("name", CALLS)
def test_batched_gradients_and_forward_mode_name_the_way(name):
    """A loop. Errors from inside of torch named the launchers' memory, or a method to write."""
    x, again = gradient(*IMAGES).requires_grad_(), "torch.autograd.grad,? once for each .*loop"
    y = CALLS[name](x)
    with pytest.raises(RuntimeError, match=f"batched gradients .* not supported: call {again}"):
        torch.autograd.grad(y, x, torch.stack((y, -y)).detach(), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="batched gradients"):
        torch.autograd.functional.jacobian(CALLS[name], x, vectorize=True)
    for grad_enabled in (True, False):
        with torch.set_grad_enabled(grad_enabled), forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
            with pytest.raises(RuntimeError, match=f"forward-mode .* not supported: use {again}"):
                CALLS[name](dual)
            CALLS[name](x.detach())  # what carries no tangent is not refused


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 11),
    reason="torch 2.10 refuses it by itself, with an error of its own",
)
@pytest.mark.parametrize("name", CALLS)
def test_function_transforms_work_compiled(name):
    """That is the remedy which the error names."""
    x = gradient(*IMAGES).requires_grad_()
    expected = torch.autograd.grad(loss(name, x), x)[0]
    compiled = torch.compile(torch.func.grad(partial(loss, name)), backend="aot_eager")
    torch.testing.assert_close(compiled(x.detach()), expected)
