"""What every command line here shares: help, one-line errors, their exit code, and logging."""

import argparse
import errno
import io
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

USAGE_ERROR = 2
INTERRUPTED = 130
NOBODY_READS = 141  # as a shell reports a program that wrote to a closed pipe

_TRITON = f"{os.sep}triton{os.sep}"
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # what torch says, of GPU and CPU


class UserError(Exception):
    """A user's mistake. The message is one line that names the thing and the remedy."""


class SettingError(UserError, ValueError):
    """An environment variable that says what cannot be."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says what is taken where a flag is not given, unless that is nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False
        return action.help if absent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose help names defaults, and that reports a bad flag as one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def at_least(least: int, most: float = math.inf) -> Callable[[str], int]:
    """The type of a flag that is a whole number from ``least`` on, to ``most``."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, not {text!r}"
            )
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {text}")
        return int(text)

    return number


def minutes(text: str) -> float:
    """The type of a flag that is a time in minutes: ``5`` or ``5m``."""
    try:
        found = float(text.removesuffix("m"))
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(
            f"must be a number of minutes above 0, as in 5m, not {text!r}"
        )
    return found


def path(text: str) -> Path:
    """The type of a flag that is a path. A shell leaves the ``~`` in ``--out=~/runs`` as it is."""
    with suppress(RuntimeError):  # ~NAME, where there is no such user: a name like any other
        return Path(text).expanduser()
    return Path(text)


class _OneLine(logging.Formatter):
    """The bare message: a name in it can neither end the line nor command the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(record.message)


def log_to_stderr() -> None:
    """Show the package's own log lines, bare, on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logger = logging.getLogger("tritonbnn")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run ``main(argv)`` and exit with its code.

    A :class:`UserError` is one line and code 2, whatever the names in it hold. So is memory that
    runs out, and a stdout that cannot be written. Ctrl-C is one line and code 130. Where nobody
    reads stdout any more, as behind ``| head``, the end is silent, with code 141.
    """
    _prepare_streams()
    log_to_stderr()
    try:
        code = _outcome(main)
        if sys.stdout is not None:
            sys.stdout.flush()
    except _StdoutError as error:
        code = _without_stdout(error)
    sys.exit(code)


def complain(error: object) -> int:
    """Say on stderr, in one line, what is wrong; the exit code for it."""
    _tell(f"error: {error}")
    return USAGE_ERROR


def printable(text: object) -> str:
    """``text`` with line ends and a terminal's commands as their escapes: names may hold them.

    A byte of a name that no character stands for is shown as ``\\xe9``.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # how Python keeps a byte of a name that is not UTF-8
        return f"\\x{number - 0xDC00:02x}"
    return ascii(character)[1:-1]


def _outcome(main: Callable[[list[str]], int]) -> int:
    try:
        return main(sys.argv[1:])
    except SystemExit as end:  # --help
        return end.code  # type: ignore[return-value]
    except UserError as error:
        return complain(error)
    except KeyboardInterrupt:
        _tell("interrupted")
        return INTERRUPTED
    except OSError as error:  # of any path that a user may name, where it is only looked for
        if error.errno == errno.ENAMETOOLONG:
            return complain(f"a file's name is too long: {str(error.filename)[:40]}...")
        if isinstance(error, PermissionError) and error.filename is not None:
            remedy = "check its permissions and those of the folders around it"
            return complain(f"cannot use {os.fsdecode(error.filename)}: {error.strerror}: {remedy}")
        raise
    except (MemoryError, RuntimeError, ValueError) as error:
        if _ran_out_of_memory(error):
            remedy = "take fewer images at a time, smaller ones or a smaller net"
            return complain(f"out of memory: {remedy}")
        if _is_of_a_damaged_cache(error):
            folder = os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")
            return complain(f"Triton's cache of compiled kernels is damaged: remove {folder}")
        raise


def _ran_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def _is_of_a_damaged_cache(error: Exception) -> bool:
    """Whether Triton could not read what it had compiled before, as after a full disk."""
    if "device kernel image is invalid" in str(error):
        return True
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return isinstance(error, json.JSONDecodeError) and any(_TRITON in name for name in frames)


def _prepare_streams() -> None:
    """Let stdout take any text, and have all three streams, or a file opened later takes a place.

    stderr escapes what the terminal's encoding lacks. stdout would raise.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # becomes the lowest one that is free: this one
    # without a stderr, print would take stdout instead
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    old = sys.stdout
    if isinstance(old, io.TextIOWrapper) and old is sys.__stdout__:
        sys.stdout = _Stdout(
            old.buffer,
            old.encoding,
            errors="backslashreplace",
            line_buffering=old.line_buffering,
            write_through=old.write_through,
        )


class _StdoutError(Exception):
    """stdout, and no other file, cannot be written. The cause is the system's error."""


class _Stdout(io.TextIOWrapper):
    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise _StdoutError from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise _StdoutError from error


def _without_stdout(error: _StdoutError) -> int:
    """End without it; the exit code."""
    # what is left goes nowhere: else the interpreter would try once more, and show a traceback
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error.__cause__, BrokenPipeError):
        return NOBODY_READS
    return complain(f"cannot write to stdout: {getattr(error.__cause__, 'strerror', '')}")


def _tell(line: str) -> None:
    with suppress(OSError):  # nobody reads stderr
        print(printable(line), file=sys.stderr)
