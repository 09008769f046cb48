"""The shapes of one convolution problem, checked once and handed to kernels as constants."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import Tensor

from tritonbnn import checks
from tritonbnn.kernels.config import ProblemKey

MAX_PIXELS = 2**31 - 2**12
"""Pixels are counted in int32, tails of a tile included; addresses are int64."""

MAX_WEIGHTS = 2**31 - 1
"""Addresses within a weight are int32."""


@dataclass(frozen=True)
class Shape:
    """A convolution as kernels know it: one constant, so that dividing by a size is multiplying.

    Fields alone, no properties: what a kernel compiled to is found again by their values.
    """

    height: int
    width: int
    out_height: int
    out_width: int
    channels: int
    out_channels: int
    kernel_size: int
    stride: int
    padding: int


@dataclass(frozen=True)
class Geometry:
    """A square convolution over channels-last images."""

    batch: int
    height: int
    width: int
    channels: int
    out_channels: int
    kernel_size: int
    stride: int
    padding: int

    @cached_property
    def out_height(self) -> int:
        return self._out_size[0]

    @cached_property
    def out_width(self) -> int:
        return self._out_size[1]

    @property
    def _out_size(self) -> tuple[int, int]:
        return checks.conv_output_size(
            self.height, self.width, self.kernel_size, self.stride, self.padding
        )

    @cached_property
    def pixels(self) -> int:
        """Pixels of the output, over the batch."""
        return self.batch * self.out_height * self.out_width

    @cached_property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.out_channels, self.out_height, self.out_width

    @cached_property
    def shape(self) -> Shape:
        """What kernels know of it."""
        return Shape(
            self.height,
            self.width,
            self.out_height,
            self.out_width,
            self.channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
        )

    def key(self, op: str, dtype: str) -> ProblemKey:
        """The tuning table's name for an operation on this problem."""
        return _key(self, op, dtype)


@lru_cache(maxsize=4096)
def _key(geometry: Geometry, op: str, dtype: str) -> ProblemKey:
    return ProblemKey(
        op,
        dtype,
        geometry.batch,
        geometry.height,
        geometry.width,
        geometry.channels,
        geometry.out_channels,
        geometry.kernel_size,
        geometry.stride,
    )


def check_geometry(geometry: Geometry) -> None:
    """Raise ValueError unless kernels take the problem; the message names what they take."""
    if min(geometry.batch, geometry.height, geometry.width) < 0:
        raise ValueError(
            f"batch, height and width must not be negative, not "
            f"{geometry.batch}, {geometry.height}, {geometry.width}"
        )
    if min(geometry.out_height, geometry.out_width) < 0:
        raise ValueError(f"the image of {geometry.height} x {geometry.width} is too small")
    pixels = max(geometry.pixels, geometry.batch * geometry.height * geometry.width)
    if pixels > MAX_PIXELS:
        raise ValueError(f"at most {MAX_PIXELS} pixels in a batch, not {pixels}")
    weights = geometry.out_channels * geometry.channels * geometry.kernel_size**2
    if weights > MAX_WEIGHTS:
        raise ValueError(f"at most {MAX_WEIGHTS} weights in a layer, not {weights}")


def checked_geometry(
    x: Tensor, channels: int, out_channels: int, kernel_size: int, stride: int, padding: int
) -> Geometry:
    """The problem whose input is ``x``, packed (N, H, W, words), if kernels take it."""
    batch, height, width, _ = x.shape
    sizes = (batch, height, width, channels, out_channels, kernel_size, stride, padding)
    return known_geometry(*sizes)


@lru_cache(maxsize=1024)
def known_geometry(*sizes: int) -> Geometry:
    """The problem of these sizes: one object each, which a step computes once in a run."""
    geometry = Geometry(*sizes)
    check_geometry(geometry)
    return geometry
