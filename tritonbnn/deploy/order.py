"""A packed network in the memory order that the C engine reads: numpy alone, no compiler."""

from dataclasses import dataclass

import numpy as np

from tritonbnn.deploy.packed import SHORTCUTS, Array, Packed, Unit, bit_words, without_spare_bits

LANES, HEAD_LANES = 16, 64
"""As in ``csrc/lanes.h``."""
UNIT_NUMBERS = ("channels", "out_channels", "kernel_size", "stride", "shortcut")
NETWORK_NUMBERS = (
    *("in_channels", "classes", "stem_channels"),
    *("stem_kernel_size", "stem_stride", "stem_pools"),
)
"""The whole numbers of ``Unit`` and ``Network`` in ``csrc/engine.h``, in their order there."""


@dataclass(frozen=True, eq=False)
class OrderedUnit:
    """``Unit`` in ``csrc/engine.h``, which tells the order of each array.

    Attributes:
        shortcut: its place in SHORTCUTS.
        weight: uint32, of any shape, contiguous; as are the others, which are float32.
        projection: None where the shortcut does not project.
    """

    channels: int
    out_channels: int
    kernel_size: int
    stride: int
    shortcut: int
    weight: Array
    whole: Array
    vectors: Array
    projection: Array | None


@dataclass(frozen=True, eq=False)
class OrderedNetwork:
    """``Network`` in ``csrc/engine.h``."""

    in_channels: int
    classes: int
    stem_channels: int
    stem_kernel_size: int
    stem_stride: int
    stem_pools: int
    units: tuple[OrderedUnit, ...]
    stem: Array
    head: Array

    def arrays(self) -> list[Array]:
        """All of them."""
        found = [self.stem, self.head]
        for unit in self.units:
            found += [unit.weight, unit.whole, unit.vectors]
            if unit.projection is not None:
                found.append(unit.projection)
        return found


def in_order(packed: Packed) -> OrderedNetwork:
    """A checked network as C reads it."""
    shifts = [unit.shift_in for unit in packed.units[1:]]
    pairs = zip(packed.units, [*shifts, None], strict=True)
    units = tuple(_unit(unit, next_shift) for unit, next_shift in pairs)
    stem = packed.stem_weight.astype(np.float32).transpose(0, 2, 3, 1)
    first = packed.units[0]
    threshold = _threshold(first.shift_in, first.channels)
    taps = _blocks(stem.reshape(len(stem), -1), LANES).ravel()
    head = _blocks(packed.head_weight.astype(np.float32), HEAD_LANES).ravel()
    return OrderedNetwork(
        in_channels=packed.in_channels,
        classes=len(packed.head_weight),
        stem_channels=len(stem),
        stem_kernel_size=stem.shape[1],
        stem_stride=packed.stem_stride,
        stem_pools=int(packed.stem_pools),
        units=units,
        stem=_floats(np.concatenate((taps, _padded(packed.stem_offset), threshold))),
        head=_floats(np.concatenate((head, _padded(packed.head_offset, HEAD_LANES)))),
    )


def byte_table(packed: Packed) -> Array | None:
    """(C, 256) float32: each byte as the transform normalises it, as torchvision rounds it."""
    if packed.transform is None or packed.transform.get("mean") is None:
        return None
    pixels = np.arange(256, dtype=np.float32) / np.float32(255)
    rows = [
        (pixels - np.float32(mean)) / np.float32(std)
        for mean, std in zip(packed.transform["mean"], packed.transform["std"], strict=True)
    ]
    return np.ascontiguousarray(np.stack(rows))


def _unit(unit: Unit, next_shift: Array | None) -> OrderedUnit:
    """A unit; next_shift is what the next one adds before its sign."""
    words = bit_words(without_spare_bits(unit.weight, unit.channels))
    count = unit.out_channels
    vectors = (
        _padded(unit.scale),
        _padded(unit.constant),
        _padded(np.ones(count, np.float32) if unit.slope is None else unit.slope),
        _padded(np.zeros(count, np.float32) if unit.shift_out is None else unit.shift_out),
        _threshold(next_shift, count),
    )
    projection = None
    if unit.projection is not None and unit.offset is not None:
        blocks = _blocks(unit.projection, LANES).ravel()
        projection = _floats(np.concatenate((blocks, _padded(unit.offset))))
    return OrderedUnit(
        channels=unit.channels,
        out_channels=count,
        kernel_size=unit.kernel_size,
        stride=unit.stride,
        shortcut=SHORTCUTS.index(unit.shortcut),
        weight=_blocks(words.reshape(len(words), -1), LANES),
        whole=_floats(_whole_sums(words, unit.channels)),
        vectors=_floats(np.stack(vectors)),
        projection=projection,
    )


def _floats(array: Array) -> Array:
    return np.ascontiguousarray(array, np.float32)


def _padded(vector: Array, lanes: int = LANES, value: float = 0) -> Array:
    return np.pad(vector, (0, -len(vector) % lanes), constant_values=value)


def _threshold(shift: Array | None, channels: int) -> Array:
    """x + shift >= 0 is x >= -shift. 1 where there is no channel: no bit is set there."""
    shift = np.zeros(channels, np.float32) if shift is None else shift
    return _padded(0 - shift, value=1)


def _blocks(rows: Array, lanes: int) -> Array:
    """(O, K) as (blocks, K, lanes), with rows of 0 up to a whole block."""
    padded = np.pad(rows, ((0, -len(rows) % lanes), (0, 0)))
    return np.ascontiguousarray(padded.reshape(-1, lanes, rows.shape[1]).swapaxes(1, 2))


def _whole_sums(words: Array, channels: int) -> Array:
    """An output's sum if no bit differed, by which rows and columns of the kernel are cut off.

    A tap inside the image adds its channels. One outside meets zeros, which differ from every 1 of
    the weight: twice these ones make up for it.

    Args:
        words: (O, k, k, words) uint32.
        channels: C.

    Returns:
        (4, 4, O padded) for k = 3, where bit 0 cuts the first row and bit 1 the last; for
        k = 1 (O padded,).
    """
    ones = np.unpackbits(words.view(np.uint8), axis=-1).sum(-1, dtype=np.int32)  # (O, k, k)
    size = words.shape[1]
    if size == 1:
        return _padded(np.full(len(words), channels, np.int32))
    table = np.empty((4, 4, len(words)), np.int32)
    for rows in range(4):
        for columns in range(4):
            inside = np.ones((size, size), bool)
            inside[0] &= not rows & 1
            inside[-1] &= not rows & 2
            inside[:, 0] &= not columns & 1
            inside[:, -1] &= not columns & 2
            table[rows, columns] = np.where(inside, channels, 2 * ones).sum((1, 2))
    return np.ascontiguousarray(np.pad(table, ((0, 0), (0, 0), (0, -len(words) % LANES))))
