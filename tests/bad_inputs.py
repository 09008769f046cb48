"""What the tables of bad inputs share: each is one line and exit code 2, and leaves nothing."""

from pathlib import Path

from tests.commands import Result

NUMBERS = ("", "x", "-1", "1.5.2", "nan", "0x10", "1 2")  # of no whole number from 0 on
DEVICES = ("gpu", "cuda", "cuda:x", "cpu:0:1", "", "CPU", "cuda:-1")
PLACES = ("nowhere", "/proc/none", "empty", "text.png", "a\nb", "x" * 300, "\x1b[31m")


def write_places(folder: Path) -> None:
    """Some of PLACES that are there and are not what they should be."""
    (folder / "empty").mkdir()
    (folder / "text.png").write_text("just words")


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """All files and folders, but for the command's own output."""
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != "output.txt"
    }


def assert_refused(result: Result, before: dict, folder: Path) -> None:
    """One line on the screen, exit code 2, and every file as it was."""
    assert result.code == 2, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.output
    assert result.output.splitlines()[-1] == errors[0]
    assert "Traceback" not in result.output
    assert snapshot(folder) == before
