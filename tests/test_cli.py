"""What every command line shares."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tritonbnn import cli
from tritonbnn.cli import Parser, UserError, printable


def test_help_names_a_default_unless_it_is_nothing():
    parser = Parser(prog="command", description="Do it.")
    parser.add_argument("--workers", type=int, default=0, help="processes")
    parser.add_argument("--json", help="a file")
    parser.add_argument("--fresh", action="store_true", help="start over")
    text = parser.format_help()
    assert "processes (default: 0)\n" in text
    assert "a file\n" in text
    assert "start over\n" in text


def end_of(error, capsys):
    """The exit code and stderr of a command that raises it."""

    def main(argv):
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return end.value.code, capsys.readouterr().err


def test_ctrl_c_is_one_line(capsys):
    assert end_of(KeyboardInterrupt(), capsys) == (cli.INTERRUPTED, "interrupted\n")


def test_a_name_cannot_make_an_error_two_lines_or_colour_it(capsys):
    code, said = end_of(UserError("no \x1b[31mred\nfile Grün"), capsys)
    assert (code, said) == (cli.USAGE_ERROR, "error: no \\x1b[31mred\\nfile Grün\n")


def test_bytes_of_a_name_that_are_not_utf_8_are_shown_as_such():
    assert printable(os.fsdecode(b"caf\xe9\x1b\n Gr\xc3\xbcn")) == "caf\\xe9\\x1b\\n Grün"


@pytest.mark.parametrize("allocate", [lambda: np.zeros(1 << 55), lambda: torch.zeros(1 << 55)])
def test_memory_that_runs_out_is_one_line(capsys, allocate):
    with pytest.raises((MemoryError, RuntimeError)) as error:
        allocate()
    code, said = end_of(error.value, capsys)
    assert (code, said.count("\n")) == (cli.USAGE_ERROR, 1)
    assert said.startswith("error: out of memory")


def test_what_may_not_be_looked_at_is_one_line(capsys):
    """As a run whose folder belongs to somebody else."""
    for name in ("runs/theirs", b"runs/theirs"):
        code, said = end_of(PermissionError(13, "Permission denied", name), capsys)
        assert code == cli.USAGE_ERROR
        assert said == (
            "error: cannot use runs/theirs: Permission denied: check its permissions and those of"
            " the folders around it\n"
        )


@pytest.mark.parametrize("mistake", [RuntimeError("a bug"), OSError("a bug")])
def test_a_mistake_of_ours_is_not_hidden(mistake):
    def main(argv):
        raise mistake

    with pytest.raises(type(mistake), match="a bug"):
        cli.run(main)


WRITER = """
import sys
from tritonbnn import cli
from tritonbnn.cli import Parser

def main(argv):
    Parser(prog="writer", description="words " * 40).parse_args(argv)
    for _ in range({lines}):
        print("word", "caf\\u00e9")
    return 0

cli.run(main)
"""


def written(lines: int, *argv: str, redirect: str = "", **environ: str) -> tuple[int, str]:
    """The exit code and stderr of a command that writes some lines, as a shell starts it."""
    root, code = Path(__file__).parents[1], WRITER.format(lines=lines)
    result = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" $2 {redirect}', sys.executable, code, *argv],
        env={**os.environ, "PYTHONPATH": str(root), **environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    return result.returncode, result.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])  # it fails at the end, or in between
def test_a_full_stdout_is_one_line(lines, unbuffered):
    how = {"redirect": ">/dev/full", "PYTHONUNBUFFERED": unbuffered}
    expected = "error: cannot write to stdout: No space left on device\n"
    assert written(lines, **how) == (cli.USAGE_ERROR, expected)
    assert written(0, "--help", **how) == (cli.USAGE_ERROR, expected)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stdout_that_nobody_reads_ends_in_silence(unbuffered):
    assert written(100_000, redirect="| head -n 1", PYTHONUNBUFFERED=unbuffered) == (0, "")


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_may_be_closed(redirect):
    assert written(3, redirect=redirect) == (0, "")
    assert written(3, "--unknown", redirect=redirect)[0] == cli.USAGE_ERROR


def test_a_terminal_need_not_know_a_character():
    assert written(3, PYTHONIOENCODING="ascii") == (0, "")
    assert written(3, PYTHONIOENCODING="ascii:strict") == (0, "")
