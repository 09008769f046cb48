"""The problems that a network poses to the kernels: shapes, operands, bytes and operations.

Tuner, benchmark and ahead-of-time gate all work on these; :mod:`tritonbnn.kernels.truth` says what
is right. Values that decide on a branch lie on a grid on which float32 sums are exact, so that no
rounding decides on a sign.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tritonbnn import kernels, ops
from tritonbnn.bits import WORD_BITS, words
from tritonbnn.checks import shortcut_input_shape
from tritonbnn.kernels import config
from tritonbnn.kernels.geometry import Geometry
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryConv2d, BinaryUnit

STEP_OPS = (
    "pack_signs",
    "conv_packed",
    "channel_moments",
    "unit_forward",
    "unit_activation_backward",
    "unit_norm_backward",
    "conv_weight_grad",
    "conv_input_grad",
    "sign_backward",
)
"""What a training step of one unit launches, in its order."""

SCALED = "conv_scaled"
"""conv_packed as binary_conv2d launches it: times alpha, in the stream's dtype."""

OPS = (
    *STEP_OPS,
    "conv_real",
    SCALED,
    "packed_difference",
    "sign_forward",
    "rprelu_forward",
    "rprelu_backward",
)

PLAN = "unit_plan"
"""A whole unit, forward and backward: its choice is not how it runs but what it keeps."""

REAL_PRODUCTS = ("conv_real", "conv_input_grad", "conv_weight_grad")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

VECTORS = ("shift_in", "shift_mid", "slope", "shift_out", "mean", "scale", "offset")

_WORD_BYTES = 4
_INTEGER_BYTES = 2  # of a convolution's output


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
    """One launcher, or a whole unit, at one layer of a network.

    Attributes:
        op: the launcher's name, or :data:`PLAN`.
        layer: the convolution.
        dtype: of the stream.
        binary_weight: False for step 1, where the convolution's output is real.
    """

    op: str
    layer: Geometry
    dtype: torch.dtype
    binary_weight: bool = True

    @property
    def key(self) -> config.ProblemKey:
        """The tuning table's name for it."""
        name = config.dtype_name(self.dtype)
        if self.op in ("conv_packed", SCALED):
            return self.layer.key("conv_packed", "int32")
        if self.op.startswith("conv"):
            return self.layer.key(self.op, name)
        if self.on_convolution:
            stream = () if self.op == "channel_moments" else (self.dtype,)
            name = config.joint_dtype_name(self.output_dtype, *stream)
        if self.op == PLAN:
            return self.layer.key(PLAN, name)
        batch, channels, height, width = self.shape
        if self.op == "packed_difference":  # a row is what one pixel's channels pack to
            name, channels = "int32", WORD_BITS * words(channels)
            batch, height, width = batch * height * width, 1, 1
        return config.ProblemKey(self.op, name, batch, height, width, channels)

    @property
    def on_convolution(self) -> bool:
        """Whether it works on a convolution's output."""
        return self.op.startswith(("unit", "channel"))

    @property
    def output_dtype(self) -> torch.dtype:
        """Of the convolution."""
        return torch.int16 if self.binary_weight else self.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of an elementwise problem's images: a layer's input, or what follows its output."""
        if self.on_convolution or self.op.startswith("rprelu"):
            return self.layer.output_shape
        return self.layer.batch, self.layer.channels, self.layer.height, self.layer.width

    @property
    def shortcut(self) -> str:
        """How the stream of a unit around this layer skips the convolution."""
        if self.layer.stride == 2:
            return "pool"
        return "repeat" if self.layer.out_channels == 2 * self.layer.channels else "identity"

    def with_batch(self, batch: int) -> "Problem":
        """The same problem for another batch."""
        return replace(self, layer=replace(self.layer, batch=batch))

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Random operands by name; on ``meta`` only their shapes."""
        if self.op.startswith("conv"):
            return self._convolution_inputs(device)
        shape = self.shape
        if self.op == "packed_difference":
            return {name: _random_signs(shape, device).flatten(0, 2) for name in ("a", "b")}
        vectors = _grid(torch.randn(len(VECTORS), shape[1], device=device)).unbind()
        inputs = dict(zip(VECTORS, vectors, strict=True))
        inputs["grad"] = _image(shape, self.dtype, device)
        if not self.on_convolution:
            inputs["x"] = _grid(_image(shape, self.dtype, device))
            inputs["residual"] = _image(self._residual_shape, self.dtype, device)
            return inputs
        integers = _image(shape, torch.float32, device).mul_(16).to(torch.int16)
        inputs["a"] = integers.to(self.output_dtype)
        inputs["scale"] = torch.full((shape[1],), 1 / 16, device=device)
        stream = _image(shortcut_input_shape(shape, self.shortcut), self.dtype, device)
        inputs["stream"] = _grid(stream)
        if self.op == PLAN:
            inputs["weight"] = self._convolution_inputs(device)["weight"]
            inputs["shift_in"] = _grid(torch.randn(self.layer.channels, device=device))
        return inputs

    @property
    def _residual_shape(self) -> tuple[int, ...]:
        """Of the gradient that a shortcut sends back to the layer's input."""
        n, channels, height, width = self.shape
        return {
            "identity": self.shape,
            "repeat": (n, 2 * channels, height, width),
            "pool": (n, channels, height // 2, width // 2),
        }[self.shortcut]

    def _convolution_inputs(self, device: torch.device) -> dict[str, Tensor]:
        layer = self.layer
        x_shape = (layer.batch, layer.channels, layer.height, layer.width)
        weight_shape = (layer.out_channels, layer.channels, layer.kernel_size, layer.kernel_size)
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

    @property
    def bytes_moved(self) -> int:
        """Bytes that must cross memory once: every operand read, every result written."""
        if self.op.startswith("conv"):
            return self._convolution_bytes
        batch, channels, height, width = self.shape
        image = self.dtype.itemsize * channels
        integers = self.output_dtype.itemsize * channels
        stream = {"identity": image, "repeat": image // 2, "pool": 4 * image}[self.shortcut]
        residual = {"identity": image, "repeat": 2 * image, "pool": image // 4}[self.shortcut]
        per_pixel = {
            "pack_signs": image + _WORD_BYTES * words(channels),
            "packed_difference": _WORD_BYTES * (2 * words(channels) + 1),
            "sign_forward": 2 * image,
            "sign_backward": 3 * image + residual,
            "rprelu_forward": 2 * image,
            "rprelu_backward": 3 * image,
            "channel_moments": integers,
            "unit_forward": integers + stream + image + _WORD_BYTES * words(channels),
            "unit_activation_backward": image + integers + stream + image,
            "unit_norm_backward": image + integers + image,
        }
        return batch * height * width * per_pixel[self.op]

    @property
    def _convolution_bytes(self) -> int:
        layer, item = self.layer, self.dtype.itemsize
        taps = layer.out_channels * layer.kernel_size**2
        word_bytes = _WORD_BYTES * words(layer.channels)
        pixels = layer.batch * layer.height * layer.width
        outputs = layer.pixels * layer.out_channels
        return {
            "conv_packed": (pixels + taps) * word_bytes + _INTEGER_BYTES * outputs,
            SCALED: (pixels + taps) * word_bytes + item * outputs,
            "conv_real": pixels * word_bytes + item * (taps * layer.channels + outputs),
            "conv_input_grad": item * (outputs + pixels * layer.channels) + taps * word_bytes,
            "conv_weight_grad": pixels * word_bytes + item * outputs + 4 * taps * layer.channels,
        }[self.op]

    @property
    def operations(self) -> int:
        """Multiplications and additions of a real GEMM; 0 for what memory alone bounds."""
        return self._product if self.op in REAL_PRODUCTS else 0

    @property
    def bit_operations(self) -> int:
        """Those of a product of signs, which bound it where there is a one-bit tensor core."""
        return self._product if self.op in ("conv_packed", SCALED) else 0

    @property
    def _product(self) -> int:
        layer = self.layer
        return 2 * layer.pixels * layer.out_channels * layer.kernel_size**2 * layer.channels


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


def _whole_unit(problem: Problem, t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """A unit's output and all its gradients, under the plan of the tuning table."""
    leaves = [t[name].detach().requires_grad_() for name in WHOLE_UNIT]
    z = ops.binary_unit(
        *leaves,
        shortcut=problem.shortcut,
        stride=problem.layer.stride,
        binary_weight=problem.binary_weight,
    ).z
    return z.detach(), *torch.autograd.grad(z, leaves, t["grad"])


WHOLE_UNIT = ("stream", "weight", "scale", "offset", "shift_in", "shift_mid", "slope", "shift_out")
"""The operands of a whole unit, as binary_unit takes them; scale and offset are BatchNorm's."""

_UNIT = ("a", "stream", "mean", "scale", "offset", "shift_mid", "slope")

_RUN = {
    PLAN: _whole_unit,
    "pack_signs": lambda _, t: kernels.pack_signs(t["x"], t["shift_in"]),
    "packed_difference": lambda _, t: kernels.packed_difference(t["a"], t["b"]),
    "sign_forward": lambda _, t: kernels.sign_forward(t["x"], t["shift_in"]),
    "sign_backward": lambda p, t: kernels.sign_backward(
        t["grad"], t["x"], t["shift_in"], t["residual"], shortcut=p.shortcut
    ),
    "rprelu_forward": lambda _, t: kernels.rprelu_forward(
        t["x"], t["shift_in"], t["slope"], t["shift_out"]
    ),
    "rprelu_backward": lambda _, t: kernels.rprelu_backward(
        t["grad"], t["x"], t["shift_in"], t["slope"]
    ),
    "conv_packed": lambda p, t: kernels.conv_packed(
        t["signs"], t["weight_signs"], None, dtype=torch.int16, **_window(p.layer)
    ),
    SCALED: lambda p, t: kernels.conv_packed(
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
    "channel_moments": lambda _, t: kernels.channel_moments(t["a"]),
    "unit_forward": lambda p, t: kernels.unit_forward(
        **{name: t[name] for name in (*_UNIT, "shift_out")},
        next_shift=t["offset"],
        shortcut=p.shortcut,
        pack=True,  # as in a chain; the stream is what is compared
    )[0],
    "unit_activation_backward": lambda p, t: kernels.unit_activation_backward(
        **{name: t[name] for name in ("grad", *_UNIT)}, shortcut=p.shortcut
    ),
    "unit_norm_backward": lambda _, t: kernels.unit_norm_backward(
        t["grad"], t["a"], t["scale"], t["slope"], t["offset"]
    ),
}
