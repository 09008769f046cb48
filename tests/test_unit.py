"""The launchers of the half-block around its convolution, against torch in float64."""

import pytest
import torch

from tests.helpers import KERNEL_DEVICE, activation, assert_no_worse_than_eager, vectors
from tritonbnn import eager, kernels
from tritonbnn.bits import words
from tritonbnn.kernels import config, elementwise, unit_grad
from tritonbnn.layout import channels_last


@pytest.mark.parametrize(("dtype", "largest"), [(torch.int16, 9216), (torch.int32, 9 * 8192)])
def test_moments_of_integers_are_exact(launchers, device, monkeypatch, dtype, largest):
    monkeypatch.setattr(elementwise, "MAX_PARTIALS", 3)
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-largest, largest + 1, (7, 33, 11, 13), generator=generator, dtype=dtype)
    a[:, 5] = largest
    a = a.contiguous(memory_format=torch.channels_last)  # which no launcher needs to copy
    mean, variance = (m.cpu() for m in launchers.channel_moments(a.to(device)))
    values = a.transpose(0, 1).reshape(33, -1).tolist()
    total = [sum(v) for v in values]
    count = len(values[0])
    spread = [sum(x * x for x in v) * count - s * s for v, s in zip(values, total, strict=True)]
    assert mean.tolist() == [s / count for s in total]
    exact = torch.tensor([s / count**2 for s in spread], dtype=torch.float64)
    # One rounding of mean^2, which is at most largest^2.
    assert (variance - exact).abs().max() <= 2**-52 * largest**2
    assert variance[5] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_reals_survive_a_large_mean(launchers, device, dtype):
    a = activation(4, 33, 5, 7, dtype=dtype, layout="channels_last") + 1000
    mean, variance = (m.cpu() for m in launchers.channel_moments(a.to(device)))
    truth = torch.var_mean(a.double(), dim=(0, 2, 3), correction=0)
    assert torch.allclose(variance, truth[0], rtol=1e-5)
    assert torch.allclose(mean, truth[1], rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shortcut", ["identity", "pool", "repeat"])
def test_launchers_are_no_worse_than_eager(launchers, device, dtype, shortcut):
    size = {"pool": (33, 10, 6), "identity": (33, 5, 3), "repeat": (17, 5, 3)}[shortcut]
    channels = 34 if shortcut == "repeat" else 33
    a = (activation(2, channels, 5, 3, seed=2) * 20).to(torch.int16)
    a = a.contiguous(memory_format=torch.channels_last)
    stream = activation(2, *size, dtype=dtype, layout="channels_last")
    grad = activation(2, channels, 5, 3, dtype=dtype, seed=5)
    mean, scale, offset, shift_mid, slope, shift_out = vectors(6, channels)

    def run(module, on, to):
        m = [v.to(device=on, dtype=to) for v in (mean, scale, offset, shift_mid, slope, shift_out)]
        s, g = stream.to(device=on, dtype=to), grad.to(device=on, dtype=to)
        z, _ = module.unit_forward(a.to(on), s, *m, None, shortcut=shortcut, pack=False)
        du, sums = module.unit_activation_backward(g, a.to(on), s, *m[:5], shortcut=shortcut)
        return z, du, *sums, module.unit_norm_backward(g, a.to(on), *m[:3])

    exact = run(eager, "cpu", torch.float64)
    # The eager twin in this dtype is the yardstick, not the truth.
    plain = run(eager, "cpu", dtype)
    for result, ordinary, truth in zip(run(launchers, device, dtype), plain, exact, strict=True):
        assert_no_worse_than_eager(result, ordinary, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 96, 5, 3), (3, 33, 1, 7), (1, 1, 1, 1)])
def test_bits_stand_for_the_gradient_to_u(unwritten_memory, shape, dtype):
    """What follows from them is what follows from the gradient, bit for bit."""
    channels = shape[1]
    a = activation(*shape, dtype=dtype, layout="channels_last").to(KERNEL_DEVICE)
    stream, grad = (activation(*shape, dtype=dtype, seed=s) for s in (4, 5))
    stream, grad = (channels_last(t).to(KERNEL_DEVICE) for t in (stream, grad))
    mean, scale, offset, shift_mid, slope = (v.to(KERNEL_DEVICE) for v in vectors(5, channels))
    operands = (grad, a, stream, (mean, scale, offset), (shift_mid, slope), "identity")
    du, sums = unit_grad.activation_backward(*operands, stored=True)
    bits, same = unit_grad.activation_backward(*operands, stored=False)
    assert du.positive is None
    assert bits.grad is grad
    assert torch.equal(sums, same)
    positive = eager.unpack_signs(bits.positive.cpu(), channels, torch.float32) > 0
    low = (grad * slope.view(-1, 1, 1)).to(dtype)
    assert torch.equal(torch.where(positive, grad.cpu(), low.cpu()), du.grad.cpu())
    dy, other = (unit_grad.norm_backward(g, a, scale, mean, offset) for g in (du, bits))
    assert torch.equal(dy, other)
    left = words(channels) * 32 - channels  # bits of no channel
    assert not (
        eager.unpack_signs(bits.positive.cpu(), channels + left, dtype)[:, channels:] > 0
    ).any()


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("shape", [(2, 96, 5, 3), (3, 33, 1, 7), (1, 1, 1, 1)])
def test_the_epilogue_packs_the_next_signs(launchers, device, shape, shifted):
    """The signs of the stream as stored, so as a pass of their own would pack them."""
    a = activation(*shape, seed=2).mul(9).to(torch.int16).to(device)
    stream = activation(*shape, layout="channels_last").to(device)
    mean, *others, next_shift = (v.to(device) for v in vectors(7, shape[1]))
    next_shift = next_shift if shifted else None
    options = {"shortcut": "identity", "pack": True}
    z, signs = launchers.unit_forward(a, stream, mean, *others, next_shift, **options)
    assert torch.equal(signs, launchers.pack_signs(z, next_shift))
    assert signs.shape == (shape[0], *shape[2:], -(-shape[1] // 32))


def test_kernels_name_bad_input():
    a, vector = torch.zeros(2, 8, 4, 4, dtype=torch.int16), torch.zeros(8)
    with pytest.raises(ValueError, match=r"stream must have shape \(2, 8, 8, 8\)"):
        kernels.unit_forward(a, a.float(), *[vector] * 7, shortcut="pool", pack=False)
    with pytest.raises(TypeError, match="float64"):
        kernels.unit_forward(a, a.double(), *[vector] * 7, shortcut="identity", pack=False)
    elsewhere = torch.zeros(8, device="meta")
    with pytest.raises(ValueError, match=r"one device, not a on cpu, .* next_shift on meta"):
        kernels.unit_forward(a, a.float(), *[vector] * 6, elsewhere, shortcut="identity", pack=True)
    grad = torch.zeros(2, 8, 4, 4, device="meta")
    with pytest.raises(ValueError, match="one device, not a on cpu, grad on meta"):
        kernels.unit_activation_backward(grad, a, a.float(), *[vector] * 5, shortcut="identity")


def test_a_plan_is_looked_up_by_shape():
    shapes = {"batch": 3, "height": 4, "width": 4, "channels": 8, "out_channels": 8}
    shapes |= {"kernel_size": 3, "stride": 1, "dtype": torch.float32, "device": torch.device("cpu")}
    shapes |= {"binary_weight": True}
    assert eager.unit_plan(**shapes) == kernels.unit_plan(**shapes) == "keep"
    key = config.ProblemKey("unit_plan", "int16+float32", 4, 4, 4, 8, 8, 3, 1)
    choice = config.Choice("recompute", config.default(key).tile)
    with config.using(choice):
        assert kernels.unit_plan(**shapes) == "recompute"
    assert config.look_up(key, {key: choice}).formulation == "recompute"
