"""The problems that a network poses to the kernels: shapes, operands, truth, and bytes.

Tuner, benchmark and ahead-of-time gate all work on these. Truth is autograd through
:mod:`tritonbnn.reference` in float64. A convolution's input is +-0.5, where the pseudo-gradient's
slope is exactly 1, so that autograd yields the bare gradient of the convolution.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tritonbnn import eager, kernels, reference
from tritonbnn.bits import WORD_BITS, words
from tritonbnn.kernels import config
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryConv2d, BinaryUnit

STEP_OPS = (
    "pack_signs",
    "conv_packed",
    "rprelu_forward",
    "rprelu_backward",
    "conv_weight_grad",
    "conv_input_grad",
    "sign_backward",
)
"""What a training step of one unit launches, in its order."""

OPS = (*STEP_OPS, "conv_real", "sign_forward")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_WORD_BYTES = 4


def model_layers(model: str, batch: int, size: int, width: float = 1.0) -> Counter[Geometry]:
    """The binary convolutions of a network by name, and how often each shape occurs."""
    layers: Counter[Geometry] = Counter()

    def count(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, channels, height, width = inputs[0].shape
        out_channels, _, k, _ = module.weight.shape
        stride = module.stride
        geometry = Geometry(batch, height, width, channels, out_channels, k, stride, k // 2)
        layers[geometry] += 1

    with torch.device("meta"), torch.no_grad():
        network = build_model(model, width=width).eval()
        for module in network.modules():
            if isinstance(module, (BinaryUnit, BinaryConv2d)):
                module.register_forward_hook(count)
        network(torch.empty(1, 3, size, size))
    return layers


@dataclass(frozen=True)
class Problem:
    """One launcher at one layer of a network, in one dtype."""

    op: str
    layer: Geometry
    dtype: torch.dtype

    @property
    def key(self) -> config.ProblemKey:
        """The tuning table's name for it."""
        name = config.dtype_name(self.dtype)
        if self.op.startswith("conv"):
            return self.layer.key(self.op, "int32" if self.op == "conv_packed" else name)
        batch, channels, height, width = self._elementwise_shape
        return config.ProblemKey(self.op, name, batch, height, width, channels)

    @property
    def _elementwise_shape(self) -> tuple[int, int, int, int]:
        """RPReLU works on a unit's output, everything else on its input."""
        if self.op.startswith("rprelu"):
            return self.layer.output_shape
        return self.layer.batch, self.layer.channels, self.layer.height, self.layer.width

    def with_batch(self, batch: int) -> "Problem":
        """The same problem for another batch."""
        return replace(self, layer=replace(self.layer, batch=batch))

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Random operands, all a launcher or the truth may want; on ``meta`` only their shapes."""
        layer = self.layer
        x_shape = (layer.batch, layer.channels, layer.height, layer.width)
        weight_shape = (layer.out_channels, layer.channels, layer.kernel_size, layer.kernel_size)
        if not self.op.startswith("conv"):
            shape = self._elementwise_shape
            shift_in, slope, shift_out = _grid(torch.randn(3, shape[1], device=device)).unbind()
            vectors = {"shift_in": shift_in, "slope": slope, "shift_out": shift_out}
            return {
                "x": _grid(_image(shape, self.dtype, device)),
                "grad": _image(shape, self.dtype, device),
                "residual": _image(shape, self.dtype, device),
                **vectors,
            }
        return {
            "signs": _random_signs(x_shape, device),
            "weight": _image(weight_shape, torch.float32, device).div_(8).clamp_(-1, 1),
            "weight_signs": _random_signs(weight_shape, device),
            "alpha": torch.rand(layer.out_channels, device=device),
            "grad": _image(layer.output_shape, self.dtype, device),
        }

    def run(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Call the launcher."""
        result = _RUN[self.op](self, inputs)
        return result if isinstance(result, tuple) else (result,)

    def plain(self, inputs: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What plain torch makes of the same inputs, in ``dtype`` throughout."""
        if self.op.startswith("conv"):
            return self._plain_convolution(inputs, dtype)
        x, grad, residual = (inputs[name].to(dtype) for name in ("x", "grad", "residual"))
        vectors = [inputs[name].to(dtype) for name in ("shift_in", "slope", "shift_out")]
        if self.op in ("pack_signs", "sign_forward"):
            return (reference.hard_sign(x + vectors[0].view(-1, 1, 1)),)
        leaves = [leaf.requires_grad_() for leaf in (x.clone(), *vectors)]
        if self.op == "sign_backward":
            y = reference.binarize(*leaves[:2])
            dx, dshift = torch.autograd.grad(y, leaves[:2], grad)
            return dx + residual, dshift
        z = reference.rprelu(*leaves)
        if self.op == "rprelu_forward":
            return (z.detach(),)
        return torch.autograd.grad(z, leaves, grad)

    def _plain_convolution(
        self, inputs: dict[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """y, dx or dweight of conv2d on numbers; alpha counts as part of the weight."""
        layer = self.layer
        x = eager.unpack_signs(inputs["signs"], layer.channels, dtype).div_(2).requires_grad_()
        weight = inputs["weight"].to(dtype)
        if self.op in ("conv_packed", "conv_input_grad"):
            numbers = eager.unpack_signs(inputs["weight_signs"], layer.channels, dtype)
            weight = numbers * inputs["alpha"].to(dtype).view(-1, 1, 1, 1)
        weight = weight.requires_grad_()
        stride, padding = layer.stride, layer.padding
        y = reference.binary_conv2d(x, weight, stride=stride, padding=padding, binary_weight=False)
        if self.op in ("conv_packed", "conv_real"):
            return (y.detach(),)
        leaf = x if self.op == "conv_input_grad" else weight
        return torch.autograd.grad(y, (leaf,), inputs["grad"].to(dtype))

    @property
    def bytes_moved(self) -> int:
        """Bytes that must cross memory once: every operand read, every result written."""
        layer, item = self.layer, self.dtype.itemsize
        if not self.op.startswith("conv"):
            batch, channels, height, width = self._elementwise_shape
            pixels = batch * height * width
            packed = _WORD_BYTES * words(channels)
            streams = {
                "pack_signs": item * channels + packed,
                "sign_forward": 2 * item * channels,
                "sign_backward": 4 * item * channels,
                "rprelu_forward": 2 * item * channels,
                "rprelu_backward": 3 * item * channels,
            }
            return pixels * streams[self.op]
        taps = layer.kernel_size**2
        packed = _WORD_BYTES * words(layer.channels)
        signs = layer.batch * layer.height * layer.width * packed
        out = layer.pixels * layer.out_channels * item
        weights = layer.out_channels * taps * layer.channels
        return {
            "conv_packed": signs + layer.out_channels * taps * packed + out,
            "conv_real": signs + weights * item + out,
            "conv_input_grad": out
            + layer.out_channels * taps * packed
            + layer.batch * layer.height * layer.width * layer.channels * item,
            "conv_weight_grad": signs + out + weights * 4,
        }[self.op]

    @property
    def operations(self) -> int:
        """Multiplications and additions of a real GEMM; 0 for what memory alone bounds."""
        if self.op not in ("conv_real", "conv_input_grad", "conv_weight_grad"):
            return 0
        layer = self.layer
        return 2 * layer.pixels * layer.out_channels * layer.kernel_size**2 * layer.channels


def error_of(problem: Problem, inputs: dict[str, Tensor], results: tuple[Tensor, ...]) -> str:
    """Why the results are wrong, or "" if they err at most twice as much as eager torch does."""
    if problem.op == "pack_signs":
        channels = problem.layer.channels
        results = (eager.unpack_signs(results[0], channels, problem.dtype),)
    ordinary = problem.plain(inputs, problem.dtype)
    truth = problem.plain(inputs, torch.float64)
    for result, plain, exact in zip(results, ordinary, truth, strict=True):
        error = (result.double() - exact).abs().max().item()
        allowed = tolerance(result.dtype, plain, exact)
        if not error <= allowed:  # a NaN is wrong too
            return f"error {error:.3g} where {allowed:.3g} is allowed"
    return ""


def tolerance(dtype: torch.dtype, plain: Tensor, exact: Tensor) -> float:
    """The error a result may have: twice eager torch's own, and a floor of a few roundings.

    Args:
        dtype: of the result.
        plain: eager torch's result.
        exact: the truth, float64.
    """
    rounding = max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps)
    floor = rounding * max(exact.abs().max().item(), 1.0)
    return 2 * (plain.double() - exact).abs().max().item() + floor


def _random_signs(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Packed random signs of a tensor of ``shape``, (N, C, H, W)."""
    n, channels, h, w = shape
    low, high = -(2**31), 2**31 - 1
    signs = torch.randint(low, high, (n, h, w, words(channels)), dtype=torch.int32, device=device)
    if channels % WORD_BITS:
        signs[..., -1] &= (1 << channels % WORD_BITS) - 1
    return signs


def _image(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    image = torch.randn(shape, device=device).to(dtype)
    return image.contiguous(memory_format=torch.channels_last)


def _grid(x: Tensor) -> Tensor:
    """Rounded to multiples of 1/64: sums near 0 are exact, so no rounding decides on a sign."""
    return x.mul_(64).round_().div_(64)


def _window(layer: Geometry) -> dict[str, int]:
    return {"channels": layer.channels, "stride": layer.stride, "padding": layer.padding}


_RUN = {
    "pack_signs": lambda _, t: kernels.pack_signs(t["x"], t["shift_in"]),
    "sign_forward": lambda _, t: kernels.sign_forward(t["x"], t["shift_in"]),
    "sign_backward": lambda _, t: kernels.sign_backward(
        t["grad"], t["x"], t["shift_in"], t["residual"]
    ),
    "rprelu_forward": lambda _, t: kernels.rprelu_forward(
        t["x"], t["shift_in"], t["slope"], t["shift_out"]
    ),
    "rprelu_backward": lambda _, t: kernels.rprelu_backward(
        t["grad"], t["x"], t["shift_in"], t["slope"]
    ),
    "conv_packed": lambda p, t: kernels.conv_packed(
        t["signs"], t["weight_signs"], t["alpha"], dtype=p.dtype, **_window(p.layer)
    ),
    "conv_real": lambda p, t: kernels.conv_real(
        t["signs"], t["weight"], stride=p.layer.stride, padding=p.layer.padding, dtype=p.dtype
    ),
    "conv_input_grad": lambda p, t: kernels.conv_input_grad(
        t["grad"],
        t["weight_signs"],
        t["alpha"],
        height=p.layer.height,
        width=p.layer.width,
        **_window(p.layer),
    ),
    "conv_weight_grad": lambda p, t: kernels.conv_weight_grad(
        t["grad"], t["signs"], kernel_size=p.layer.kernel_size, **_window(p.layer)
    ),
}
