"""What every command line shares."""

import pytest

from tritonbnn import cli
from tritonbnn.cli import Parser, UserError


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
