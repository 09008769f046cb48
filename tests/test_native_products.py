"""The products of the native launchers: by counting bits, and by table."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import assert_no_worse_than_eager, gradient, plus_minus
from tritonbnn import checks, eager, native
from tritonbnn.compiled import build
from tritonbnn.native import library

THREADS = (1, 2, 3, 5)

# images, channels, output channels, height, width, kernel size, stride
SHAPES = [
    pytest.param((2, 1, 7, 5, 3, 3, 1), id="one-channel"),
    pytest.param((3, 7, 8, 4, 5, 3, 2), id="7-to-8"),
    pytest.param((2, 8, 16, 1, 40, 3, 1), id="one-row"),
    pytest.param((2, 16, 33, 6, 2, 3, 2), id="two-columns"),
    pytest.param((5, 31, 1, 3, 1, 3, 1), id="one-column"),
    pytest.param((3, 33, 48, 1, 1, 3, 1), id="one-pixel"),
    pytest.param((3, 33, 20, 1, 1, 3, 2), id="one-pixel-stride-2"),
    pytest.param((1, 48, 31, 7, 5, 1, 2), id="1x1-stride-2"),
    pytest.param((2, 300, 40, 3, 5, 3, 1), id="300-channels"),
    pytest.param((1, 40, 300, 5, 3, 1, 1), id="to-300-channels"),
    pytest.param((17, 30, 30, 9, 8, 3, 1), id="30-to-30"),
    pytest.param((0, 8, 8, 4, 4, 3, 1), id="no-images"),
]
FEW = [SHAPES[i] for i in (1, 2, 4, 6, 10)]


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


def with_threads(count, run):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


class Products:
    """Random operands of a convolution, and all its products by some module's launchers."""

    def __init__(self, shape):
        images, channels, out_channels, height, width, k, stride = shape
        self.window = {"stride": stride, "padding": k // 2}
        self.signs = plus_minus(images, channels, height, width)
        self.weight_signs = plus_minus(out_channels, channels, k, k, seed=3)
        self.weight = gradient(out_channels, channels, k, k, seed=4)
        self.alpha = gradient(out_channels, seed=6).abs()
        size = checks.conv_output_size(height, width, k, stride, k // 2)
        self.grad = gradient(images, out_channels, *size, seed=5)
        self.packed = eager.pack_signs(self.signs)
        self.packed_weight = eager.pack_weight(self.weight_signs)[0]

    def scaled(self, module, dtype):
        options = {"channels": self.signs.shape[1], "dtype": dtype, **self.window}
        return module.conv_packed(self.packed, self.packed_weight, self.alpha, **options)

    def integers(self, module, dtype=torch.int32):
        options = {"channels": self.signs.shape[1], "dtype": dtype, **self.window}
        return module.conv_packed(self.packed, self.packed_weight, None, **options)

    def moments(self, module):
        options = {"channels": self.signs.shape[1], **self.window}
        return module.conv_moments(self.packed, self.packed_weight, **options)

    def real(self, module, dtype):
        return module.conv_real(self.packed, self.weight, dtype=dtype, **self.window)

    def input_grad(self, module, dtype):
        _, channels, height, width = self.signs.shape
        size = {"channels": channels, "height": height, "width": width}
        grad = self.grad.to(dtype)
        return module.conv_input_grad(grad, self.packed_weight, self.alpha, **size, **self.window)

    def weight_grad(self, module, dtype):
        size = {"channels": self.signs.shape[1], "kernel_size": self.weight.shape[2]}
        return module.conv_weight_grad(self.grad.to(dtype), self.packed, **size, **self.window)

    def all_real(self, module, dtype):
        """The products of real numbers by name."""
        names = ("scaled", "real", "input_grad", "weight_grad")
        return {name: getattr(self, name)(module, dtype) for name in names}

    def truth(self, dtype=torch.float32):
        """The same by torch in float64, of operands that are rounded to ``dtype`` first."""
        weight, grad = (t.to(dtype).double() for t in (self.weight, self.grad))
        scaled = self.weight_signs.double() * self.alpha.double().view(-1, 1, 1, 1)
        x = self.signs.double().requires_grad_()
        leaf = weight.clone().requires_grad_()
        (dx,) = torch.autograd.grad(F.conv2d(x, scaled, **self.window), x, grad)
        (dweight,) = torch.autograd.grad(F.conv2d(x, leaf, **self.window), leaf, grad)
        x = x.detach()
        return {
            "scaled": F.conv2d(x, scaled, **self.window),
            "real": F.conv2d(x, weight, **self.window),
            "input_grad": dx,
            "weight_grad": dweight,
        }


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_signs_are_exact(isa, shape):
    p = Products(shape)
    exact = F.conv2d(p.signs.double(), p.weight_signs.double(), **p.window)
    for dtype in (torch.int16, torch.int32, torch.float32):
        result = p.integers(native, dtype)
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(result.double(), exact)
    assert torch.equal(p.integers(native, torch.bfloat16), exact.bfloat16())
    mean, variance = p.moments(native)
    expected = torch.var_mean(exact, dim=(0, 2, 3), correction=0) if shape[0] else (0, 0)
    count = max(exact[:, :1].numel(), 1)
    torch.testing.assert_close(mean, exact.sum(dim=(0, 2, 3)) / count, rtol=1e-14, atol=0)
    if shape[0]:
        torch.testing.assert_close(variance, expected[0], rtol=1e-10, atol=1e-10)


def test_sums_beyond_16_bits(isa):
    x, weight = torch.ones(1, 4096, 3, 4), torch.ones(5, 4096, 3, 3)
    weight[3] = -1
    weight[4, ::3] = -1
    packed = eager.pack_signs(x), eager.pack_weight(weight)[0]
    window = {"channels": 4096, "stride": 1, "padding": 1}
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    result = native.conv_packed(*packed, None, dtype=torch.int32, **window)
    assert result.max() == 9 * 4096
    assert torch.equal(result.double(), exact)
    mean, variance = native.conv_moments(*packed, **window)
    torch.testing.assert_close(mean, exact.mean(dim=(0, 2, 3)), rtol=1e-14, atol=0)
    truth = exact.var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(variance, truth, rtol=1e-10, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "columns", "k"),
    [(1, 1, 1), (7, 33, 31), (40, 16, 300), (5, 8, 32), (3, 0, 9), (0, 3, 9), (2, 3, 70_001)],
)
def test_matrices_of_signs(isa, rows, columns, k):
    a, b = plus_minus(rows, k), plus_minus(columns, k, seed=7)
    result = native.packed_matmul(eager.pack_signs(a), eager.pack_signs(b), k)
    assert result.dtype == torch.int32
    assert torch.equal(result.double(), a.double() @ b.double().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_reals(isa, shape, dtype):
    p = Products(shape)
    result, plain = p.all_real(native, dtype), p.all_real(eager, dtype)
    for name, truth in p.truth(dtype).items():
        assert result[name].dtype == plain[name].dtype
        assert result[name].is_contiguous(memory_format=torch.channels_last)
        assert_no_worse_than_eager(result[name], plain[name], truth)


def test_long_sums_keep_their_digits(isa):
    p = Products((3, 8, 8, 250, 400, 3, 1))
    p.grad += 1  # so that the sums grow, where random ones stay near 0
    p.signs[:, ::2] = 1
    p.packed = eager.pack_signs(p.signs)
    truth = p.truth()["weight_grad"]
    error = (p.weight_grad(native, torch.float32) - truth).abs().max()
    assert error <= 1e-6 * truth.abs().max()  # eager torch's is five times as large


def test_long_sums_over_channels_keep_their_digits(isa):
    p = Products((1, 4096, 16, 2, 3, 3, 1))
    p.weight += 1
    p.packed = eager.pack_signs(torch.ones_like(p.signs))
    p.signs.fill_(1)
    result, plain = p.real(native, torch.float32), p.real(eager, torch.float32)
    assert_no_worse_than_eager(result, plain, p.truth()["real"])
    q = Products((1, 16, 4096, 2, 3, 3, 1))
    q.grad += 1
    q.weight_signs[:, ::2] = 1
    q.packed_weight = eager.pack_weight(q.weight_signs)[0]
    result, plain = (q.input_grad(module, torch.float32) for module in (native, eager))
    assert_no_worse_than_eager(result, plain, q.truth()["input_grad"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_do_not_depend_on_the_number_of_threads(isa, shape, dtype):
    p = Products(shape)

    def run():
        moments = dict(zip(("mean", "variance"), p.moments(native), strict=True))
        return p.all_real(native, dtype) | moments | {"integers": p.integers(native)}

    first, *others = (with_threads(count, run) for count in THREADS)
    for other in others:
        for name, result in first.items():
            assert torch.equal(result, other[name]), name


def test_large_products_do_not_depend_on_the_number_of_threads():
    """Several tiles, several strips, and sums of several spans."""
    p = Products((3, 40, 35, 57, 61, 3, 1))
    first, *others = (with_threads(n, lambda: p.all_real(native, torch.float32)) for n in THREADS)
    for other in others:
        for name, result in first.items():
            assert torch.equal(result, other[name]), name


@pytest.mark.parametrize("value", ["finite", "inf"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((5, 8, 8, 32, 33, 3, 1), id="2-sections"),
        pytest.param((33, 3, 5, 47, 45, 1, 1), id="sections-of-2-spans"),
    ],
)
def test_threads_share_the_long_sums_of_few_channels(isa, shape, value):
    p = Products(shape)
    if value == "inf":
        p.grad[-1, 2, 0, 0] = torch.inf  # padding is left out then
    first, *others = (
        with_threads(n, lambda: p.weight_grad(native, torch.float32)) for n in THREADS
    )
    for other in others:
        assert torch.equal(other.view(torch.int32), first.view(torch.int32))
    plain = p.weight_grad(eager, torch.float32)
    if value == "inf":
        assert_alike(first, plain)
    else:
        assert_no_worse_than_eager(first, plain, p.truth()["weight_grad"])


def test_sections_are_joined_from_the_first_to_the_last(isa):
    """A channel each has a huge number, its negative and 1, in three sections in a row: the 1 is
    left only where it comes last."""
    section, sections, huge = 3840, 16, 2.0**27
    p = Products((1, 1, sections - 2, sections, section, 1, 1))
    p.packed = eager.pack_signs(torch.ones_like(p.signs))
    p.grad.zero_()
    for channel in range(sections - 2):
        for row, value in enumerate((huge, -huge, 1), channel):
            p.grad[0, channel, row, 7 * row] = value
    for count in THREADS:
        result = with_threads(count, lambda: p.weight_grad(native, torch.float32))
        assert torch.equal(result, torch.ones_like(result)), count


PLACES = [(0, 0), (0, 1), (-1, -1), (1, 0), (1, 1)]
"""Pixels of an image: corners, borders, and inside."""


def special(value):
    """A pair to place: one value twice, or two that have no sum."""
    inf = float("inf")
    return {"nan": (torch.nan,) * 2, "inf": (inf, inf), "-inf": (-inf, -inf), "both": (inf, -inf)}[
        value
    ]


def assert_alike(result, plain):
    """Assert NaN and infinity in the same places, and elsewhere about equal numbers."""
    for is_special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(is_special(result), is_special(plain))
    finite = torch.isfinite(plain)
    torch.testing.assert_close(result[finite], plain[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "both"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stride", [1, 2])
def test_special_gradients(isa, place, stride, value):
    for size in ((5, 4), (1, 1)):
        p = Products((2, 31, 20, *size, 3, stride))
        height, width = p.grad.shape[2:]
        y, x = place[0] % height, place[1] % width
        p.grad[0, 3, y, x], p.grad[1, 3, 0, -1] = special(value)
        p.grad[1, 17, y, x] = special(value)[0]
        for name in ("weight_grad", "input_grad"):
            run = getattr(p, name)
            results = [with_threads(n, lambda run=run: run(native, torch.float32)) for n in THREADS]
            assert_alike(results[0], run(eager, torch.float32))
            for other in results[1:]:  # a NaN is equal to none
                assert torch.equal(other.view(torch.int32), results[0].view(torch.int32))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "both"])
@pytest.mark.parametrize("shape", FEW)
def test_special_weights_and_scales(isa, shape, value):
    p = Products(shape)
    p.weight[0, 0, 0, 0], p.weight[0, -1, -1, -1] = special(value)
    p.alpha[-1] = special(value)[0]
    p.grad = p.grad.abs() + 0.1  # infinity times 0 is another test
    for name in ("real", "input_grad", "scaled"):
        run = getattr(p, name)
        assert_alike(run(native, torch.float32), run(eager, torch.float32))


def test_an_infinite_scale_stays_off_the_rows_beside_an_image(isa):
    p = Products((2, 8, 40, 5, 4, 3, 1))
    p.grad.abs_()
    p.packed_weight.fill_(-1)
    p.alpha[3] = torch.inf
    result = p.input_grad(native, torch.float32)
    assert torch.equal(result, torch.full_like(result, torch.inf))


def test_a_small_sum_beside_a_large_border(isa):
    """Of a tap that leaves the border out, relative to itself."""
    p = Products((2, 30, 16, 9, 9, 3, 1))
    p.grad[:, :, 0] *= 1e6
    truth = p.truth()["weight_grad"][:, :, 0]
    result = p.weight_grad(native, torch.float32)[:, :, 0]
    assert (result - truth).abs().max() <= 1e-6 * truth.abs().max()


@pytest.mark.parametrize(("size", "stride"), [((1, 1), 1), ((1, 6), 1), ((2, 2), 2), ((7, 1), 1)])
def test_a_tap_that_never_meets_the_image_has_no_gradient(isa, size, stride):
    """Not even a rounding: an optimizer may divide it by its own size."""
    p = Products((5, 33, 20, *size, 3, stride))
    truth = p.truth()["weight_grad"]
    assert (truth == 0).any()
    assert torch.equal(p.weight_grad(native, torch.float32) == 0, truth == 0)


@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e36])
def test_tiny_and_huge_numbers(isa, scale):
    p = Products((2, 33, 20, 5, 4, 3, 1))
    for operand in (p.grad, p.weight):
        operand.mul_(scale)
    result = p.all_real(native, torch.float32)
    for name, truth in p.truth().items():
        error = (result[name].double() - truth).abs().max()
        assert error <= 1e-6 * truth.abs().max() + 1e-43, name


def strided(x):
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def turned(x):
    return x.contiguous(memory_format=torch.channels_last)


def offset(x):
    return torch.cat((x[:1], x))[1:]


@pytest.mark.parametrize("moved", [strided, turned, offset])
@pytest.mark.parametrize("shape", FEW)
def test_any_memory(shape, moved):
    p, q = Products(shape), Products(shape)
    q.weight, q.grad = moved(p.weight), moved(p.grad)
    q.packed, q.packed_weight = strided(p.packed), strided(p.packed_weight)
    q.alpha = strided(p.alpha)
    expected = p.all_real(native, torch.float32)
    for name, result in q.all_real(native, torch.float32).items():
        assert torch.equal(result, expected[name]), name


def test_an_expanded_gradient():
    p = Products((2, 33, 20, 5, 4, 3, 1))
    p.grad = torch.full((1, 1, 1, 1), 0.5).expand(p.grad.shape)
    result = p.all_real(native, torch.float32)
    for name in ("input_grad", "weight_grad"):
        truth = p.truth()[name]
        assert_no_worse_than_eager(result[name], truth.float(), truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_those_of_eager(dtype):
    p = Products((2, 33, 20, 5, 4, 3, 1))
    expected = p.all_real(eager, dtype)
    for name, result in p.all_real(native, dtype).items():
        assert torch.equal(result, expected[name]), name


def test_an_image_without_pixels_is_refused():
    p = Products((2, 33, 20, 5, 4, 3, 1))
    options = {"channels": 33, "height": 0, "width": 4, **p.window}
    with pytest.raises(ValueError, match="an image must have height and width, not 0 x 4"):
        native.conv_input_grad(p.grad[:, :, :0], p.packed_weight, p.alpha, **options)
