"""Result files: written whole or not at all, and refused before the work if they cannot be."""

import json
import shlex
from pathlib import Path
from typing import Any

from tritonbnn import cli
from tritonbnn.train.files import make_folder, write_atomically


def writable(path: Path | None) -> Path | None:
    """``path``, its folder made.

    Raises:
        cli.UserError: a file cannot be put there.
    """
    if path is None:
        return None
    make_folder(path.parent)
    probe = path.with_name(path.name + ".probe")
    write_atomically(probe, b"")
    probe.unlink()
    if path.is_dir():
        raise cli.UserError(f"cannot write {path}: it is a folder; name a file")
    return path


def command(module: str, argv: list[str]) -> str:
    """The line that measures the same again: where its result went is no part of it."""
    said = list(argv)
    if "--json" in said:
        index = said.index("--json")
        del said[index : index + 2]
    return shlex.join(["python", "-m", f"benchmarks.{module}", *said])


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON."""
    write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())


def read_result(path: Path) -> dict[str, Any] | None:
    """A result, or None where there is no such file.

    Raises:
        cli.UserError: the file is not a JSON object.
    """
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise cli.UserError(f"{path} cannot be read ({error}): measure it again") from error
    if not isinstance(result, dict):
        raise cli.UserError(f"{path} is not a result: measure it again")
    return result
