"""The same network in numpy, for machines without the C library: exact, and slow."""

from typing import Any

import numpy as np
from numpy.lib import stride_tricks

from tritonbnn.deploy.packed import Array, Packed, Unit


class PlainNetwork:
    """A network that numpy runs.

    Args:
        packed: checked.
    """

    name = "numpy"

    def __init__(self, packed: Packed) -> None:
        self._packed = packed
        self._signs = [weight_signs(unit) for unit in packed.units]

    @property
    def weight_bytes(self) -> int:
        """Of the network's arrays, and of its signs as floats."""
        arrays = [array for _, array in self._packed.arrays()] + self._signs
        return sum(array.nbytes for array in arrays)

    scratch_bytes = 0

    def logits(self, images: Array, table: Array | None, threads: int) -> Array:
        """As :meth:`tritonbnn.deploy.native.NativeNetwork.logits`; threads are numpy's own.

        Raises:
            ValueError: a unit of stride 2 meets an odd size.
        """
        packed = self._packed
        if table is not None:
            images = np.stack([row[images[:, c]] for c, row in enumerate(table)], axis=1)
        x = _convolve(images, packed.stem_weight.astype(np.float32), packed.stem_stride)
        x += packed.stem_offset[:, None, None]
        if packed.stem_pools:
            x = _maximum(x)
        for unit, signs in zip(packed.units, self._signs, strict=True):
            x = run_unit(unit, signs, x)
        features = x.mean((2, 3))
        return features @ packed.head_weight.astype(np.float32).T + packed.head_offset


def run_unit(unit: Unit, signs: Array, x: Array) -> Array:
    """A unit's output, (N, O, H / stride, W / stride), from its input stream (N, C, H, W)."""
    shift = 0 if unit.shift_in is None else unit.shift_in[:, None, None]
    inputs = np.where(x + shift >= 0, np.float32(1), np.float32(-1))
    # sums of +-1 are exact in float32 up to 2^24
    t = _convolve(inputs, signs, unit.stride)
    t = t * unit.scale[:, None, None] + unit.constant[:, None, None] + _shortcut(unit, x)
    if unit.slope is not None:
        t = np.where(t > 0, t, t * unit.slope[:, None, None])
    if unit.shift_out is not None:
        t = t + unit.shift_out[:, None, None]
    return t


def weight_signs(unit: Unit) -> Array:
    """The signs of a unit's weight as numbers, (O, C, k, k) float32."""
    bits = np.unpackbits(unit.weight, axis=-1, count=unit.channels, bitorder="little")
    return np.ascontiguousarray(bits.transpose(0, 3, 1, 2)).astype(np.float32) * 2 - 1


def _convolve(x: Array, weight: Array, stride: int) -> Array:
    """A convolution with padding k // 2: (N, C, H, W) and (O, C, k, k) to (N, O, H', W')."""
    kernel = weight.shape[2]
    pad = kernel // 2
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = _windows(x, kernel)[:, :, ::stride, ::stride]
    return np.stack([np.tensordot(weight, image, ((1, 2, 3), (0, 3, 4))) for image in windows])


def _windows(x: Array, size: int) -> Array:
    """(N, C, H, W) as (N, C, H - size + 1, W - size + 1, size, size), a view."""
    view: Any = stride_tricks.sliding_window_view  # its types do not know two axes
    return view(x, (size, size), axis=(2, 3))


def _pooled(x: Array) -> Array:
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"a unit of stride 2 needs even height and width, not {x.shape[2:]}")
    top, bottom = x[:, :, ::2], x[:, :, 1::2]
    sums = top[..., ::2] + top[..., 1::2]
    sums += bottom[..., ::2]
    sums += bottom[..., 1::2]
    return sums * np.float32(0.25)


def _shortcut(unit: Unit, x: Array) -> Array:
    if unit.shortcut == "identity":
        return x
    if unit.shortcut == "repeat":
        return np.concatenate((x, x), axis=1)
    pooled = _pooled(x)
    if unit.projection is None or unit.offset is None:
        return pooled
    projected = np.einsum("oc,nchw->nohw", unit.projection, pooled, optimize=True)
    return projected + unit.offset[:, None, None]


def _maximum(x: Array) -> Array:
    """Of 3 x 3 pixels at stride 2, padded by one."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    windows = _windows(padded, 3)[:, :, ::2, ::2]
    return windows.max((-2, -1))
