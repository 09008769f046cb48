"""The C functions: which library of them this machine runs, and calls into it."""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonbnn.cli import SettingError
from tritonbnn.native import build

VARIABLE = "TRITONBNN_ISA"

_lock = threading.Lock()
_library: "Library | None" = None
_reason = ""  # why there is none, once that is known
_forked = False


class Library:
    """A loaded library, checked to be of this package's version before any of its code runs.

    Args:
        path: the shared library.
        isa: the instruction set that it must be compiled for.

    Raises:
        OSError: it does not load, or is of another version or instruction set.
    """

    def __init__(self, path: Path, isa: str) -> None:
        global _forked
        _forked = _forked or _is_forked()  # in the child of a process that had not imported this
        self._handle = ctypes.CDLL(str(path))
        self.isa = isa
        self._functions: dict[str, tuple[Any, list[int]]] = {}
        try:
            abi = ctypes.c_int64.in_dll(self._handle, "tritonbnn_abi").value
            name = (ctypes.c_char * (len(isa) + 1)).in_dll(self._handle, "tritonbnn_isa").value
        except ValueError as error:  # no such symbol
            raise OSError(f"{path} is not a library of tritonbnn: {error}") from None
        if (abi, name.decode(errors="replace")) != (build.ABI, isa):
            raise OSError(f"{path} is of another version of tritonbnn")

    def call(self, name: str, *arguments: Any) -> None:
        """:func:`call` of this library."""
        function, pointers = self._functions.get(name) or self._declare(name, arguments)
        values = [*arguments, 1 if _forked else torch.get_num_threads()]
        for index in pointers:
            tensor = values[index]
            if tensor is not None:
                if not tensor.is_cpu:
                    raise ValueError(f"{name}: a tensor is on {tensor.device}, others on the CPU")
                values[index] = pointer(tensor)
        function(*values)

    def best_isa(self) -> str:
        """The most of ``build.ISAS`` that this CPU and its operating system run."""
        function = self._handle.tritonbnn_best_isa
        function.restype = ctypes.c_int64
        return list(build.ISAS)[function()]

    def _declare(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, list[int]]:
        """The function, its arguments' types fixed by the kinds of the first call's."""
        function = getattr(self._handle, f"tritonbnn_{name}")
        kinds = [_kind(argument) for argument in arguments]
        function.argtypes = [*kinds, ctypes.c_int64]
        function.restype = None
        pointers = [index for index, kind in enumerate(kinds) if kind is ctypes.c_void_p]
        self._functions[name] = function, pointers
        return self._functions[name]


def pointer(tensor: Tensor) -> int:
    """Where a tensor's data are.

    Raises:
        ValueError: it has none.
    """
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
    before, _library = _library, _load(checked_isa(isa, _probe().best_isa()))
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
            best = _probe().best_isa()
            _library = _load(checked_isa(os.environ.get(VARIABLE) or best, best))
        except RuntimeError as error:
            _reason = str(error)


def _probe() -> Library:
    return _load(build.PROBE)


def checked_isa(isa: str, best: str) -> str:
    """``isa``, if it is one that this machine runs: best is the most that it does."""
    known = list(build.ISAS)
    if isa not in known:
        raise SettingError(f"{VARIABLE} must be one of {', '.join(known)}, not {isa!r}")
    if known.index(isa) > known.index(best):
        raise SettingError(f"{VARIABLE}={isa}, but this CPU runs {best} at most: unset it")
    return isa


def _load(isa: str) -> Library:
    """The library that came with the package; else a compiler's, or what one has left.

    Raises:
        RuntimeError: none loads; the message is one line.
    """
    troubles = []
    for find in _finders(isa):
        try:
            path = find()
            if path is not None:
                return Library(path, isa)
        except (OSError, build.BuildError) as error:
            troubles.append(str(error))
    found = "; ".join(dict.fromkeys(troubles)) or "there is no C compiler"
    raise RuntimeError(f"{found} (install gcc, or name a C compiler by CC)")


def _finders(isa: str) -> Iterator[Callable[[], Path | None]]:
    """Ways to a library, each asked only if those before it have failed."""
    yield partial(build.packaged, isa)
    for compiler in build.compilers():
        yield partial(build.library, isa, compiler)
    for path in build.left_over(isa):
        yield partial(Path, path)


def _is_forked() -> bool:
    """Whether this process is a fork's child, in which a pool of threads does not live on.

    Linux marks a process that was forked and has started no other program.
    """
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2]
    except OSError:  # not Linux
        return False
    forked_without_exec = 0x40
    return bool(int(after_name.split()[6]) & forked_without_exec)


def _in_child() -> None:
    global _forked, _lock
    _forked = True
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_in_child)
