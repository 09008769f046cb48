"""Calls of the engine in C."""

import ctypes
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from tritonbnn.compiled import loader
from tritonbnn.deploy.order import NETWORK_NUMBERS, UNIT_NUMBERS, OrderedUnit, in_order
from tritonbnn.deploy.packed import Array, Packed

SOURCES = Path(__file__).with_name("csrc")
_BAD_NETWORK, _BAD_SIZE, _SMALL_WORKSPACE, _NOT_FINITE = 1, 2, 3, 4
_LINE = 64  # bytes of a cache line
MOST_KEPT = 1 << 30
"""Bytes of scratch that a call may leave for the next: a huge image's would stay for good."""


class _Floats(ctypes.Structure):
    _fields_ = (("numbers", ctypes.c_void_p), ("count", ctypes.c_int64))


class _Unit(ctypes.Structure):
    """``Unit`` in ``csrc/engine.h``, as are the others."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in UNIT_NUMBERS),
        ("weight", ctypes.c_void_p),
        ("weight_count", ctypes.c_int64),
        ("whole", _Floats),
        ("vectors", _Floats),
        ("projection", _Floats),
    )


class _Network(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in NETWORK_NUMBERS),
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
        isa: of ``build.ISAS``; None for the one that the user names, or the best that runs here.

    Raises:
        RuntimeError: there is no C library; the message is one line.
    """

    def __init__(self, packed: Packed, isa: str | None = None) -> None:
        if sys.byteorder != "little":
            raise RuntimeError("the C engine needs a little-endian machine")
        if isa is None:
            self._library = loader.load_best(loader.Library, SOURCES)
        else:
            self._library = loader.load(isa, loader.Library, SOURCES)
        self.name = f"C, {self._library.isa}"
        self._ordered = in_order(packed)  # kept: C points to its arrays
        self._units = (_Unit * len(packed.units))(*map(_unit, self._ordered.units))
        self._network = _Network(
            *(getattr(self._ordered, name) for name in NETWORK_NUMBERS),
            unit_count=len(self._units),
            units=self._units,
            stem=_floats(self._ordered.stem),
            head=_floats(self._ordered.head),
        )
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
        return sum(array.nbytes for array in self._ordered.arrays())

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
            table=_floats(table),
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
        if workspace.nbytes <= MOST_KEPT:
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


def _unit(unit: OrderedUnit) -> _Unit:
    return _Unit(
        *(getattr(unit, name) for name in UNIT_NUMBERS),
        weight=unit.weight.ctypes.data,
        weight_count=unit.weight.size,
        whole=_floats(unit.whole),
        vectors=_floats(unit.vectors),
        projection=_floats(unit.projection),
    )


def _floats(array: Array | None) -> _Floats:
    return _Floats() if array is None else _Floats(array.ctypes.data, array.size)


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
