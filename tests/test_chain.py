"""Networks are called as modules: whatever stands between units runs, and hooks see plain tensors.

The truth is a twin whose units are called one by one in an nn.Sequential: each packs its own signs.
"""

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.helpers import gradient
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryUnit, Chain
from tritonbnn.ops import library

ROWS = [(8, 8, 3, 1), (8, 16, 1, 1), (16, 16, 3, 2), (16, 16, 1, 1)]


def chain(seed=0):
    """Two blocks of two units, their parameters in random motion; float64, so that bits agree."""
    torch.manual_seed(seed)
    units = [BinaryUnit(*row) for row in ROWS]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Chain(Chain(*units[:2]), Chain(*units[2:]))).double()
    for parameter in model[1].parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def one_by_one(model):
    """The same modules, called by nothing but nn.Sequential."""
    for name, child in model.named_children():
        one_by_one(child)
        if isinstance(child, Chain):
            setattr(model, name, nn.Sequential(*child))
    return model


def passes(run, model, modes=(True, True, False)):
    """Outputs, all gradients and buffers of passes in training mode or not, by name."""
    seen = {}
    for step, training in enumerate(modes):
        model.train(training)
        x = gradient(2, 3, 8, 6, dtype=torch.float64, seed=step).requires_grad_()
        y = run(x)
        model.zero_grad()
        y.backward(gradient(*y.shape, dtype=torch.float64, seed=7 + step))
        seen |= {f"{step} y": y.detach(), f"{step} dx": x.grad}
        seen |= {f"{step} d{name}": p.grad for name, p in model.named_parameters()}
        seen |= {f"{step} {name}": b.clone() for name, b in model.named_buffers()}
    return seen


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]


class Doubled(BinaryUnit):
    """A user's own unit, whose forward takes one tensor."""

    def forward(self, x):
        return super().forward(x * 2)


def nothing(blocks):
    pass


def module_between(blocks):
    blocks.insert(1, Gate(16))


def module_inside(blocks):
    blocks[0].insert(1, Gate(8))


def module_of_two(blocks):
    blocks[1][0] = nn.Sequential(Gate(16), blocks[1][0])


def in_place_between(blocks):
    blocks.insert(1, nn.Hardtanh(-0.5, 0.5, inplace=True))


def in_place_inside(blocks):
    blocks[1].insert(1, nn.ReLU(inplace=True))


def hook_on_a_unit(blocks):
    blocks[0][0].register_forward_hook(lambda unit, args, y: y.neg())


def hook_in_place(blocks):
    blocks[0][1].register_forward_hook(lambda unit, args, y: y.neg_())


def hook_on_a_block(blocks):
    blocks[0].register_forward_hook(lambda block, args, y: y.neg_() * 1)


def hook_before_a_block(blocks):
    blocks[1].register_forward_pre_hook(lambda block, args: (args[0].neg_(),))


def backward_hook(blocks):
    blocks[1][0].register_full_backward_hook(lambda unit, dx, dy: (3 * dx[0],))


def replaced_forward(blocks):
    inner = blocks[1][0].forward
    blocks[1][0].forward = lambda x: inner(x - 1)


def replaced_forward_of_a_block(blocks):
    inner = blocks[1].forward
    blocks[1].forward = lambda x: inner(-x)


def own_unit(blocks):
    state = blocks[1][0].state_dict()
    blocks[1][0] = Doubled(*ROWS[2])
    blocks[1][0].load_state_dict(state)


def one_unit_twice(blocks):
    blocks[1].append(blocks[1][1])


def a_unit_less(blocks):
    del blocks[1][1]


def empty_block(blocks):
    blocks.insert(1, Chain())


def unfused(blocks):
    blocks[0][1].fused = False


CHANGES = [
    nothing,
    module_between,
    module_inside,
    module_of_two,
    in_place_between,
    in_place_inside,
    hook_on_a_unit,
    hook_in_place,
    hook_on_a_block,
    hook_before_a_block,
    backward_hook,
    replaced_forward,
    replaced_forward_of_a_block,
    own_unit,
    one_unit_twice,
    a_unit_less,
    empty_block,
    unfused,
]


def changed(change):
    model = chain()
    torch.manual_seed(1)  # of what is put in
    change(model[1])
    return model.double()


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def truth(change, **options):
    """Of the changed modules called one by one; hooks on a block stay on what takes its place."""
    model = changed(change)
    hooked = [(m._forward_hooks, m._forward_pre_hooks, m.__dict__.get("forward")) for m in model[1]]
    twin = one_by_one(model)
    for block, (after, before, forward) in zip(twin[1], hooked, strict=True):
        block._forward_hooks, block._forward_pre_hooks = after, before
        if forward is not None:
            block.forward = forward
    return passes(twin, twin, **options)


@pytest.mark.parametrize("change", CHANGES)
def test_a_chain_computes_what_its_modules_do(change):
    model = changed(change)
    assert_same(passes(model, model), truth(change))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [in_place_between, in_place_inside, hook_in_place])
def test_what_changes_a_stream_in_place_is_seen_without_a_graph_too(change, context):
    x = gradient(2, 3, 8, 6, dtype=torch.float64)
    model = changed(change).eval()
    twin = one_by_one(changed(change)).eval()
    with context():
        torch.testing.assert_close(model(x), twin(x))


COMPILED = [nothing, module_inside, in_place_between, hook_on_a_unit, hook_in_place, own_unit]


@pytest.mark.compile
@pytest.mark.parametrize("change", COMPILED)
def test_a_changed_chain_compiles_in_one_graph(change):
    torch.compiler.reset()
    model = changed(change)
    # the tracer alone: it is what might skip a module or take old signs
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(passes(compiled, model, modes=(True,)), truth(change, modes=(True,)))
    torch.compiler.reset()


class Packings(TorchDispatchMode):
    """Counts how often signs of a stream are packed in a pass of their own."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name == "tritonbnn::pack_signs"
        return func(*args, **(kwargs or {}))


def packings(model, height=8, width=6):
    with library.through_dispatcher(), Packings() as seen:
        model(gradient(2, 3, height, width, dtype=torch.float64))
    return seen.count


def test_signs_are_packed_on_the_way_wherever_units_meet():
    assert packings(chain()) == 1
    assert packings(changed(module_between)) == 2
    assert packings(changed(module_inside)) == 2
    assert packings(changed(hook_on_a_unit)) == 2
    assert packings(changed(empty_block)) == 2
    assert packings(copy.deepcopy(chain())) == 1
    assert packings(pickle.loads(pickle.dumps(chain()))) == 1
    assert packings(nn.Sequential(chain()[0], chain()[1][:1])) == 1
    for name in ("reactnet_a", "reactnet_18", "birealnet_18"):
        model = build_model(name, width=0.25, num_classes=3, small_images=True).double()
        assert packings(model, 16, 16) == 1


@pytest.mark.parametrize("name", ["reactnet_a", "reactnet_18"])
def test_hooks_on_all_blocks_and_units_see_plain_tensors(name):
    """And with them the network computes the same, gradients at the hooks included."""
    torch.manual_seed(0)
    model = build_model(name, width=0.25, num_classes=3, small_images=True).double()
    twin = copy.deepcopy(model)
    hooked = [m for m in twin.blocks.modules() if isinstance(m, (BinaryUnit, Chain))]
    seen = {}

    def keep(module, args, output):
        assert [type(t) for t in (*args, output)] == [torch.Tensor] * 2
        output.retain_grad()
        seen[module] = output

    for module in hooked:
        module.register_forward_hook(keep)
    outputs = [run(gradient(2, 3, 16, 16, dtype=torch.float64)) for run in (model, twin)]
    for y in outputs:
        y.backward(gradient(*y.shape, dtype=torch.float64))
    assert set(seen) == set(hooked)
    assert all(y.grad is not None and y.grad.any() for y in seen.values())
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def by_hand(model):
    def run(x):
        x = model[0](x)
        for block in model[1]:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    return run


def by_wrappers(kind, model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kind))
    return model


@pytest.mark.parametrize("way", [by_hand, partial(by_wrappers, BinaryUnit)], ids=["hand", "units"])
def test_activation_checkpointing(way):
    """Averages aside, which move twice, as with nn.BatchNorm2d."""
    model, twin = chain(), chain()
    run = way(model)

    def gradients(run, model):
        x = gradient(2, 3, 8, 6, dtype=torch.float64).requires_grad_()
        y = run(x)
        y.backward(gradient(*y.shape, dtype=torch.float64))
        return [y, x.grad, *(p.grad for p in model.parameters())]

    torch.testing.assert_close(gradients(run, model), gradients(twin, twin), rtol=1e-9, atol=1e-9)


class RefusalError(Exception):
    pass


class Refusing(nn.Module):
    def forward(self, x):
        raise RefusalError


@pytest.mark.parametrize("ending", ["end", "error", "part"])
def test_no_stream_outlives_its_use(ending, monkeypatch):
    """Whether a pass ends, is cut short by an error, or runs through a part of the network."""
    seen, fused = [], BinaryUnit._fused

    def watched(self, *args):
        output = fused(self, *args)
        seen.extend(map(weakref.ref, (output.z, output.signs)))
        return output

    monkeypatch.setattr(BinaryUnit, "_fused", watched)
    model = chain()
    x = gradient(2, 3, 8, 6, dtype=torch.float64)
    gc.disable()  # no cycle may hold them either
    try:
        with torch.no_grad():
            if ending == "error":
                model[1].append(Refusing().double())
                with pytest.raises(RefusalError):
                    model(x)
            elif ending == "part":
                model[1][0](model[0](x))
            else:
                model(x)
        assert len(seen) >= 4
        assert [ref() for ref in seen if ref() is not None] == []
    finally:
        gc.enable()


BAD = {
    "shape": (nn.AdaptiveAvgPool3d((3, None, None)), r"Avg\w+3d returned shape \(2, 3, 6, 4\)"),
    "dimensions": (nn.Flatten(), r"Flatten returned shape \(2, 192\)"),
    "tuple": (nn.AdaptiveMaxPool2d(2, return_indices=True), "AdaptiveMaxPool2d returned a tuple"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_module_between_units_that_changes_the_shape_is_named(name):
    module, message = BAD[name]
    model = chain()
    model[1][0].insert(1, module)
    expected = rf"{message}, but the unit after it takes \(N, 8, H, W\)"
    with pytest.raises(ValueError, match=expected):
        model(gradient(2, 3, 8, 6, dtype=torch.float64))


def test_a_module_may_change_the_size():
    model = chain()
    model[1].insert(1, nn.MaxPool2d(2))
    assert model(gradient(2, 3, 10, 6, dtype=torch.float64)).shape == (2, 16, 2, 1)
