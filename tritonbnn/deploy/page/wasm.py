"""The C program of a network, compiled to WebAssembly by LLVM."""

import errno
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tritonbnn.cli import UserError
from tritonbnn.deploy import program
from tritonbnn.deploy.packed import Packed
from tritonbnn.files import cannot_write

_COMPILE = ("--target=wasm32", "-std=c99", "-O3", "-msimd128", "-mbulk-memory", "-ffreestanding")
# the stack comes first: where it ends too early, the engine stops and overwrites nothing
_LINK = ("--no-entry", "--stack-first", "-z", "stack-size=262144", "--strip-all")
_EXPORTS = ("net_workspace_bytes", "net_run_bytes", "__heap_base")
_VERSIONS = range(40, 10, -1)  # Debian's programs have theirs behind the name
_PATIENCE = 600  # seconds: beyond it a compiler hangs
_INSTALL = "a page needs clang and wasm-ld: install LLVM's clang and lld"


def library(packed: Packed) -> bytes:
    """A module with the functions of ``net.h``. It imports nothing.

    Args:
        packed: checked, with a mean and a std.

    Raises:
        UserError: there is no compiler for WebAssembly, or it fails; or there is no space for what
            it writes.
    """
    clang, linker = _find("clang"), _find("wasm-ld")
    try:
        return _compiled(packed, clang, linker)
    except OSError as error:
        raise cannot_write(Path(error.filename or tempfile.gettempdir()), error) from error


def _compiled(packed: Packed, clang: str, linker: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in zip(("net.c", "net.h"), program.sources(packed, "net"), strict=True):
            (Path(folder) / name).write_text(text, "utf-8")
        _run([clang, *_COMPILE, "-c", "net.c", "-o", "net.o"], folder)
        exports = [f"--export={name}" for name in _EXPORTS]
        _run([linker, *_LINK, *exports, "net.o", "-o", "net.wasm"], folder)
        return (Path(folder) / "net.wasm").read_bytes()


def _find(name: str) -> str:
    """The newest program of a name."""
    for version in ("", *(f"-{number}" for number in _VERSIONS)):
        if path := shutil.which(name + version):
            return path
    raise UserError(f"{_INSTALL} ({name} is not there)")


def _run(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not end in {_PATIENCE} s") from None
    except OSError as error:
        raise UserError(f"{command[0]} does not run: {error.strerror}") from error
    if done.returncode:
        if os.strerror(errno.ENOSPC) in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        telling = next((line for line in lines if "error" in line), lines[0])
        raise UserError(f"{_INSTALL} that know wasm32 ({telling.strip()})")
