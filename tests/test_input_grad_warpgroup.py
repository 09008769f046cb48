"""The input's gradient whose weight lies in registers, in numpy or on a GPU that has the core."""

import pytest
import torch

from tests.conftest import HAS_GPU
from tests.helpers import KERNEL_DEVICE, activation, gradient, plus_minus, vectors
from tritonbnn import eager, kernels
from tritonbnn.kernels import below_triton, config, input_grad, targets
from tritonbnn.kernels.binarize import Skipped
from tritonbnn.kernels.candidates import candidates
from tritonbnn.kernels.config import Choice, TileConfig
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.kernels.sign_words import sign_words
from tritonbnn.layout import channels_last

SMALL, WIDE = TileConfig(32, 64, 64, 4, 3), TileConfig(128, 128, 64, 4, 4)
H100 = targets.TARGETS["sm_90"]

NEAR_ZERO = 1e-4
"""Error of a float32 sum: of K products of about 1 it is some K 2^-24, 4e-5 for the 648 here."""


@pytest.fixture
def warpgroup(one_bit_core):
    if HAS_GPU and not below_triton.runs(KERNEL_DEVICE, "warpgroup"):
        pytest.skip("needs a GPU with the warpgroup's tensor core: sm_90")


def test_a_word_holds_the_signs_of_a_lane():
    outputs, channels, taps = 72, 40, 9
    packed, alpha = eager.pack_weight(gradient(outputs, channels, 3, 3))
    passed = packed.to(KERNEL_DEVICE), alpha.to(KERNEL_DEVICE), channels, torch.float16, 1
    words, scales = (each.cpu() for each in sign_words(*passed))
    assert words.shape == (taps, 2, 1, 4, 32, 1)
    signs = eager.unpack_signs(packed, channels, torch.float32).reshape(outputs, channels, taps)
    for tap, out, channel in ((0, 0, 0), (8, 71, 39), (4, 13, 22), (7, 64, 8), (2, 37, 31)):
        step, twice = out % 64 // 8, out % 8
        lane, bit = channel % 8 * 4 + twice // 2, channel % 16 // 8 * 8 + step + twice % 2 * 16
        word = words[tap, out // 64, 0, channel // 16, lane, 0].item()
        assert (word >> bit & 1) == (signs[out, channel, tap] < 0)
        found = scales[out // 64, twice // 2, step, twice % 2]
        assert found == alpha[out].half()
    assert (scales[1, :, 1:] == 0).all()


@pytest.mark.parametrize(
    ("layer", "tile", "dtype"),
    [
        (Geometry(1, 5, 7, 136, 72, 3, 1, 1), WIDE, torch.bfloat16),
        (Geometry(3, 7, 5, 40, 72, 3, 2, 1), SMALL, torch.bfloat16),
        (Geometry(1, 1, 1, 8, 8, 3, 1, 1), SMALL, torch.float16),
        (Geometry(2, 6, 9, 64, 200, 1, 1, 0), SMALL, torch.float16),
        (Geometry(1, 4, 6, 200, 64, 3, 2, 1), WIDE, torch.float16),
    ],
    ids=str,
)
def test_it_is_that_of_eager_torch(warpgroup, layer, tile, dtype):
    packed, alpha = eager.pack_weight(
        gradient(layer.out_channels, layer.channels, *[layer.kernel_size] * 2)
    )
    grad = gradient(*layer.output_shape, dtype=dtype)
    window = {
        name: getattr(layer, name) for name in ("channels", "height", "width", "stride", "padding")
    }
    passed = (each.to(KERNEL_DEVICE) for each in (grad, packed, alpha))
    with config.using(Choice("warpgroup", tile)):
        found = kernels.conv_input_grad(*passed, **window)
    exact = eager.conv_input_grad(grad.double(), packed, alpha.to(dtype).double(), **window)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.cpu(), exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=NEAR_ZERO
    )


@pytest.mark.parametrize(
    ("shortcut", "channels", "dtype", "stored"),
    [
        ("identity", 72, torch.bfloat16, False),
        ("identity", 8, torch.float16, True),
        ("pool", 40, torch.bfloat16, True),
        ("repeat", 40, torch.float16, False),
    ],
    ids=str,
)
def test_the_sign_and_the_shortcut_follow(warpgroup, shortcut, channels, dtype, stored):
    stride, outputs = 1 + (shortcut == "pool"), channels * (1 + (shortcut == "repeat"))
    layer = Geometry(2, 4, 6, channels, outputs, 3, stride, 1)
    packed, alpha = eager.pack_weight(gradient(outputs, channels, 3, 3))
    stream, shift = activation(2, channels, 4, 6, dtype=dtype), vectors(1, channels)[0]
    dy, given = (gradient(*layer.output_shape, dtype=dtype, seed=seed) for seed in (4, 5))
    positive, slope = plus_minus(*layer.output_shape), vectors(1, outputs)[0]
    du = torch.where(positive > 0, given, (given.float() * slope.view(-1, 1, 1)).to(dtype))
    skipped = (du,) if stored else (given, eager.pack_signs(positive), slope)
    images = [channels_last(each.to(KERNEL_DEVICE)) for each in (dy, stream, skipped[0])]
    rest = [each.to(KERNEL_DEVICE) for each in skipped[1:]]
    binary = input_grad.Binary(packed.to(KERNEL_DEVICE), alpha.to(KERNEL_DEVICE))
    with config.using(Choice("warpgroup", SMALL)):
        assert input_grad.reads_signs(layer, dtype, KERNEL_DEVICE)
        dx, sums = input_grad.stream_grad(
            images[0],
            binary,
            layer,
            images[1],
            shift.to(KERNEL_DEVICE),
            Skipped(images[2], *rest),
            shortcut,
        )
    size = {"channels": channels, "height": 4, "width": 6, "stride": stride, "padding": 1}
    signs_grad = eager.conv_input_grad(dy.double(), packed, alpha.to(dtype).double(), **size)
    exact = eager.sign_backward(
        signs_grad, stream.double(), shift.double(), du.double(), shortcut=shortcut
    )
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(dx.cpu(), exact[0].to(dtype), rtol=eps, atol=NEAR_ZERO)
    torch.testing.assert_close(sums.cpu().double().sum(0), exact[1], rtol=1e-5, atol=NEAR_ZERO)


@pytest.mark.parametrize(
    ("layer", "dtype", "formulation"),
    [
        (Geometry(256, 14, 14, 512, 512, 3, 1, 1), "bfloat16", "warpgroup"),
        (Geometry(256, 14, 14, 512, 512, 3, 2, 1), "float16", "warpgroup"),
        (Geometry(256, 14, 14, 512, 512, 3, 1, 1), "float32", "dot"),
        (Geometry(256, 14, 14, 512, 508, 1, 1, 0), "bfloat16", "dot"),
        (Geometry(256, 14, 14, 508, 512, 1, 1, 0), "bfloat16", "dot"),
        (Geometry(256, 14, 14, 64, 64, 1, 2, 0), "bfloat16", "dot"),
        (Geometry(256, 14, 14, 32, 64, 1, 1, 0), "bfloat16", "dot"),
    ],
)
def test_what_it_does_not_take_is_the_plain_products(layer, dtype, formulation):
    key = layer.key("conv_input_grad", dtype)
    assert config.default(key, target=H100).formulation == formulation
    assert all(config.takes(each.formulation, key) for each in candidates(key, H100))
    assert config.default(key, target=targets.TARGETS["sm_80"]).formulation == "dot"


@pytest.mark.parametrize(
    ("trusted", "binary", "padding", "formulation"),
    [
        (True, True, 1, "warpgroup"),
        (False, True, 1, "dot"),
        (True, False, 1, "dot"),
        (True, True, 0, "dot"),
    ],
)
def test_what_it_cannot_do_is_the_plain_products(
    monkeypatch, trusted, binary, padding, formulation
):
    monkeypatch.setattr(below_triton, "runs", lambda *_: trusted)
    layer = Geometry(2, 5, 3, 64, 8, 3, 1, padding)
    with config.using(H100):
        found = input_grad._choice(layer, torch.bfloat16, torch.device("meta"), binary=binary)
    assert found.formulation == formulation
