"""A whole unit in one C call a direction, against the row of launchers, torch and itself."""

import copy
import itertools
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

from tests.helpers import activation, assert_no_worse_than_eager, vectors
from tritonbnn import eager, ops, reference
from tritonbnn.compiled import build
from tritonbnn.contract import Options, Statistics
from tritonbnn.models import build_model
from tritonbnn.native import library, whole
from tritonbnn.nn import BinaryUnit
from tritonbnn.ops import composed

THREADS = (1, 2, 3, 5)
PLANS = ("keep", "recompute", "fused")
ACTIVATION = ("shift_mid", "slope", "shift_out")
OPERANDS = ("x", "weight", "gamma", "beta", "shift_in", *ACTIVATION, "residual")
GRADIENTS = ("x", "weight", "gamma", "beta", "shift_in", *ACTIVATION, "residual")

# (N, C, H, W), output channels, kernel size, stride, shortcut
UNITS = [
    pytest.param((2, 32, 8, 6), 32, 3, 1, "identity", id="identity"),
    pytest.param((3, 33, 5, 3), 33, 3, 1, "identity", id="odd"),
    pytest.param((2, 1, 1, 7), 1, 3, 1, "identity", id="one-channel"),
    pytest.param((6, 8, 1, 1), 8, 3, 1, "identity", id="one-pixel"),
    pytest.param((2, 96, 6, 4), 96, 3, 2, "pool", id="pool"),
    pytest.param((2, 16, 2, 40), 16, 3, 2, "pool", id="wide-pool"),
    pytest.param((2, 31, 3, 5), 62, 1, 1, "repeat", id="repeat"),
    pytest.param((2, 33, 6, 4), 40, 3, 2, "tensor", id="tensor"),
    pytest.param((2, 7, 3, 4), 300, 3, 1, "tensor", id="to-300"),
]
UNITS_ = [p.values for p in UNITS]


@pytest.fixture(autouse=True)
def compiled(unwritten_memory, monkeypatch):
    if not library.available():
        pytest.skip(library.reason())
    monkeypatch.setenv("TRITONBNN_LAUNCHERS", "native")


@pytest.fixture(params=list(build.ISAS))
def isa(request):
    """Every instruction set that this machine runs, in turn."""
    runnable = list(build.ISAS)
    if runnable.index(request.param) > runnable.index(library.isa()):
        pytest.skip(f"this machine does not run {request.param}")
    with library.using(request.param):
        yield request.param


def with_threads(count, run):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


class Unit:
    """Random operands of a unit, and its results by whole, by composed, and by torch."""

    def __init__(self, shape, out_channels, kernel_size, stride, shortcut, **options):
        n, channels = shape[:2]
        self.t = dict.fromkeys(OPERANDS) | {
            "x": activation(*shape, layout="channels_last"),
            "weight": activation(out_channels, channels, kernel_size, kernel_size, seed=3) * 0.7,
            "shift_in": vectors(1, channels, seed=4)[0],
        }
        names = ("gamma", "beta", *ACTIVATION)
        self.t |= dict(zip(names, vectors(len(names), out_channels, seed=5), strict=True))
        size = composed.output_size(self.t["x"], self.t["weight"], stride)
        if shortcut == "tensor":
            self.t["residual"] = activation(n, out_channels, *size, seed=6)
            shortcut = "identity"
        self.grad = activation(n, out_channels, *size, seed=8)
        self.next_shift = vectors(1, out_channels, seed=10)[0]
        self.statistics = None
        self.signs = None
        defaults = {"binary_weight": True, "eps": 1e-5, "plan": "keep", "group": None}
        self.options = Options(stride, shortcut, **defaults | {"pack": True} | options)

    def to(self, dtype):
        """Its streams in another dtype; vectors and the weight stay in float32."""
        for name in ("x", "residual"):
            self.t[name] = None if self.t[name] is None else self.t[name].to(dtype)
        self.grad = self.grad.to(dtype)
        return self

    def give_statistics(self):
        mean, variance = vectors(2, len(self.t["gamma"]), seed=9)
        self.statistics = Statistics(mean, variance.abs() + 0.5)
        return self

    def run(self, module, wants_input=True, wants_weight=True):
        """All that ``whole`` or ``composed`` computes, by name."""
        t, given = self.t, (self.signs, self.next_shift, self.statistics, self.options)
        (z, signs, mean, variance), kept = module.forward(*t.values(), *given)
        saved = (t[name] for name in OPERANDS if name not in ("beta", "shift_out"))
        gradients = module.backward(
            self.grad,
            *saved,
            kept,
            self.options,
            wants_input=wants_input,
            wants_weight=wants_weight,
        )
        results = {"z": z, "signs": signs, "mean": mean, "variance": variance}
        named = gradients._asdict()
        return results | {f"d{name}": named[name] for name in GRADIENTS}

    def truth(self):
        """The same by torch's autograd in float64, but for the signs."""
        t = {k: None if v is None else v.double().requires_grad_() for k, v in self.t.items()}
        x, window = (
            t["x"],
            {"stride": self.options.stride, "padding": self.t["weight"].shape[2] // 2},
        )
        binary = self.options.binary_weight
        y = reference.binary_conv2d(x, t["weight"], t["shift_in"], binary_weight=binary, **window)
        if self.statistics is None:
            variance, mean = torch.var_mean(y, dim=(0, 2, 3))
            normal = F.batch_norm(y, None, None, t["gamma"], t["beta"], training=True)
        else:
            mean, variance = (s.double() for s in self.statistics)
            normal = F.batch_norm(y, mean, variance, t["gamma"], t["beta"])
        skipped = {"pool": lambda: F.avg_pool2d(x, 2), "repeat": lambda: torch.cat((x, x), dim=1)}
        z = (
            normal
            + skipped.get(
                self.options.shortcut, lambda: x if t["residual"] is None else t["residual"]
            )()
        )
        if t["slope"] is not None:
            z = reference.rprelu(z, *(t[name] for name in ACTIVATION))
        leaves = {name: leaf for name, leaf in t.items() if leaf is not None}
        gradients = torch.autograd.grad(z, list(leaves.values()), self.grad.double())
        results = {"z": z.detach(), "mean": mean.detach(), "variance": variance.detach()}
        return results | {f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}


def assert_right(unit):
    """Assert that whole errs no more than twice as much as composed, and packs what it returns."""
    result, row = unit.run(whole), unit.run(composed)
    for name, truth in unit.truth().items():
        assert result[name].dtype == row[name].dtype, name
        if unit.grad.dtype == torch.float32:
            assert_no_worse_than_eager(result[name], row[name], truth)
        elif truth.numel():  # of a few values, either may be lucky in its roundings
            error, usual = ((r[name] - truth).abs().max() for r in (result, row))
            assert error <= 2 * usual + 2**-9 * truth.abs().max(), name
    packed = eager.pack_signs(result["z"], unit.next_shift)
    assert torch.equal(result["signs"], packed if unit.options.pack else packed[..., :0])
    for name, expected in row.items():
        assert (result[name] is None) == (expected is None), name


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("binary_weight", [True, False], ids=["step2", "step1"])
@pytest.mark.parametrize("unit", UNITS_, ids=[p.id for p in UNITS])
def test_all_results_are_those_of_torch(isa, unit, binary_weight, plan):
    assert_right(Unit(*unit, binary_weight=binary_weight, plan=plan))


@pytest.mark.parametrize("binary_weight", [True, False], ids=["step2", "step1"])
@pytest.mark.parametrize("unit", UNITS_, ids=[p.id for p in UNITS])
def test_given_statistics(isa, unit, binary_weight):
    assert_right(Unit(*unit, binary_weight=binary_weight).give_statistics())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("binary_weight", [True, False], ids=["step2", "step1"])
@pytest.mark.parametrize("unit", UNITS_, ids=[p.id for p in UNITS])
def test_bfloat16(unit, binary_weight, plan):
    assert_right(Unit(*unit, binary_weight=binary_weight, plan=plan).to(torch.bfloat16))


@pytest.mark.parametrize("missing", [ACTIVATION, ("shift_in",), ("shift_in", *ACTIVATION)])
@pytest.mark.parametrize("unit", UNITS_[::2], ids=[p.id for p in UNITS[::2]])
def test_without_some_vectors(isa, unit, missing):
    u = Unit(*unit, pack=False)
    u.t |= dict.fromkeys(missing)
    assert_right(u)
    u = Unit(*unit)
    u.t |= dict.fromkeys(missing)
    u.next_shift = None
    assert_right(u)


def test_given_signs_are_used():
    u = Unit((2, 33, 5, 3), 33, 3, 1, "identity")
    expected = u.run(whole)
    u.signs = eager.pack_signs(u.t["x"], u.t["shift_in"])
    for name, result in u.run(whole).items():
        torch.testing.assert_close(result, expected[name], rtol=0, atol=0)
    u.signs = ~u.signs & (2**32 - 1 >> 31)  # others: only bit 0, inverted
    torch.testing.assert_close(u.run(whole)["z"], u.run(composed)["z"])


def assert_equal_by_threads(unit):
    """Assert the same bits for any number of threads.

    The gradient of a real weight's convolution to its input is torch's, which promises none.
    """
    of_torch = () if unit.options.binary_weight else ("dx", "dshift_in")
    first, *others = (with_threads(n, lambda: unit.run(whole)) for n in THREADS)
    for other in others:
        for name, result in first.items():
            if result is not None and name not in of_torch:
                assert torch.equal(result, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("binary_weight", [True, False], ids=["step2", "step1"])
@pytest.mark.parametrize("unit", UNITS_, ids=[p.id for p in UNITS])
def test_bits_do_not_depend_on_the_number_of_threads(isa, unit, binary_weight, dtype):
    assert_equal_by_threads(Unit(*unit, binary_weight=binary_weight).to(dtype))


@pytest.mark.parametrize("binary_weight", [True, False], ids=["step2", "step1"])
def test_a_large_unit_does_not_depend_on_the_number_of_threads(binary_weight):
    """Several blocks, tiles, strips and spans."""
    shape = (3, 40, 57, 61)
    assert_equal_by_threads(Unit(shape, 40, 3, 1, "identity", binary_weight=binary_weight))


SPECIAL = (torch.nan, torch.inf, -torch.inf, 1e-40, 1e30, 0.0, -0.0)


def with_special_values(values, seed):
    """A few values replaced, so that some channels stay finite."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(SPECIAL)
    choice = special[torch.randint(len(SPECIAL), values.shape, generator=generator)]
    share = 0.5 if values.dim() == 1 else 12 / values.numel()
    chosen = torch.rand(values.shape, generator=generator) < share
    return torch.where(chosen, choice, values)


@pytest.mark.parametrize("name", [*OPERANDS, "grad"])
@pytest.mark.parametrize("given", [False, True], ids=["batch", "given"])
@pytest.mark.parametrize("unit", [UNITS_[i] for i in (1, 4, 6, 7)], ids=["odd", "pool", "1x1", "t"])
def test_nan_and_infinity_go_where_eager_has_them(isa, monkeypatch, unit, given, name):
    u = Unit(*unit)
    if given:
        u.give_statistics()
    if name == "grad":
        u.grad = with_special_values(u.grad, seed=7)
    elif u.t[name] is None:
        return
    else:
        u.t[name] = with_special_values(u.t[name], seed=7)
    result = u.run(whole)
    monkeypatch.setenv("TRITONBNN_LAUNCHERS", "eager")
    plain = u.run(composed)
    of_nan = u.t["weight"].isnan()  # torch's hardtanh passes a gradient there in some layouts only
    assert not result["dweight"][of_nan].any()
    plain["dweight"][of_nan] = 0
    for key, expected in plain.items():
        if expected is None or not expected.is_floating_point():
            continue
        for is_special in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(is_special(result[key]), is_special(expected)), key
    assert torch.equal(result["signs"], plain["signs"])


@pytest.mark.parametrize("binary_weight", [True, False], ids=["step2", "step1"])
def test_nothing_gives_nothing(binary_weight):
    u = Unit((0, 33, 6, 4), 40, 3, 2, "tensor", binary_weight=binary_weight)
    result, row = u.run(whole), u.run(composed)
    for name, expected in row.items():
        torch.testing.assert_close(result[name], expected, equal_nan=True, msg=name)


def test_a_weight_of_zeros(isa):
    u = Unit((2, 33, 5, 3), 33, 3, 1, "identity")
    u.t["weight"] = torch.zeros_like(u.t["weight"])
    u.t["weight"][::2] = -0.0
    assert_right(u)


def test_the_clip_of_the_weights_gradient(isa):
    one = torch.tensor(1.0)
    edges = [0.0, -0.0, 1.0, -1.0, torch.nextafter(one, 2 * one), 1 + 1e-3, 1 - 1e-3, 5.0]
    edges = torch.tensor([float(e) for e in edges])
    u = Unit((2, 33, 5, 3), 33, 3, 1, "identity")
    weight = u.t["weight"]
    weight.view(-1)[: len(edges)] = edges
    weight.view(-1)[-len(edges) :] = -edges
    dweight = u.run(whole)["dweight"]
    assert torch.equal(dweight == 0, weight.abs() > 1)
    assert_right(u)


def strided(x):
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def turned(x):
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def swapped(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 4 else x


def offset(x):
    return torch.cat((x[:1], x))[1:]


@pytest.mark.parametrize("moved", [strided, turned, swapped, offset, torch.Tensor.contiguous])
@pytest.mark.parametrize("binary_weight", [True, False], ids=["step2", "step1"])
@pytest.mark.parametrize("unit", [UNITS_[i] for i in (1, 4, 6, 7)], ids=["odd", "pool", "1x1", "t"])
def test_any_memory(unit, binary_weight, moved):
    u, v = (Unit(*unit, binary_weight=binary_weight) for _ in range(2))
    for name in ("x", "weight", "residual"):
        v.t[name] = None if u.t[name] is None else moved(u.t[name])
    v.grad = moved(u.grad)
    expected = u.run(whole)
    for name, result in v.run(whole).items():
        if name == "mean":
            continue
        # alpha is summed by the weight's order in memory
        torch.testing.assert_close(result, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_expanded_operands():
    u = Unit((2, 33, 6, 4), 33, 3, 1, "identity")
    u.t["x"] = u.t["x"][:1].expand(2, -1, -1, -1)
    u.t["weight"] = u.t["weight"][:1].expand(33, -1, -1, -1)
    u.grad = u.grad[:, :, :1, :1].expand_as(u.grad)
    assert_right(u)


def leaves_of(unit, frozen=()):
    leaves = {k: v.clone() for k, v in unit.t.items() if v is not None}
    return {k: v.requires_grad_(k not in frozen) for k, v in leaves.items()}


def by_ops(unit, leaves, **options):
    """z by the public operator."""
    others = {k: v for k, v in leaves.items() if k != "residual"}
    return ops.binary_unit(
        **others,
        shortcut=leaves.get("residual", unit.options.shortcut),
        stride=unit.options.stride,
        binary_weight=unit.options.binary_weight,
        **options,
    ).z


@pytest.mark.parametrize("binary_weight", [True, False], ids=["step2", "step1"])
@pytest.mark.parametrize("unit", [UNITS_[i] for i in (1, 7)], ids=["odd", "tensor"])
def test_frozen_operands(unit, binary_weight):
    u = Unit(*unit, binary_weight=binary_weight)
    expected = u.run(whole)
    names = [name for name in OPERANDS if u.t[name] is not None]
    few = itertools.combinations(("x", "weight", "shift_in", "gamma", "slope"), 2)
    all_but_one = (set(names) - {name} for name in names)
    for frozen in (*({name} for name in names), *few, *all_but_one):
        leaves = leaves_of(u, frozen)
        z = by_ops(u, leaves)
        assert torch.equal(z, expected["z"])
        z.backward(u.grad)
        for name, leaf in leaves.items():
            if name in frozen:
                assert leaf.grad is None
            else:
                assert torch.equal(leaf.grad, expected[f"d{name}"]), (name, frozen)


def test_autocast_is_a_stream_in_bfloat16():
    u = Unit((2, 33, 5, 3), 33, 3, 1, "identity")
    leaves = leaves_of(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = by_ops(u, leaves)
    z.backward(u.grad.bfloat16())
    narrow = Unit((2, 33, 5, 3), 33, 3, 1, "identity").to(torch.bfloat16).run(whole)
    assert torch.equal(z, narrow["z"])
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, narrow[f"d{name}"].float()), name


def other_vectors(u):
    """The same operands in dtypes and memory that C does not read."""
    t = dict(u.t)
    t["gamma"] = t["gamma"].double()
    t["slope"] = strided(t["slope"])
    t["beta"] = t["beta"].bfloat16()
    t["shift_in"] = t["shift_in"][:1].expand(33)
    return t


def test_vectors_of_other_dtypes_and_memory():
    u = Unit((2, 33, 5, 3), 33, 3, 1, "identity")
    u.t["beta"] = u.t["beta"].bfloat16().float()
    u.t["shift_in"] = u.t["shift_in"][:1].expand(33).contiguous()
    results = {}
    for key, t in (("plain", u.t), ("other", other_vectors(u))):
        leaves = {k: v.detach().requires_grad_() for k, v in t.items() if v is not None}
        z = by_ops(u, leaves)
        z.backward(u.grad)
        results[key] = {"z": z, **{k: leaf.grad.float() for k, leaf in leaves.items()}}
    for name, result in results["other"].items():
        rtol = 1e-2 if name == "beta" else 1e-4
        torch.testing.assert_close(result, results["plain"][name], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("wrong", ["short", "meta"])
def test_wrong_statistics_are_named(wrong):
    u = Unit((2, 33, 5, 3), 33, 3, 1, "identity").give_statistics()
    mean = u.statistics.mean[:1] if wrong == "short" else u.statistics.mean.to("meta")
    with pytest.raises(ValueError, match=r"\bmean\b"):
        by_ops(u, leaves_of(u), statistics=(mean, u.statistics.variance))


class Named(torch.Tensor):
    """A subclass that does nothing."""


class NamedParameter(nn.Parameter):
    """A subclass of the class of parameters."""


def negated(x):
    """The same values, which torch negates when they are read."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


KINDS = {
    "subclass": lambda x: x.as_subclass(Named),
    "parameter": NamedParameter,
    "wrapper": lambda x: TwoTensor(x, x.clone()),
    "negated": negated,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x", "weight", "gamma", "slope", "shift_in"])
def test_tensors_that_are_not_their_memory(name, kind):
    u = Unit((2, 33, 5, 3), 33, 3, 1, "identity")
    expected = u.run(whole)
    leaves = leaves_of(u)
    leaves[name] = KINDS[kind](u.t[name].clone()).detach().requires_grad_()
    z = by_ops(u, leaves)
    z.backward(u.grad)
    results = {"z": z} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    for key, result in results.items():
        plain = result.a if isinstance(result, TwoTensor) else result.as_subclass(torch.Tensor)
        torch.testing.assert_close(plain, expected[key], rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("kind", ["wrapper", "negated"])
def test_a_gradient_that_is_not_its_memory(kind):
    u = Unit((2, 33, 5, 3), 33, 3, 1, "identity")
    expected = u.run(whole)
    leaves = leaves_of(u)
    grad = KINDS[kind](u.grad.contiguous(memory_format=torch.channels_last))
    by_ops(u, leaves).backward(grad)
    for name, leaf in leaves.items():
        plain = leaf.grad.a if isinstance(leaf.grad, TwoTensor) else leaf.grad
        torch.testing.assert_close(plain, expected[f"d{name}"], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("unit", UNITS_, ids=[p.id for p in UNITS])
def test_hooks_may_move_what_is_saved(unit):
    """To memory in another order, as a hook that stores tensors elsewhere may."""
    u = Unit(*unit)
    expected = u.run(whole)
    leaves = leaves_of(u)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: torch.stack((t, t * 0), dim=-1), lambda pair: pair[..., 0]
    )
    with hooks:
        z = by_ops(u, leaves)
    z.backward(u.grad)
    for name, leaf in leaves.items():  # the weight may be summed in another order
        torch.testing.assert_close(leaf.grad, expected[f"d{name}"], rtol=1e-5, atol=1e-5, msg=name)


def test_a_compiled_unit_is_a_row_of_operators(monkeypatch):
    """torch.compile is to see operators; what it traced runs as it is."""
    u = Unit((2, 33, 5, 3), 33, 3, 1, "identity")
    expected = u.run(whole)
    monkeypatch.setattr(whole, "forward", None)
    monkeypatch.setattr(whole, "backward", None)
    torch.compiler.reset()
    leaves = leaves_of(u)
    z = torch.compile(partial(by_ops, u), backend="aot_eager", fullgraph=True)(leaves)
    z.backward(u.grad)
    torch.compiler.reset()
    results = {"z": z} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_python_threads_compute_apart():
    units = [
        Unit((2, 33, 17, 13), 33, 3, 1, "identity"),
        Unit((3, 16, 30, 22), 16, 3, 2, "pool"),
        Unit((2, 31, 9, 9), 62, 1, 1, "repeat", binary_weight=False),
    ]
    expected = [u.run(whole) for u in units]

    def often(i):
        return [units[i].run(whole) for _ in range(15)]

    with ThreadPoolExecutor(3) as pool:
        for first, several in zip(expected, pool.map(often, range(3)), strict=True):
            for other, (name, result) in itertools.product(several, first.items()):
                assert result is None or torch.equal(other[name], result), name


def _in_child(u, expected):
    for name, result in u.run(whole).items():
        assert result is None or torch.equal(result, expected[name]), name


def test_a_forked_child_computes_too():
    u = Unit((2, 33, 17, 13), 33, 3, 1, "identity")
    expected = with_threads(2, lambda: u.run(whole))
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(u, expected))
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0


def test_a_module_that_has_computed_is_copied_and_pickled():
    module = BinaryUnit(16, 16, 3)
    x = activation(2, 16, 5, 4)
    module(x).sum().backward()
    module.eval()
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), expected)


def test_training_does_not_depend_on_the_number_of_threads():
    """All but the stem's weight, whose gradient is torch's: that does depend on it."""

    def trained():
        torch.manual_seed(0)
        options = {"width": 0.25, "small_images": True, "in_channels": 1, "num_classes": 10}
        network = build_model("reactnet_a", **options)
        network.stem[0].requires_grad_(False)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            images, labels = torch.randn(8, 1, 32, 32), torch.randint(10, (8,))
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
        return network.state_dict()

    one, two = (with_threads(n, trained) for n in (1, 2))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
