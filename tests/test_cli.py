"""What every command line shares."""

from tritonbnn.cli import Parser


def test_help_names_a_default_unless_it_is_nothing():
    parser = Parser(prog="command", description="Do it.")
    parser.add_argument("--workers", type=int, default=0, help="processes")
    parser.add_argument("--json", help="a file")
    parser.add_argument("--fresh", action="store_true", help="start over")
    text = parser.format_help()
    assert "processes (default: 0)\n" in text
    assert "a file\n" in text
    assert "start over\n" in text
