"""Result files: the command above them, and how they are read again."""

import json
import shlex
from pathlib import Path
from typing import Any

from tritonbnn import cli


def command(module: str, argv: list[str]) -> str:
    """The line that measures the same again: where its result went is no part of it."""
    said = list(argv)
    if "--json" in said:
        index = said.index("--json")
        del said[index : index + 2]
    return shlex.join(["python", "-m", f"benchmarks.{module}", *said])


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
