"""A packed network: what a deployed one is made of, as arrays.

It is folded: BatchNorm, the weight's scale and the shifts before a PReLU have become one scale and
one constant per channel. A unit computes, for an integer sum s of products of signs::

    t = s * scale + constant + shortcut(x)        z = (t if t > 0 else t * slope) + shift_out

where s is the convolution of sign(x + shift_in), zeros around it, with the weight's signs.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

Array = np.ndarray
SHORTCUTS = ("identity", "repeat", "pool", "project")
"""In the order of ``Shortcut`` in ``csrc/engine.h``."""
OPTIONAL = ("shift_in", "slope", "shift_out")
MOST_CHANNELS = 1 << 16
MOST_CLASSES = 1 << 22
MOST_UNITS = 1 << 12
MOST_SIDE = 1 << 14
"""As in ``csrc/layout.c``, which refuses what is beyond them."""
LEAST_STD = 1e-6
"""Smaller ones would make infinite numbers of pixels."""


class PackedError(ValueError):
    """What is given is no packed network. The message is one line."""


@dataclass(frozen=True, eq=False)
class Unit:
    """A binary unit.

    Attributes:
        channels: C, of the input.
        out_channels: O.
        kernel_size: k, 1 or 3; the padding is k // 2.
        stride: 1 or 2.
        shortcut: "identity"; "repeat", the channels twice; "pool", the means of 2 x 2 pixels; or
            "project", which multiplies these by a real matrix and adds an offset.
        weight: (O, k, k, ceil(C / 8)) uint8. Channel c is bit c % 8 of byte c // 8, 1 for +1.
        scale: (O,) float32.
        constant: (O,) float32.
        shift_in: (C,) float32, or None for zeros.
        slope: (O,) float32, or None for no PReLU.
        shift_out: (O,) float32, or None for zeros.
        projection: (O, C) float32 where the shortcut projects, else None.
        offset: (O,) float32 where the shortcut projects, else None.
    """

    channels: int
    out_channels: int
    kernel_size: int
    stride: int
    shortcut: str
    weight: Array
    scale: Array
    constant: Array
    shift_in: Array | None = None
    slope: Array | None = None
    shift_out: Array | None = None
    projection: Array | None = None
    offset: Array | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What shape each array must have, by its name."""
        kernel, rows = self.kernel_size, self.out_channels
        shapes: dict[str, tuple[int, ...]] = {
            "weight": (rows, kernel, kernel, -(-self.channels // 8)),
            "scale": (rows,),
            "constant": (rows,),
            "shift_in": (self.channels,),
            "slope": (rows,),
            "shift_out": (rows,),
        }
        if self.shortcut == "project":
            shapes |= {"projection": (rows, self.channels), "offset": (rows,)}
        return shapes


@dataclass(frozen=True, eq=False)
class Packed:
    """A whole network: a real stem, binary units, means over pixels, and a real linear head.

    Attributes:
        in_channels: of an image.
        size_multiple: height and width of an image must be multiples of it.
        stem_weight: (S, in_channels, k, k) float32 or float16, k odd; the padding is k // 2.
        stem_offset: (S,) float32.
        stem_stride: 1 or 2.
        stem_pools: whether the maximum of 3 x 3 pixels at stride 2 follows.
        units: at least one.
        head_weight: (classes, O) float32 or float16.
        head_offset: (classes,) float32.
        classes: their names, or None.
        transform: how an image becomes the input, as JSON knows it, or None. ``mean`` and ``std``
            are lists with a number per channel, of pixels between 0 and 1.
    """

    in_channels: int
    size_multiple: int
    stem_weight: Array
    stem_offset: Array
    stem_stride: int
    stem_pools: bool
    units: tuple[Unit, ...]
    head_weight: Array
    head_offset: Array
    classes: tuple[str, ...] | None = None
    transform: dict[str, Any] | None = field(default=None)

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """All arrays by a name that tells where they belong."""
        for name in ("stem_weight", "stem_offset", "head_weight", "head_offset"):
            yield name, getattr(self, name)
        for index, unit in enumerate(self.units):
            for entry in fields(unit):
                value = getattr(unit, entry.name)
                if isinstance(value, Array):
                    yield f"units.{index}.{entry.name}", value


def check(packed: Packed) -> None:
    """Raise PackedError unless every number and every shape of a network is as described."""
    _within("in_channels", packed.in_channels, 1, 1024)
    _within("size_multiple", packed.size_multiple, 1, MOST_SIDE)
    _within("the stem's stride", packed.stem_stride, 1, 2)
    stem = packed.stem_weight
    _float("stem_weight", stem, (None, packed.in_channels, None, None))
    if stem.shape[2] != stem.shape[3] or stem.shape[2] not in (1, 3, 5, 7):
        raise PackedError(f"stem_weight must have k x k taps, k odd and at most 7: {stem.shape}")
    _within("the stem's channels", len(stem), 1, MOST_CHANNELS)
    _float("stem_offset", packed.stem_offset, (len(stem),))
    _within("the number of units", len(packed.units), 1, MOST_UNITS)
    channels = len(stem)
    for index, unit in enumerate(packed.units):
        _check_unit(f"units.{index}", unit, channels)
        channels = unit.out_channels
    _float("head_weight", packed.head_weight, (None, channels))
    _within("the number of classes", len(packed.head_weight), 1, MOST_CLASSES)
    _float("head_offset", packed.head_offset, (len(packed.head_weight),))
    _check_facts(packed)


def _check_unit(name: str, unit: Unit, channels: int) -> None:
    _within(f"{name}.channels", unit.channels, channels, channels)
    _within(f"{name}.out_channels", unit.out_channels, 1, MOST_CHANNELS)
    if unit.kernel_size not in (1, 3) or unit.stride not in (1, 2):
        raise PackedError(f"{name} has kernel size {unit.kernel_size} and stride {unit.stride}")
    if unit.shortcut not in SHORTCUTS:
        raise PackedError(f"{name} has an unknown shortcut")
    halves = unit.shortcut in ("pool", "project")
    factor = 2 if unit.shortcut == "repeat" else 1
    fits = unit.shortcut == "project" or unit.out_channels == factor * channels
    if halves != (unit.stride == 2) or not fits:
        raise PackedError(f"{name}: the shortcut {unit.shortcut} does not fit its shapes")
    for key, shape in unit.shapes().items():
        value = getattr(unit, key)
        if value is None and key in OPTIONAL:
            continue
        if key != "weight":
            _float(f"{name}.{key}", value, shape)
        elif not isinstance(value, Array) or (value.dtype, value.shape) != (np.uint8, shape):
            raise PackedError(f"{name}.weight must be uint8 of shape {shape}")


def _check_facts(packed: Packed) -> None:
    count = len(packed.head_weight)
    if packed.classes is not None and (
        len(packed.classes) != count or not all(isinstance(c, str) for c in packed.classes)
    ):
        raise PackedError(f"the names of the classes must be {count} texts")
    transform = packed.transform
    if transform is None:
        return
    if not isinstance(transform, dict) or not _is_json(transform):
        raise PackedError("the transform must be a dict that JSON can hold")
    for key in ("mean", "std"):
        values = transform.get(key)
        if values is None and "mean" not in transform and "std" not in transform:
            continue
        if (
            not isinstance(values, list)
            or len(values) != packed.in_channels
            or not all(isinstance(v, int | float) and abs(v) < 1e6 for v in values)
        ):
            raise PackedError(
                f"the transform's {key} must be a list of {packed.in_channels} numbers"
            )
        if key == "std" and min(values) < LEAST_STD:
            raise PackedError(f"the transform's std must be {LEAST_STD} or more")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _within(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        expected = f"{least}" if least == most else f"between {least} and {most}"
        raise PackedError(f"{name} must be {expected}, not {value!r}"[:200])


def _float(name: str, value: Any, shape: tuple[int | None, ...]) -> None:
    """Raise unless it is finite float32, or float16 where that is allowed, of the shape."""
    halves = name in ("stem_weight", "head_weight")
    dtypes = (np.float32, np.float16) if halves else (np.float32,)
    if not isinstance(value, Array) or value.dtype not in dtypes:
        raise PackedError(f"{name} must be float32{' or float16' if halves else ''}")
    if value.ndim != len(shape) or any(
        s is not None and s != v for s, v in zip(shape, value.shape, strict=True)
    ):
        raise PackedError(f"{name} has shape {value.shape} where {shape} is wanted")
    if not np.isfinite(value).all():
        raise PackedError(f"{name} holds numbers that are not finite")


def bit_words(weight: Array) -> Array:
    """The signs of a unit's weight in words of 32 channels: (O, k, k, ceil(C / 32)) uint32."""
    spare = -weight.shape[-1] % 4
    padded = np.pad(weight, [(0, 0)] * 3 + [(0, spare)])
    return np.ascontiguousarray(padded).view("<u4").astype(np.uint32)


def without_spare_bits(weight: Array, channels: int) -> Array:
    """The same bytes with 0 in the bits that stand for no channel: a file may hold others."""
    spare = -channels % 8
    if not spare:
        return weight
    clean = weight.copy()
    clean[..., -1] &= 0xFF >> spare
    return clean
