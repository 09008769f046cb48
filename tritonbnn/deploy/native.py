"""The engine in C: a packed network in the memory order that it reads, and calls of it."""

import ctypes
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from tritonbnn.compiled import loader
from tritonbnn.deploy.packed import SHORTCUTS, Array, Packed, Unit, bit_words, without_spare_bits

SOURCES = Path(__file__).with_name("csrc")
LANES, HEAD_LANES = 16, 64
"""As in ``csrc/lanes.h``."""
_BAD_NETWORK, _BAD_SIZE, _SMALL_WORKSPACE, _NOT_FINITE = 1, 2, 3, 4
_LINE = 64  # bytes of a cache line


class _Floats(ctypes.Structure):
    _fields_ = (("numbers", ctypes.c_void_p), ("count", ctypes.c_int64))


class _Unit(ctypes.Structure):
    """``Unit`` in ``csrc/engine.h``, as are the others."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("channels", "out_channels", "kernel_size")),
        *((name, ctypes.c_int64) for name in ("stride", "shortcut")),
        ("weight", ctypes.c_void_p),
        ("weight_count", ctypes.c_int64),
        ("whole", _Floats),
        ("vectors", _Floats),
        ("projection", _Floats),
    )


class _Network(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("in_channels", "classes", "stem_channels")),
        *((name, ctypes.c_int64) for name in ("stem_kernel_size", "stem_stride", "stem_pools")),
        ("unit_count", ctypes.c_int64),
        ("units", ctypes.POINTER(_Unit)),
        ("stem", _Floats),
        ("head", _Floats),
    )


class _Team(ctypes.Structure):
    _fields_ = tuple((n, ctypes.c_void_p) for n in ("parallel", "barrier", "member", "members"))


class _Call(ctypes.Structure):
    _fields_ = (
        ("images", ctypes.c_void_p),
        ("number_count", ctypes.c_int64),
        ("bytes_a_number", ctypes.c_int64),
        ("table", _Floats),
        *((name, ctypes.c_int64) for name in ("image_count", "height", "width")),
        ("logits", ctypes.c_void_p),
        ("logit_count", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("team", _Team),
    )


class NotFiniteError(ValueError):
    """A number of an image is infinite or none."""


class NativeNetwork:
    """A network that the C engine runs. Several threads of a program may call it at once.

    Args:
        packed: checked.

    Raises:
        RuntimeError: there is no C library; the message is one line.
    """

    def __init__(self, packed: Packed) -> None:
        if sys.byteorder != "little":
            raise RuntimeError("the C engine needs a little-endian machine")
        self._library = loader.load_best(loader.Library, SOURCES)
        self.name = f"C, {self._library.isa}"
        self._arrays: list[Array] = []  # keeps alive what C points to
        self._units = (_Unit * len(packed.units))()
        shifts = [unit.shift_in for unit in packed.units[1:]]
        for place, unit, shift in zip(self._units, packed.units, [*shifts, None], strict=True):
            self._fill(place, unit, shift)
        self._network = self._whole(packed)
        self._classes = len(packed.head_weight)
        self._run = self._library.function("engine_run")
        self._workspace_bytes = self._library.function("engine_workspace")
        for function in (self._run, self._workspace_bytes):
            function.argtypes = [ctypes.POINTER(_Network), ctypes.POINTER(_Call)]
            function.restype = ctypes.c_int64
        self._spare: list[Array] = []
        self._lock = threading.Lock()

    @property
    def weight_bytes(self) -> int:
        """Of the network's arrays, as C reads them."""
        return sum(array.nbytes for array in self._arrays)

    @property
    def scratch_bytes(self) -> int:
        """Of the memory that is kept from call to call."""
        with self._lock:
            return sum(array.nbytes for array in self._spare)

    def logits(self, images: Array, table: Array | None, threads: int) -> Array:
        """Logits (N, classes) float32.

        Args:
            images: (N, C, H, W) float32, or uint8 with a table; contiguous.
            table: (C, 256) float32, what each byte of a channel means.
            threads: of a call.

        Raises:
            NotFiniteError: an image holds infinity or a NaN.
            ValueError: the sizes are beyond what the engine takes.
            MemoryError: there is not enough.
        """
        team = _team() if threads > 1 and not loader.forked() else None
        logits = np.empty((len(images), self._classes), np.float32)
        call = _Call(
            images=images.ctypes.data,
            number_count=images.size,
            bytes_a_number=images.itemsize,
            table=_Floats() if table is None else _Floats(table.ctypes.data, table.size),
            image_count=images.shape[0],
            height=images.shape[2],
            width=images.shape[3],
            logits=logits.ctypes.data,
            logit_count=logits.size,
            threads=1 if team is None else threads,
            team=_Team() if team is None else team,
        )
        needed = self._workspace_bytes(self._network, call)
        if needed < 0:
            self._raise(-needed)
        workspace = self._take(needed)
        start = -workspace.ctypes.data % _LINE
        call.workspace = workspace.ctypes.data + start
        call.workspace_bytes = workspace.nbytes - start
        code = self._run(self._network, call)
        with self._lock:
            self._spare.append(workspace)
        if code:
            self._raise(code)
        return logits

    def _raise(self, code: int) -> None:
        if code == _NOT_FINITE:
            raise NotFiniteError("an image holds numbers that are not finite")
        if code == _BAD_SIZE:
            raise ValueError("images of this size do not go through this network")
        raise RuntimeError(f"the engine refuses its own network: code {code}")

    def _take(self, needed: int) -> Array:
        """Workspace of an earlier call that is free and large enough, or new."""
        with self._lock:
            while self._spare:
                found = self._spare.pop()  # one too small is dropped
                if found.nbytes >= needed + _LINE:
                    return found
        return np.empty(needed + _LINE, np.uint8)

    def _keep(self, array: Array) -> Array:
        self._arrays.append(array)
        return array

    def _floats(self, array: Array) -> _Floats:
        kept = self._keep(np.ascontiguousarray(array, np.float32))
        return _Floats(kept.ctypes.data, kept.size)

    def _fill(self, place: _Unit, unit: Unit, next_shift: Array | None) -> None:
        """A unit as C reads it; next_shift is what the next one adds before its sign."""
        for name in ("channels", "out_channels", "kernel_size", "stride"):
            setattr(place, name, getattr(unit, name))
        place.shortcut = SHORTCUTS.index(unit.shortcut)
        words = bit_words(without_spare_bits(unit.weight, unit.channels))
        place.whole = self._floats(_whole_sums(words, unit.channels))
        rows = _blocks(words.reshape(len(words), -1), LANES)
        weight = self._keep(rows)
        place.weight, place.weight_count = weight.ctypes.data, weight.size
        count = unit.out_channels
        vectors = (
            _padded(unit.scale),
            _padded(unit.constant),
            _padded(np.ones(count, np.float32) if unit.slope is None else unit.slope),
            _padded(np.zeros(count, np.float32) if unit.shift_out is None else unit.shift_out),
            _threshold(next_shift, count),
        )
        place.vectors = self._floats(np.stack(vectors))
        if unit.projection is not None and unit.offset is not None:
            blocks = _blocks(unit.projection, LANES).ravel()
            place.projection = self._floats(np.concatenate((blocks, _padded(unit.offset))))

    def _whole(self, packed: Packed) -> _Network:
        stem = packed.stem_weight.astype(np.float32).transpose(0, 2, 3, 1)
        first = packed.units[0]
        threshold = _threshold(first.shift_in, first.channels)
        taps = _blocks(stem.reshape(len(stem), -1), LANES).ravel()
        ends = np.concatenate((taps, _padded(packed.stem_offset), threshold))
        head = _blocks(packed.head_weight.astype(np.float32), HEAD_LANES).ravel()
        return _Network(
            in_channels=packed.in_channels,
            classes=len(packed.head_weight),
            stem_channels=len(stem),
            stem_kernel_size=stem.shape[1],
            stem_stride=packed.stem_stride,
            stem_pools=packed.stem_pools,
            unit_count=len(self._units),
            units=self._units,
            stem=self._floats(ends),
            head=self._floats(np.concatenate((head, _padded(packed.head_offset, HEAD_LANES)))),
        )


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


def _team() -> _Team | None:
    """The functions of the OpenMP library whose threads serve; None where there is none.

    It is torch's own where torch is loaded: two pools would take each other's processors.
    """
    global _openmp
    if _openmp is None:
        _openmp = _find_openmp()
    if not _openmp:
        return None
    names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
    try:
        places = [ctypes.cast(getattr(_openmp[0], name), ctypes.c_void_p).value for name in names]
    except AttributeError:  # another kind of OpenMP
        return None
    return _Team(*places)


_openmp: list[Any] | None = None  # empty: there is none


def _find_openmp() -> list[Any]:
    if "torch" in sys.modules:
        return [ctypes.CDLL(None)]  # torch has made its OpenMP known to all
    for name in ("libgomp.so.1", "libomp.so.5", "libomp.so"):
        try:
            return [ctypes.CDLL(name)]
        except OSError:
            continue
    return []


def default_threads() -> int:
    """As many as torch uses where it is loaded, else as OMP_NUM_THREADS says, or processors."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    chosen = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if chosen.isdecimal() and int(chosen) > 0:
        return min(int(chosen), 1024)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
