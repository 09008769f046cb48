"""A unit of a trained network, its normalisation folded: one pass, and no statistics.

The weight stays packed. What a product reads of it besides is made at a unit's first call and kept:
on the one-bit core the order in which lanes read it, on the integer core its signs as numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tritonbnn.checks import sum_dtype
from tritonbnn.kernels.below_triton import on_one_bit_core
from tritonbnn.kernels.conv import convolved, product_choice
from tritonbnn.kernels.geometry import Geometry, checked_geometry
from tritonbnn.kernels.unit import contiguous, epilogue
from tritonbnn.kernels.weight import Fragments, Numbers, expand, fragments_of
from tritonbnn.kernels.whole import NUMBERS


@dataclass(eq=False)
class FoldedUnit:
    """z = PReLU(y scale + constant + shortcut(stream)) + shift_out, y the convolution of signs.

    Attributes:
        weight: packed (O, k, k, words) int32, contiguous; the padding is k // 2.
        channels: C, of the input.
        stride: 1 or 2.
        shortcut: "identity", "pool" or "repeat".
        scale: (O,) float32.
        constant: (O,) float32.
        slope: (O,) float32, or None for no PReLU.
        shift_out: (O,) float32, or None for zeros.
        next_shift: (O,) float32, what the next unit adds before its sign, or None for zeros.
        pack: whether there is a next unit, which wants z's signs.
    """

    weight: Tensor
    channels: int
    stride: int
    shortcut: str
    scale: Tensor
    constant: Tensor
    slope: Tensor | None
    shift_out: Tensor | None
    next_shift: Tensor | None
    pack: bool
    _numbers: Numbers | None = field(default=None, init=False)
    _fragments: Fragments | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._zeros = torch.zeros_like(self.scale)
        self._affine = torch.stack((self._zeros, self.scale, self.constant))
        if self.slope is None and self.shift_out is not None:
            self.slope = torch.ones_like(self.scale)
        if self.slope is not None and self.shift_out is None:
            self.shift_out = self._zeros

    def __call__(self, signs: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """z (N, O, H', W') in the stream's dtype, and its signs, with no words if unwanted.

        Args:
            signs: of the input, packed (N, H, W, words), contiguous.
            stream: what the shortcut starts from, in channels_last memory.

        Raises:
            ValueError: the batch holds more pixels than kernels count.
        """
        out_channels, size = self.weight.shape[:2]
        window = (size, self.stride, size // 2)
        geometry = checked_geometry(signs, self.channels, out_channels, *window)
        if on_one_bit_core(geometry, signs.device):
            return self._fused(signs, stream, geometry)
        choice = product_choice(geometry, signs.device)
        if choice.formulation == NUMBERS and self._numbers is None:
            self._numbers = expand(self.weight, self.channels)
        dtype = sum_dtype(self.channels * size**2)
        y = convolved(signs, self.weight, self._numbers, None, geometry, choice, dtype)
        norm = (self._zeros, self.scale, self.constant)
        after = (None if self.slope is None else self._zeros, self.slope, self.shift_out)
        return epilogue(y, stream, norm, after, self.next_shift, self.shortcut, pack=self.pack)

    def tensors(self) -> Iterator[Tensor]:
        """All that the unit holds."""
        vectors = (self.scale, self.constant, self.slope, self.shift_out, self.next_shift)
        held = (self.weight, self._zeros, self._affine, *vectors, *(self._numbers or ()))
        held += () if self._fragments is None else (self._fragments.words, self._fragments.base)
        yield from {id(tensor): tensor for tensor in held if tensor is not None}.values()

    def _fused(self, signs: Tensor, stream: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """On the one-bit core, y never written."""
        from tritonbnn.kernels.mma_unit import product_of, unit_blocks, unit_mma  # it needs Gluon

        blocks = unit_blocks(geometry)
        if self._fragments is None:  # a cut knows of the channels alone, which stay
            self._fragments = fragments_of(self.weight, self.channels, blocks.cut)
        product = product_of(signs, self._fragments, blocks)
        shift_mid = None if self.slope is None else self._zeros
        *activation, next_shift = contiguous(shift_mid, self.slope, self.shift_out, self.next_shift)
        passed = (stream, self._affine, tuple(activation), next_shift)
        return unit_mma(product, *passed, geometry, shortcut=self.shortcut, pack=self.pack)
