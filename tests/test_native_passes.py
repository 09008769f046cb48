"""The elementwise half of the native launchers, where C can go wrong and torch does not."""

import pytest
import torch

from tests.helpers import activation, assert_no_worse_than_eager, gradient, vectors
from tritonbnn import eager, native
from tritonbnn.compiled import build
from tritonbnn.native import library

CHANNELS = (1, 7, 8, 16, 17, 24, 33, 48, 300)
SHORTCUTS = ("identity", "pool", "repeat")
KINDS = [("identity", torch.float32), ("pool", torch.bfloat16), ("repeat", torch.float32)]
"""Shortcuts, and the dtype of the stream that each is tried with."""

NAMES = ("mean", "scale", "offset", "shift_mid", "slope", "shift_out", "next_shift")
SPECIAL = (float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 0.0, -0.0)


@pytest.fixture(autouse=True)
def compiled(unwritten_memory):
    if not library.available():
        pytest.skip(library.reason())


@pytest.fixture(params=list(build.ISAS))
def isa(request):
    """Every instruction set that this machine runs, in turn."""
    runnable = list(build.ISAS)
    if runnable.index(request.param) > runnable.index(library.isa()):
        pytest.skip(f"this machine does not run {request.param}")
    with library.using(request.param):
        yield request.param


def inputs(channels, shortcut="identity", dtype=torch.float32, images=2, size=(6, 5)):
    """What the passes of a unit of so many channels read, by name."""
    height, width = size
    streams = {
        "identity": (images, channels, height, width),
        "repeat": (images, channels // 2, height, width),
        "pool": (images, channels, 2 * height, 2 * width),
    }
    x = activation(*streams[shortcut], dtype=dtype, layout="channels_last")
    named = {
        "a": (activation(images, channels, height, width, seed=2) * 20).to(torch.int16),
        "x": x,
        "grad": gradient(images, channels, height, width, dtype=dtype, seed=5),
        "dsigns": gradient(*x.shape, dtype=dtype, seed=6),
        "shift": vectors(1, x.shape[1], seed=4)[0],
    }
    return named | dict(zip(NAMES, vectors(len(NAMES), channels), strict=True))


def run(module, t, shortcut="identity", dtype=None):
    """All elementwise results of a unit and of the activations alone, by name."""
    floats = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in t.items()}
    a, x, grad, dsigns, shift, *vectors = floats.values()
    kind = {"shortcut": shortcut}
    z, packed = module.unit_forward(a, x, *vectors, **kind, pack=True)
    du, sums = module.unit_activation_backward(grad, a, x, *vectors[:5], **kind)
    du_bare, sums_bare = module.unit_activation_backward(
        grad, a, x, *vectors[:3], None, None, **kind
    )
    dx, dshift = module.sign_backward(dsigns, x, shift, grad, **kind)
    real = x.abs()
    rprelu = module.rprelu_backward(dsigns, x, shift, shift)
    results = {
        "z": z,
        "z without PReLU": module.unit_forward(
            a, x, *vectors[:3], None, None, None, None, **kind, pack=False
        )[0],
        "du": du,
        "du without PReLU": du_bare,
        "dy": module.unit_norm_backward(grad, a, *vectors[:3]),
        "dx": dx,
        "dshift": dshift,
        "rprelu": module.rprelu_forward(x, shift, shift, shift),
        "signs": module.sign_forward(x, shift),
        "alpha": module.pack_weight(x)[1],
    }
    for name, several in {
        "sums": sums,
        "sums without PReLU": sums_bare,
        "rprelu": rprelu,
        "moments of integers": module.channel_moments(a),
        "moments of reals": module.channel_moments(real),
    }.items():
        results |= {f"{name} {i}": each for i, each in enumerate(several)}
    bits = {
        "packed": packed,
        "packed again": module.pack_signs(z, vectors[-1]),
        "packed x": module.pack_signs(x, shift),
        "packed weight": module.pack_weight(x)[0],
    }
    return results | bits


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("shortcut", "dtype"), KINDS)
def test_any_number_of_channels(isa, channels, shortcut, dtype):
    channels += channels % 2 if shortcut == "repeat" else 0
    t = inputs(channels, shortcut, dtype)
    result, plain = run(native, t, shortcut), run(eager, t, shortcut)
    truth = run(eager, t, shortcut, torch.float64)
    assert torch.equal(result["packed"], result["packed again"])
    assert torch.equal(result["packed x"], plain["packed x"])
    assert torch.equal(result["packed weight"], plain["packed weight"])
    for name, exact in truth.items():
        if not name.startswith("packed"):
            assert result[name].dtype == plain[name].dtype
            assert_no_worse_than_eager(result[name], plain[name], exact.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", CHANNELS)
def test_bits_do_not_depend_on_the_number_of_threads(isa, channels, dtype):
    size = (20, -(-4000 // channels))  # several blocks for every thread
    t = inputs(channels, "identity", dtype, size=size)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(native, t))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, result in results[0].items():
            assert torch.equal(result, other[name]), name


def with_special_values(values, seed):
    """Some values replaced: few of an activation's, so that some channels' sums stay finite."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(SPECIAL)
    special.view(torch.int32)[0] = 2**31 - 1  # a NaN that careless rounding makes -0
    special = special.to(values.dtype)
    choice = special[torch.randint(len(SPECIAL), values.shape, generator=generator)]
    chosen = torch.rand(values.shape, generator=generator) < (0.5 if values.dim() == 1 else 0.05)
    return torch.where(chosen, choice, values)


@pytest.mark.parametrize(("shortcut", "dtype"), KINDS)
@pytest.mark.parametrize("name", ["a", "x", "grad", "dsigns", "shift", *NAMES])
def test_nan_and_infinity_go_where_eager_has_them(isa, name, shortcut, dtype):
    t = inputs(34, shortcut, dtype)
    t["a"] = t["a"].to(dtype)
    t[name] = with_special_values(t[name], seed=7)
    result, plain = run(native, t, shortcut), run(eager, t, shortcut)
    for key, expected in plain.items():
        for is_special in (torch.isnan, torch.isposinf, torch.isneginf):
            if expected.is_floating_point():
                assert torch.equal(is_special(result[key]), is_special(expected)), key
    assert torch.equal(result["packed x"], plain["packed x"])
    assert torch.equal(result["packed weight"], plain["packed weight"])


def test_a_gradient_passes_where_the_activation_is_nan(isa):
    """So torch has it: a NaN is not <= 0."""
    t = inputs(34)
    t["x"] = torch.full_like(t["x"], torch.nan)
    du, plain = (run(module, t)["du"] for module in (native, eager))
    assert torch.equal(du, plain)
    assert torch.equal(du, t["grad"])


def test_denormals_are_numbers(isa):
    tiny = torch.tensor([1e-40, -1e-40, 2e-45, -2e-45]).view(4, 1).repeat(1, 40)
    shift = torch.full((40,), 1e-42)
    assert torch.equal(native.pack_signs(tiny, shift), eager.pack_signs(tiny, shift))
    ones, zeros = torch.ones(40), torch.zeros(40)
    result = native.rprelu_forward(tiny, shift, ones * 0.5, zeros)
    assert torch.equal(result, eager.rprelu_forward(tiny, shift, ones * 0.5, zeros))
    assert result[0, 0] > 0 > result[1, 0]


def unaligned(x):
    """The same values one number later in memory than an allocation starts."""
    memory = torch.zeros(x.numel() + 1, dtype=x.dtype)
    if x.dim() != 4:
        return memory[1:].view(x.shape).copy_(x)
    n, channels, height, width = x.shape
    return memory[1:].view(n, height, width, channels).permute(0, 3, 1, 2).copy_(x)


def every_second(x):
    """The same values with others between them."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("moved", [unaligned, every_second])
@pytest.mark.parametrize(("shortcut", "dtype"), KINDS)
def test_any_memory(isa, shortcut, moved, dtype):
    t = inputs(34, shortcut, dtype)
    result = run(native, {name: moved(value) for name, value in t.items()}, shortcut)
    for name, expected in run(native, t, shortcut).items():
        if name != "alpha":  # by the weight's order in memory
            assert torch.equal(result[name], expected), name


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_nothing_gives_nothing(shortcut):
    t = inputs(34, shortcut, images=0)
    plain = run(eager, t, shortcut)
    for name, result in run(native, t, shortcut).items():
        torch.testing.assert_close(result, plain[name], equal_nan=True, msg=name)


def test_integers_of_32_bits(isa):
    t = inputs(33)
    a = t["a"].to(torch.int32)
    for name, result in run(native, t | {"a": a}).items():
        assert torch.equal(result, run(native, t)[name]), name
    large = torch.tensor([[2**31 - 1], [-(2**31)], [3]], dtype=torch.int32)
    mean, _ = native.channel_moments(large)
    assert mean.item() == 2 / 3


def test_a_weight_in_any_layout(isa):
    for shape in ((5, 33, 3, 3), (40, 8, 3, 3), (3, 70, 1, 1), (6, 40)):
        weight = gradient(*shape)
        turned = weight.movedim(1, -1).contiguous().movedim(-1, 1)  # channels innermost
        filters_inside = weight.transpose(0, 1).contiguous().transpose(0, 1)
        layouts = [weight, turned, filters_inside, every_second(weight)]
        packed, _ = eager.pack_weight(weight)
        truth = weight.double().flatten(1).abs().mean(1)
        for layout in layouts:
            result, alpha = native.pack_weight(layout)
            assert torch.equal(result, packed)
            assert_no_worse_than_eager(alpha, truth.float(), truth)


def test_bad_shapes_are_named():
    t = inputs(8)
    with pytest.raises(ValueError, match=r"shift must have shape \(8,\)"):
        native.pack_signs(t["x"], t["shift"][:7])
    with pytest.raises(ValueError, match=r"stream must have shape \(2, 8, 12, 10\)"):
        native.unit_forward(
            t["a"], t["x"], *(t[name] for name in NAMES), shortcut="pool", pack=False
        )
    with pytest.raises(ValueError, match=r"one shape, not x \(2, 8, 6, 5\), grad"):
        native.rprelu_backward(t["grad"][:1], t["x"], t["shift"], t["shift"])
