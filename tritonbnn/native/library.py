"""The C functions: which library of them this machine runs, and calls into it."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonbnn.compiled import loader
from tritonbnn.compiled.loader import VARIABLE, checked_isa

__all__ = ["VARIABLE", "Library", "available", "call", "checked_isa", "isa", "reason", "using"]

_lock = threading.Lock()
_library: "Library | None" = None
_reason = ""  # why there is none, once that is known


class Library(loader.Library):
    """A library of the launchers' C functions; see :class:`~tritonbnn.compiled.loader.Library`."""

    def __init__(self, path: Path, isa: str) -> None:
        super().__init__(path, isa)
        self._functions: dict[str, tuple[Any, list[int]]] = {}

    def call(self, name: str, *arguments: Any) -> None:
        """:func:`call` of this library."""
        function, pointers = self._functions.get(name) or self._declare(name, arguments)
        values = [*arguments, 1 if loader.forked() else torch.get_num_threads()]
        for index in pointers:
            tensor = values[index]
            if tensor is not None:
                if not tensor.is_cpu:
                    raise ValueError(f"{name}: a tensor is on {tensor.device}, others on the CPU")
                values[index] = pointer(tensor)
        function(*values)

    def _declare(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, list[int]]:
        """The function, its arguments' types fixed by the kinds of the first call's."""
        function = self.function(name)
        kinds = [_kind(argument) for argument in arguments]
        function.argtypes = [*kinds, ctypes.c_int64]
        function.restype = None
        pointers = [index for index, kind in enumerate(kinds) if kind is ctypes.c_void_p]
        self._functions[name] = function, pointers
        return self._functions[name]


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's data are; None for none.

    Raises:
        ValueError: it has no data.
    """
    if tensor is None:
        return None
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise ValueError(f"a {type(tensor).__name__} holds no data that the C functions could read")
    return address


def _kind(argument: Any) -> Any:
    """The C type as which an argument is passed."""
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p
    if isinstance(argument, ctypes.Structure):
        return ctypes.POINTER(type(argument))
    return ctypes.c_double if isinstance(argument, float) else ctypes.c_int64


def available() -> bool:
    """Whether the C functions can be called; the first question compiles and loads them.

    Raises:
        SettingError: ``TRITONBNN_ISA`` names what there is not.
    """
    if _library is None and not _reason:
        _settle()
    return _library is not None


def reason() -> str:
    """Why they cannot, in one line; empty if they can."""
    return "" if available() else _reason


def isa() -> str:
    """The instruction set in use."""
    return _current().isa


def call(name: str, *arguments: Any) -> None:
    """Call ``tritonbnn_<name>`` on as many threads as torch uses.

    An argument is a Tensor or None (a pointer to its data, NULL), a ``ctypes.Structure`` (a
    pointer to it), an int (int64_t) or a float (double). What it is must not change between
    calls. The number of threads follows as the last argument, an int64_t.

    Raises:
        RuntimeError: the C functions are not available.
    """
    (_library or _current()).call(name, *arguments)


@contextmanager
def using(isa: str) -> Iterator[None]:
    """Call the library for ``isa`` meanwhile, as a test or a benchmark of one may wish.

    Raises:
        SettingError: there is no such instruction set here.
        RuntimeError: no library for it can be had.
    """
    global _library
    available()
    before, _library = _library, loader.load(checked_isa(isa, loader.best_isa()), Library)
    try:
        yield
    finally:
        _library = before


def _current() -> Library:
    if not available() or _library is None:
        raise RuntimeError(f"the native launchers do not run here: {_reason}")
    return _library


def _settle() -> None:
    """Load the library for this machine, or note why there is none; once in a process."""
    global _library, _reason
    with _lock:
        if _library is not None or _reason:  # another thread was faster
            return
        try:
            _library = loader.load_best(Library)
        except RuntimeError as error:
            _reason = str(error)


def _in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_in_child)
