"""A reader of pickles that hold plain data: dicts, lists, text, numbers and arrays of bytes.

Reading a pickle calls whatever functions it names. This reader knows the few names that such data
need. Each stands for something of its own that only notes what it is given, so that not even
numpy's code meets what a file says. Any other name ends the reading.
"""

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class ByteArray:
    """An array as a pickle describes it.

    Attributes:
        noted: what the functions that would make it were given.
    """

    noted: list[Any] = field(default_factory=list)

    def __setstate__(self, state: object) -> None:
        self.noted = list(state) if isinstance(state, tuple) else []

    def array(self) -> np.ndarray:
        """The array, uint8, not to be written to.

        Raises:
            ValueError: it is none of bytes, or its shape does not fit them.
        """
        match self.noted:
            case [int(), tuple() as shape, _Type(name=name), fortran, bytes() as content]:
                sizes = all(type(size) is int and size >= 0 for size in shape)
                if name in ("u1", b"u1") and sizes and math.prod(shape) == len(content):
                    if fortran:
                        return np.frombuffer(content, np.uint8).reshape(shape, order="F")
                    return np.frombuffer(content, np.uint8).reshape(shape)
        raise ValueError("what should be an array of bytes is none")


class _Type:
    """An array's type, of which the name alone is of interest."""

    def __init__(self, name: object, *rest: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass


def _from_buffer(content: object, kind: object, shape: object, order: object) -> ByteArray:
    content = bytes(content) if isinstance(content, bytearray) else content
    return ByteArray([1, shape, kind, order == "F", content])


def _empty(*noted: object) -> ByteArray:
    return ByteArray()


def _encode(text: str, codec: str) -> bytes:
    if codec != "latin1":
        raise pickle.UnpicklingError(f"bytes in {codec!r:.20}")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): _empty,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,  # of bytes in a file that Python 3 wrote for Python 2
}
for _core in ("numpy.core", "numpy._core"):  # the newer name is of numpy 2
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = _empty
    _NAMES[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def read_plain(content: bytes) -> Any:
    """What a pickle holds. Text of Python 2 is bytes, and an array is a :class:`ByteArray`.

    Raises:
        pickle.UnpicklingError: it is damaged, or holds more than plain data.
    """
    try:
        return _Reader(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError:
        raise
    # the unpickler raises almost anything on damaged bytes
    except Exception as error:
        raise pickle.UnpicklingError(f"{type(error).__name__} while reading it") from error
