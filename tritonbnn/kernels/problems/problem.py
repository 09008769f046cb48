"""A launcher at one layer of a network: shapes, random operands, and what is known of it.

Values that decide on a branch lie on a grid on which float32 sums are exact, so that no rounding
decides on a sign.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tritonbnn.bits import WORD_BITS, words
from tritonbnn.kernels import config
from tritonbnn.kernels.geometry import Geometry

Tensors = dict[str, Tensor]
Truth = Callable[["Problem", Tensors, torch.dtype], tuple[Tensor, ...]]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

VECTORS = ("shift_in", "shift_mid", "slope", "shift_out", "mean", "scale", "offset")

PLAN = "unit_plan"
"""A whole unit, forward and backward: its choice is not how it runs but what it keeps."""

WORD_BYTES = 4
PIXELS = (0, 2, 3)


def own_key(problem: "Problem") -> config.ProblemKey:
    """The tuning table's name of an elementwise problem of the stream's dtype."""
    batch, channels, height, width = problem.shape
    name = config.dtype_name(problem.dtype)
    return config.ProblemKey(problem.op, name, batch, height, width, channels)


@dataclass(frozen=True)
class Kind:
    """What is known of a launcher.

    Attributes:
        run: calls it: of a problem and its operands.
        truth: what is right, by autograd through :mod:`tritonbnn.reference`, in a dtype.
        inputs: random operands by name; on ``meta`` only their shapes.
        key: the tuning table's name of a problem.
        bytes_moved: that must cross memory once: every operand read, every result written.
        formula: the same as one writes it in torch, of operands and a shortcut's name, vectors as
            (1, C, 1, 1): what a fused kernel races against. None where a vendor's library does it.
        product: of "real" numbers or of "bits"; empty for what memory alone bounds.
        on_convolution: whether it works on a convolution's output.
        of_outputs: whether its images are what follows the layer, not the layer's input.
        packs: whether its result are packed signs, which the truth is of as numbers.
    """

    run: Callable[["Problem", Tensors], Any]
    truth: Truth
    inputs: Callable[["Problem", torch.device], Tensors]
    bytes_moved: Callable[["Problem"], int]
    key: Callable[["Problem"], config.ProblemKey] = own_key
    formula: Callable[[Tensors, str], Any] | None = None
    product: str = ""
    on_convolution: bool = False
    of_outputs: bool = False
    packs: bool = False


KINDS: dict[str, Kind] = {}
"""By the launcher's name; the files beside this one fill it."""


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
    def kind(self) -> Kind:
        """What is known of the launcher."""
        return KINDS[self.op]

    @property
    def key(self) -> config.ProblemKey:
        """The tuning table's name for it."""
        return self.kind.key(self)

    @property
    def on_convolution(self) -> bool:
        """Whether it works on a convolution's output."""
        return self.kind.on_convolution

    @property
    def output_dtype(self) -> torch.dtype:
        """Of the convolution."""
        return torch.int16 if self.binary_weight else self.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of an elementwise problem's images: a layer's input, or what follows its output."""
        if self.kind.on_convolution or self.kind.of_outputs:
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

    def inputs(self, device: torch.device) -> Tensors:
        """Random operands by name; on ``meta`` only their shapes."""
        return self.kind.inputs(self, device)

    def run(self, inputs: Tensors) -> tuple[Tensor, ...]:
        """Call the launcher."""
        result = self.kind.run(self, inputs)
        return result if isinstance(result, tuple) else (result,)

    @property
    def bytes_moved(self) -> int:
        """Bytes that must cross memory once: every operand read, every result written."""
        return self.kind.bytes_moved(self)

    @property
    def operations(self) -> int:
        """Multiplications and additions of a real GEMM; 0 for what memory alone bounds."""
        return self._product if self.kind.product == "real" else 0

    @property
    def bit_operations(self) -> int:
        """Those of a product of signs, which bound it where there is a one-bit tensor core."""
        return self._product if self.kind.product == "bits" else 0

    @property
    def _product(self) -> int:
        layer = self.layer
        return 2 * layer.pixels * layer.out_channels * layer.kernel_size**2 * layer.channels


def stream_inputs(problem: Problem, device: torch.device) -> Tensors:
    """An image, its gradient, and vectors."""
    inputs = vector_inputs(problem, device)
    inputs["x"] = grid(image(problem.shape, problem.dtype, device))
    return inputs


def vector_inputs(problem: Problem, device: torch.device) -> Tensors:
    """Vectors of all names, and a gradient."""
    channels = problem.shape[1]
    vectors = grid(torch.randn(len(VECTORS), channels, device=device)).unbind()
    inputs = dict(zip(VECTORS, vectors, strict=True))
    inputs["grad"] = image(problem.shape, problem.dtype, device)
    return inputs


def images_moved(count: float) -> Callable[[Problem], int]:
    """The bytes of so many images of the stream."""

    def bytes_moved(problem: Problem) -> int:
        batch, channels, height, width = problem.shape
        return int(batch * height * width * channels * problem.dtype.itemsize * count)

    return bytes_moved


def elementwise(formula: Callable[[Problem, Tensors], tuple[Tensor, ...]]) -> Truth:
    """The truth by a formula of named tensors, vectors as (C, 1, 1) that require gradients.

    It runs in float32 at least and rounds its images once, as fused kernels do.
    """

    def truth(problem: Problem, inputs: Tensors, dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = torch.promote_types(dtype, torch.float32)
        tensors = {name: tensor.to(wide) for name, tensor in inputs.items()}
        for name in VECTORS:
            tensors[name] = tensors[name].view(-1, 1, 1).clone().requires_grad_()
        found = [result.detach() for result in formula(problem, tensors)]
        return tuple(r.to(dtype) if r.dim() == 4 else r.flatten() for r in found)

    return truth


def random_signs(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Packed random signs of a tensor of ``shape``, (N, C, H, W)."""
    n, channels, h, w = shape
    low, high = -(2**31), 2**31 - 1
    signs = torch.randint(low, high, (n, h, w, words(channels)), dtype=torch.int32, device=device)
    if channels % WORD_BITS:
        signs[..., -1] &= (1 << channels % WORD_BITS) - 1
    return signs


def image(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers in channels_last memory."""
    values = torch.randn(shape, device=device).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


def grid(x: Tensor) -> Tensor:
    """Rounded to multiples of 1/64: sums near 0 are exact, so no rounding decides on a sign."""
    return x.mul_(64).round_().div_(64)
