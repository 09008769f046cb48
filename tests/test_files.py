"""What is written is whole, and goes only where a file can be."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tritonbnn.cli import UserError
from tritonbnn.files import utf_8_name, writable, write_atomically, write_together


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


WRITER = """
import sys
from pathlib import Path
from tritonbnn.files import writable, write_atomically, write_together
for _ in range(100):
    writable(Path("one"))
    write_atomically(Path("one"), sys.argv[1].encode() * 100_000)
    write_together({Path(name): sys.argv[1].encode() * 100_000 for name in sys.argv[2:]})
"""


def test_two_who_write_one_path_both_write_it_whole(tmp_path):
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, *arguments],
            cwd=tmp_path,
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in (("a", *"abc"), ("b", *"cba"))
    ]
    wholes = {letter * 100_000 for letter in (b"a", b"b")}
    while any(writer.poll() is None for writer in writers):
        for name in ("one", "a", "b", "c"):
            path = tmp_path / name
            assert not path.exists() or path.read_bytes() in wholes
    assert [writer.communicate()[1] for writer in writers] == ["", ""]
    assert {path.name for path in tmp_path.iterdir()} == {"one", "a", "b", "c"}


def test_threads_that_write_one_path_wait_for_each_other(tmp_path):
    path, errors = tmp_path / "one", []

    def write(letter):
        try:
            for _ in range(30):
                write_atomically(path, letter * 100_000)
        except UserError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(set(path.read_bytes())) == 1
    assert path.stat().st_size == 100_000


def test_what_a_killed_writer_has_left_stands_in_nobody_s_way(tmp_path):
    left = tmp_path / "one.tmp"
    for write in (write_atomically, lambda path, content: write_together({path: content})):
        left.write_bytes(b"a part of more than is written afterwards")
        write(tmp_path / "one", b"new")
        assert (tmp_path / "one").read_bytes() == b"new"
        assert not left.exists()


@pytest.mark.parametrize("write", [writable, lambda path: write_atomically(path, b"new")])
def test_a_path_that_cannot_be_written_is_named(write):
    with pytest.raises(UserError, match=r"^cannot write /proc/none\.tbnn: No such file"):
        write(Path("/proc/none.tbnn"))
    with pytest.raises(UserError, match=r"^cannot write \.: it is a folder"):
        write(Path())
