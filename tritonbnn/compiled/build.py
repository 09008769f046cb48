"""Compile the C sources for one instruction set, into a cache that processes share.

This file needs the standard library alone: the package's own build loads it before there is torch.
"""

import errno
import hashlib
import json
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

ABI = 2
"""Raised when a C function's arguments change their meaning."""

SOURCES = Path(__file__).parents[1] / "native" / "csrc"
"""The C functions of the launchers, and ``cpu.c``."""
PROBE = "probe"
"""Not an instruction set: the library of ``cpu.c`` alone, which tells what the machine runs."""

_X86 = platform.machine() in ("x86_64", "AMD64")
_AVX2 = ("-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vpopcntdq")
ISAS: dict[str, tuple[str, ...]] = {"generic": ("-march=x86-64",) if _X86 else ()}
"""The instruction sets of this architecture in rising order, and the flags of each."""
if _X86:
    # -march first: else a compiler whose default is a newer machine would use that one's
    ISAS["avx2"] = ("-march=x86-64", *_AVX2)
    ISAS["avx512"] = ("-march=x86-64", *_AVX2, *_AVX512, "-mprefer-vector-width=512")

# never -ffast-math: NaN and infinity go where torch has them
_FLAGS = (
    *("-std=gnu11", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"),
)
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
_LIBRARY = "native.so"
_RECORD = "native.json"
_PATIENCE = 600  # seconds for one source: beyond it a compiler hangs


class BuildError(Exception):
    """No library can be had. The message is one line."""


def compilers() -> list[list[str]]:
    """The commands to try, best first: of the environment variable ``CC``, then the system's."""
    commands = [_words(os.environ.get("CC", ""))]
    commands += [[name] for name in ("cc", "gcc", "clang") if shutil.which(name)]
    different: dict[tuple[str, ...], list[str]] = {}
    for command in filter(None, commands):  # cc is usually a link to one of the others
        different.setdefault((str(_program(command)), *command[1:]), command)
    return list(different.values())


def library(isa: str, compiler: list[str], sources: Path = SOURCES) -> Path:
    """The library for ``isa`` from the cache, compiled if it is not there whole.

    Args:
        isa: a key of ``ISAS``, or ``PROBE``.
        compiler: a command.
        sources: the folder of the C files.

    Raises:
        BuildError: it does not compile, or there is no folder to put it.
    """
    if fcntl is None:
        raise BuildError("the C sources are compiled on POSIX systems only")
    name = f"{isa}-{_key(isa, sources)}-{_identity(compiler)}"
    troubles = []
    for folder in (cache_folder, temporary_folder):
        try:
            return _have(folder(), name, isa, compiler, sources)
        except OSError as error:
            troubles.append(f"{error.filename}: {error.strerror}")
    raise BuildError(
        f"no folder for the compiled library ({'; '.join(troubles)}):"
        " set TRITONBNN_CACHE to one that you may write to"
    )


def left_over(isa: str, sources: Path = SOURCES) -> list[Path]:
    """The libraries for ``isa`` in the cache, of whatever compiler: it may be gone by now."""
    key = _key(isa, sources)
    try:
        folders = sorted(cache_folder().glob(f"{isa}-{key}-*"))
    except OSError:  # no cache, no library
        return []
    return [folder / _LIBRARY for folder in folders if _is_whole(folder, key)]


def packaged_folder(sources: Path) -> Path:
    """Where a wheel has the libraries of these sources: beside them."""
    return sources.with_name("lib")


def packaged(isa: str, sources: Path = SOURCES) -> Path | None:
    """The library for ``isa`` that came with the package, if it is of these sources."""
    folder = packaged_folder(sources) / isa
    return folder / _LIBRARY if _is_whole(folder, _key(isa, sources)) else None


def compile_into(folder: Path, isa: str, compiler: list[str], sources: Path = SOURCES) -> None:
    """Compile the library for ``isa`` into a new folder, with the record that tells it is whole.

    Raises:
        BuildError: the compiler fails.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True)
    files = [sources / "cpu.c"] if isa == PROBE else sorted(sources.glob("*.c"))
    flags = _flags(isa)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = [Path(scratch) / f"{file.stem}.o" for file in files]
        commands = [
            [*compiler, *flags, "-c", str(file), "-o", str(made)]
            for file, made in zip(files, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        # Without -fopenmp, so that no OpenMP is linked: torch has loaded one, whose threads serve.
        sanitize = _SANITIZE if _sanitized() else ()
        made = folder / _LIBRARY
        _run([*compiler, *sanitize, "-shared", *map(str, objects), "-o", str(made), "-lm"])
    try:
        record = {"key": _key(isa, sources), **_digest(made)}
    except FileNotFoundError:
        raise BuildError(f"{compiler[0]} ends well but writes nothing") from None
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _have(folder: Path, name: str, isa: str, compiler: list[str], sources: Path) -> Path:
    """The library in the cache ``folder``; whoever comes first compiles, the others wait."""
    target, key = folder / name, _key(isa, sources)
    if not _is_whole(target, key):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(folder):
            if not _is_whole(target, key):
                _replace(target, isa, compiler, sources)
    return target / _LIBRARY


def _replace(target: Path, isa: str, compiler: list[str], sources: Path) -> None:
    """Compile beside ``target``, then put it there at once."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as beside:
        made = Path(beside) / target.name
        compile_into(made, isa, compiler, sources)
        if target.is_dir():
            shutil.rmtree(target)
        made.rename(target)


def _is_whole(folder: Path, key: str) -> bool:
    """Whether a library is as it was compiled: a truncated one would end the process."""
    try:
        record = json.loads((folder / _RECORD).read_text())
        return record == {"key": key, **_digest(folder / _LIBRARY)}
    except (OSError, ValueError):  # absent, or no JSON
        return False


def _digest(path: Path) -> dict[str, str | int]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _key(isa: str, sources: Path) -> str:
    """A name for all that makes a library what it is, but for the compiler."""
    files = [(path.name, path.read_bytes()) for path in sorted(sources.glob("*.[ch]"))]
    return _name(ABI, isa, _flags(isa), files)


def _name(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # a quotation without an end: no such program, as its use will say
        return [command]


def _program(command: list[str]) -> Path:
    return Path(shutil.which(command[0]) or command[0]).resolve()


def _identity(compiler: list[str]) -> str:
    """A name for a compiler, which is another's once it is mended or renewed."""
    version = _run([*compiler, "--version"])  # first, as it tells what does not run
    program = _program(compiler)
    status = program.stat()
    return _name(program, compiler[1:], status.st_size, status.st_mtime_ns, version)


def _flags(isa: str) -> tuple[str, ...]:
    defines = (f"-DTRITONBNN_ABI={ABI}", f'-DTRITONBNN_ISA="{isa}"')
    of_isa = ISAS["generic" if isa == PROBE else isa]
    optimise = ("-O1", "-g", "-fno-omit-frame-pointer", *_SANITIZE) if _sanitized() else ("-O3",)
    return (*optimise, *_FLAGS, *of_isa, *defines)


def _sanitized() -> bool:
    """Whether to compile for tests with the sanitizers of addresses and undefined behaviour."""
    return os.environ.get("TRITONBNN_SANITIZE") == "1"


def _run(command: list[str]) -> str:
    """The output of a compiler.

    Raises:
        BuildError: with the line that tells what is wrong.
        OSError: a disk that it writes to is full; another folder may do.
    """
    environ = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=environ,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} did not end in {_PATIENCE} s") from None
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error.strerror}") from None
    if done.returncode == 0:
        return done.stdout
    full = os.strerror(errno.ENOSPC)
    if full in done.stderr:
        raise OSError(errno.ENOSPC, full, command[0])
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    telling = next((line for line in lines if "error" in line), lines[0])
    raise BuildError(f"{command[0]} fails: {telling.strip()}")


def cache_folder() -> Path:
    """The user's cache, which need not exist.

    Raises:
        OSError: the user has no home.
    """
    chosen = os.environ.get("TRITONBNN_CACHE")
    if chosen:
        return Path(chosen).absolute()
    common = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if common.is_absolute():  # the standard says that another does not count
        return common / "tritonbnn"
    try:
        return Path.home() / ".cache" / "tritonbnn"
    except RuntimeError:  # a user whom the system does not know
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", "~") from None


def temporary_folder() -> Path:
    """A folder that no other user can have put a library into.

    Raises:
        OSError: there is none.
    """
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"tritonbnn-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == user
    if not ours or status.st_mode & 0o077:
        raise PermissionError(errno.EPERM, "other users may write to it", str(folder))
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a cache folder. A record lock: it ends with this process, and no child inherits it."""
    with (folder / ".lock").open("a+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
