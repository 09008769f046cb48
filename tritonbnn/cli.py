"""What every command line here shares: help, one-line errors, their exit code, and logging."""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any, NoReturn

USAGE_ERROR = 2
INTERRUPTED = 130


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


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that is a whole number from ``least`` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, not {text!r}"
            )
        return int(text)

    return number


def log_to_stderr() -> None:
    """Show the package's own log lines, bare, on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("tritonbnn")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run ``main(argv)`` and exit with its code.

    A :class:`UserError` is one line and code 2, whatever the names in it hold; so is Ctrl-C, with
    code 130.
    """
    log_to_stderr()
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        code = USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def _printable(text: str) -> str:
    """Line ends and a terminal's commands as their escapes: a file's name may hold them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
