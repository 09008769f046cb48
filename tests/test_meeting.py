"""Processes that wait for others: they say so, obey signals, and give up in one line."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.commands import ROOT, TRAIN, Result, free_port, run, write_tiny
from tests.test_bad_input import assert_one_line

pytestmark = pytest.mark.slow

PATIENCE = 300  # seconds


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_tiny(tmp_path)
    return tmp_path


def variables(rank: int, size: int = 2, port: int | None = None, **more: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        **more,
    }


def train(place: Path, environ: dict[str, str], **options) -> Result:
    return run(TRAIN, "tiny.toml", "--out", "run", cwd=place, environ=environ, **options)


def nothing_begun(place: Path) -> bool:
    return not (place / "run").exists()


def test_who_is_missing_is_said_and_waited_for_no_longer_than_asked(place: Path):
    environ = variables(0, size=3, TRITONBNN_JOIN_SECONDS="2")
    result = train(place, environ)
    missing = f"waiting for 2 of 3 processes at 127.0.0.1:{environ['MASTER_PORT']} (RANK 1, 2)"
    assert_one_line(result, f"{missing}, for 2 seconds in vain", "TRITONBNN_JOIN_SECONDS")
    assert result.output.splitlines()[:-1] == [missing]
    assert result.seconds < 30
    assert nothing_begun(place)


@pytest.mark.parametrize(
    ("rank", "host", "words"),
    [
        (0, "127.0.0.1", "waiting for 1 of 2 processes at 127.0.0.1:"),
        (1, "127.0.0.1", "process 1 waits for process 0 at 127.0.0.1:"),
        (1, "nowhere.invalid", "process 1 waits for process 0 at nowhere.invalid:"),
        (1, "x" * 70, "process 1 waits for process 0 at xxx"),  # too long for a name
    ],
)
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_ends_the_wait(
    place: Path, rank: int, host: str, words: str, name: str, code: int
):
    environ = variables(rank, MASTER_ADDR=host)
    result = train(place, environ, kill_after=4, kill_with=name)
    assert result.code == code, result.output
    waiting, stopped = result.output.splitlines()
    assert waiting.startswith(words)
    assert stopped == f"stopped by {name} before all processes were there"
    assert result.seconds < 30
    assert nothing_begun(place)


@contextmanager
def stranger(says: bytes) -> Iterator[int]:
    """Somebody who listens at a port, and perhaps answers; the port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer():
            with suppress(OSError):  # closed
                while says:
                    listener.accept()[0].sendall(says)

        threading.Thread(target=answer, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_a_port_in_use(place: Path):
    with stranger(b"") as port:
        result = train(place, variables(0, port=port))
    assert_one_line(result, f"127.0.0.1:{port}", "in use", "choose another MASTER_PORT")
    assert nothing_begun(place)


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9])
def test_a_stranger_at_the_port(place: Path, says: bytes):
    with stranger(says) as port:
        result = train(place, variables(1, port=port))
    assert_one_line(result, f"what listens at 127.0.0.1:{port} is not process 0 of a job")
    assert nothing_begun(place)


def test_a_signal_ends_the_wait_for_a_stranger(place: Path):
    with stranger(b"") as port:
        result = train(place, variables(1, port=port), kill_after=4, kill_with="SIGTERM")
    assert result.code == 75, result.output
    assert result.seconds < 9


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (variables(3), "RANK is 3 and WORLD_SIZE 2"),
        (variables(0, size=0), "RANK is 0 and WORLD_SIZE 0"),
        (variables(0) | {"MASTER_PORT": "0"}, "MASTER_PORT must be 1 to 65535, not 0"),
        (variables(0) | {"MASTER_PORT": "70000"}, "MASTER_PORT must be 1 to 65535, not 70000"),
        (variables(0, TRITONBNN_JOIN_SECONDS="-1"), "TRITONBNN_JOIN_SECONDS must be"),
    ],
)
def test_variables_that_cannot_be(place: Path, environ: dict[str, str], words: str):
    assert_one_line(train(place, environ), words)
    assert nothing_begun(place)


def started(place: Path, environ: dict[str, str]) -> subprocess.Popen:
    """A trainer beside the test; it has begun to wait when this returns."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tritonbnn.train", "tiny.toml", "--out", "run"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environ},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr.readline().startswith("waiting for")
    return process


def test_two_of_one_rank_and_a_first_process_that_leaves(place: Path):
    port = free_port()
    first = started(place, variables(0, size=3, port=port))
    try:
        second = started(place, variables(1, size=3, port=port))
        try:
            twin = train(place, variables(1, size=3, port=port))
            assert_one_line(twin, f"two processes have RANK 1 at 127.0.0.1:{port}")
            first.send_signal(signal.SIGTERM)
            assert first.wait(PATIENCE) == 75
            _, said = second.communicate(timeout=PATIENCE)
            assert second.returncode == 2
            last = f"error: process 0 at 127.0.0.1:{port} has left"
            assert said.splitlines()[-1].startswith(last)
            assert "Traceback" not in said
        finally:
            second.kill()
            second.communicate()
    finally:
        first.kill()
        first.communicate()
