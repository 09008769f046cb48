"""What is written is whole, and goes only where a file can be."""

import os
from pathlib import Path

import pytest

from tritonbnn.cli import UserError
from tritonbnn.files import utf_8_name, writable, write_atomically


@pytest.mark.parametrize("write", [writable, lambda path: write_atomically(path, b"new")])
def test_what_is_no_file_is_left_in_its_place(tmp_path, write):
    """As /dev/null, which a superuser's rename would replace."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    for name, kind in (("pipe", "a device or a pipe"), ("folder", "a folder"), ("link", "a pipe")):
        with pytest.raises(UserError, match=rf"{name}: it is .*{kind}; name a file"):
            write(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "folder", "link"}


@pytest.mark.parametrize("name", [b"caf\xe9", "caf\u00e9".encode()])
def test_a_file_has_a_name_that_is_utf_8(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(b"content")
    with utf_8_name(path) as other:
        other.encode()
        assert Path(other).read_bytes() == b"content"
