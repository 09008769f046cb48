"""Workers by fork, forkserver and spawn: the same numbers, and none that outlives its trainer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.commands import TINY, TRAIN, run, write_tree
from tests.test_stop import ENVIRON, PATIENCE
from tritonbnn.train.checkpoint import read

pytestmark = pytest.mark.slow

METHODS = ("fork", "forkserver", "spawn")
SECONDS = 20  # generous: the machine may be busy
ARGV = ("tiny.toml", "--workers", "1", "--stage", "step1", "--batch-size", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    write_tree(folder / "images", train=16)
    text = f'data_dir = "{folder / "images"}"\n{TINY}'
    (folder / "tiny.toml").write_text(text)
    return folder


def start(place: Path, method: str, out: Path, *more: str) -> subprocess.Popen:
    """The trainer in a session of its own."""
    argv = ["train", *ARGV, "--out", str(out), *more]
    code = (
        "import multiprocessing, runpy, sys\n"
        f"multiprocessing.set_start_method({method!r})\n"
        f"sys.argv = {argv!r}\n"
        "runpy.run_module('tritonbnn.train', run_name='__main__')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=place,
        env=ENVIRON,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def in_session(leader: int) -> list[int]:
    """Its processes that live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended
            continue
        if int(session) == leader and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def wait_for(file: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not file.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def assert_none_is_left(trainer: subprocess.Popen) -> None:
    until = time.monotonic() + SECONDS
    while (left := in_session(trainer.pid)) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == []


def end(trainer: subprocess.Popen) -> None:
    """Whatever a test has left of it."""
    for process in in_session(trainer.pid):
        os.kill(process, signal.SIGKILL)
    trainer.communicate()


@pytest.mark.parametrize("method", METHODS)
def test_none_outlives_a_trainer_that_is_killed(place: Path, tmp_path: Path, method: str):
    trainer = start(place, method, tmp_path / "run", "--epochs", "9999", "--workers", "2")
    try:
        wait_for(tmp_path / "run" / "step1" / "last.safetensors")  # in the middle of an epoch
        assert len(in_session(trainer.pid)) >= 3
        trainer.kill()
        trainer.wait(PATIENCE)
        assert_none_is_left(trainer)
    finally:
        end(trainer)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    result = run(TRAIN, *ARGV, "--out", "whole", "--epochs", 1, cwd=place)
    assert result.code == 0, result.output
    return place / "whole"


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_stopped_goes_on(place: Path, whole: Path, tmp_path: Path, method: str):
    for number in (signal.SIGTERM, None):
        trainer = start(place, method, tmp_path / "run", "--epochs", "1")
        try:
            if number:
                wait_for(tmp_path / "run" / "step1" / "last.safetensors")
                trainer.send_signal(number)
            _, said = trainer.communicate(timeout=PATIENCE)
            assert trainer.returncode == (75 if number else 0), said
            assert "Traceback" not in said
            assert_none_is_left(trainer)
        finally:
            end(trainer)
    ours, theirs = (read(run / "step1" / "last.safetensors") for run in (tmp_path / "run", whole))
    different = [n for n, t in theirs.tensors.items() if not torch.equal(ours.tensors[n], t)]
    assert different == []
