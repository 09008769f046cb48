"""Which library of C functions this machine runs, found or compiled, and loaded."""

import ctypes
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tritonbnn.cli import SettingError
from tritonbnn.compiled import build

VARIABLE = "TRITONBNN_ISA"

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
        try:
            abi = ctypes.c_int64.in_dll(self._handle, "tritonbnn_abi").value
            name = (ctypes.c_char * (len(isa) + 1)).in_dll(self._handle, "tritonbnn_isa").value
        except ValueError as error:  # no such symbol
            raise OSError(f"{path} is not a library of tritonbnn: {error}") from None
        if (abi, name.decode(errors="replace")) != (build.ABI, isa):
            raise OSError(f"{path} is of another version of tritonbnn")

    def function(self, name: str) -> Any:
        """The C function ``tritonbnn_<name>``."""
        return getattr(self._handle, f"tritonbnn_{name}")


Loaded = TypeVar("Loaded", bound=Library)


def load_best(kind: Callable[[Path, str], Loaded], sources: Path = build.SOURCES) -> Loaded:
    """The library for the instruction set that the user names, or for the best that runs here.

    Args:
        kind: makes it from its path and instruction set: :class:`Library`, or a class of it.
        sources: the folder of the C files.

    Raises:
        SettingError: ``TRITONBNN_ISA`` names what there is not.
        RuntimeError: none loads; the message is one line.
    """
    best = best_isa()
    return load(checked_isa(os.environ.get(VARIABLE) or best, best), kind, sources)


def load(isa: str, kind: Callable[[Path, str], Loaded], sources: Path = build.SOURCES) -> Loaded:
    """The library that came with the package; else a compiler's, or what one has left.

    Raises:
        RuntimeError: none loads; the message is one line.
    """
    troubles = []
    for find in _finders(isa, sources):
        try:
            path = find()
            if path is not None:
                return kind(path, isa)
        except (OSError, build.BuildError) as error:
            troubles.append(str(error))
    found = "; ".join(dict.fromkeys(troubles)) or "there is no C compiler"
    raise RuntimeError(f"{found} (install gcc, or name a C compiler by CC)")


def best_isa() -> str:
    """The most of ``build.ISAS`` that this CPU and its operating system run.

    Raises:
        RuntimeError: the library that asks the CPU does not load.
    """
    function = load(build.PROBE, Library).function("best_isa")
    function.restype = ctypes.c_int64
    return list(build.ISAS)[function()]


def checked_isa(isa: str, best: str) -> str:
    """``isa``, if it is one that this machine runs: best is the most that it does.

    Raises:
        SettingError: there is no such instruction set, or not here.
    """
    known = list(build.ISAS)
    if isa not in known:
        raise SettingError(f"{VARIABLE} must be one of {', '.join(known)}, not {isa!r}")
    if known.index(isa) > known.index(best):
        raise SettingError(f"{VARIABLE}={isa}, but this CPU runs {best} at most: unset it")
    return isa


def forked() -> bool:
    """Whether this process is a fork's child, in which a pool of threads does not live on."""
    return _forked


def _finders(isa: str, sources: Path) -> Iterator[Callable[[], Path | None]]:
    """Ways to a library, each asked only if those before it have failed."""
    yield partial(build.packaged, isa, sources)
    for compiler in build.compilers():
        yield partial(build.library, isa, compiler, sources)
    for path in build.left_over(isa, sources):
        yield partial(Path, path)


def _is_forked() -> bool:
    """Linux marks a process that was forked and has started no other program."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2]
    except OSError:  # not Linux
        return False
    forked_without_exec = 0x40
    return bool(int(after_name.split()[6]) & forked_without_exec)


def _in_child() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_in_child)
