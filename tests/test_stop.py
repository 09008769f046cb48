"""Requests to stop: which signals are heard, what becomes of the run, and what is given back."""

import os
import pty
import random
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from tests.commands import ROOT, TRAIN, free_port, run, write_tiny
from tests.test_resume import assert_same_run
from tritonbnn.stop import EXIT_CODES, Stopped, StopSignals
from tritonbnn.train.checkpoint import read

pytestmark = pytest.mark.slow

PATIENCE = 300  # seconds
CODES = {"SIGTERM": 75, "SIGINT": 130, "SIGUSR1": 75, "SIGHUP": 75}
ENVIRON = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, float]:
    """An uninterrupted run, and how long it took."""
    result = run(TRAIN, "tiny.toml", "--out", "whole", cwd=place)
    assert result.code == 0, result.output
    return place / "whole", result.seconds


@pytest.mark.parametrize("name", CODES)
def test_each_signal_saves_and_ends(place: Path, whole, tmp_path: Path, name: str):
    out = tmp_path / "run"
    argv = ("tiny.toml", "--out", out, "--save-minutes", 60)
    stopped = run(TRAIN, *argv, cwd=place, mishap=name, at_step=3)
    assert stopped.code == CODES[name], stopped.output
    assert f"stopped by {name}; all is saved" in stopped.output
    facts = read(out / "step1" / "last.safetensors").facts
    assert (facts["epoch"], facts["batch"]) == (1, 1)
    assert run(TRAIN, *argv, cwd=place).code == 0
    assert_same_run(out, whole[0])


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("seed", range(4))
def test_a_signal_at_a_random_moment(place: Path, whole, tmp_path: Path, name: str, seed: int):
    """Before there is anything to save, or once all is, it may end the process as any other."""
    moment = random.Random(f"{name} {seed}").uniform(0.05, whole[1])
    argv = ("tiny.toml", "--out", tmp_path / "run", "--save-minutes", 60)
    stopped = run(TRAIN, *argv, cwd=place, kill_after=moment, kill_with=name)
    untrained = not (tmp_path / "run" / "step1").exists()
    over = "step2 epoch 2/2" in stopped.output
    as_any_other = [-signal.Signals[name]] if untrained or over else []
    assert stopped.code in (0, CODES[name], *as_any_other), stopped.output
    assert "Traceback" not in stopped.output
    result = run(TRAIN, *argv, cwd=place)
    assert result.code == 0, result.output
    assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
def test_twice_is_no_more_than_once(place: Path, tmp_path: Path, name: str):
    """A terminal that closes tells each process itself, and then through its shell."""
    argv = ("tiny.toml", "--out", tmp_path / "run")
    stopped = run(TRAIN, *argv, cwd=place, mishap=f"{name} twice", at_step=3)
    assert stopped.code == 75
    assert "all is saved" in stopped.output


def test_a_terminal_that_closes(place: Path, tmp_path: Path):
    """The trainer leads the terminal's session, and loses its output with it.

    There a bar names an epoch from its start, so that the second says that the first is over.
    """
    argv = [sys.executable, "-m", "tritonbnn.train", "tiny.toml", "--epochs", "10000"]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the test run may ignore it, as under nohup
        os.chdir(place)
        os.execve(sys.executable, [*argv, "--out", str(tmp_path / "run")], ENVIRON)
    shown = b""
    while b"epoch 2/" not in shown:
        shown += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert read(tmp_path / "run" / "step1" / "last.safetensors").facts["epoch"] > 0


def test_what_is_ignored_stays_so():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.number == 0
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.number == signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("error", [None, Stopped(signal.SIGTERM), ValueError(), SystemExit(2)])
def test_handlers_are_given_back_on_every_way_out(error: BaseException | None):
    def own(number, frame):
        """A user's handler."""

    signal.signal(signal.SIGUSR1, own)
    before = {number: signal.getsignal(number) for number in EXIT_CODES}
    try:
        with suppress(BaseException), StopSignals():
            assert signal.getsignal(signal.SIGUSR1) != own
            if error:
                raise error
    finally:
        after = {number: signal.getsignal(number) for number in EXIT_CODES}
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert after == before


def test_outside_the_main_thread_nothing_is_heard():
    before = {number: signal.getsignal(number) for number in EXIT_CODES}
    found = []

    def work():
        with StopSignals() as signals, signals.obeyed_at_once():
            found.append({number: signal.getsignal(number) for number in EXIT_CODES})

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_the_command_gives_back_what_it_took_in_a_notebook(place: Path, tmp_path: Path):
    """As IPython's ``%run -m`` does it: the module runs as __main__ in the caller's process."""
    code = f"""
import runpy, signal, sys
before = {{n: signal.getsignal(n) for n in (1, 2, 10, 15)}}
for flags in (["--epochs", "1"], ["--epochs", "0"], ["--lr", "1e30", "--fresh"]):
    sys.argv = ["train", "tiny.toml", "--out", {str(tmp_path / "run")!r}, *flags]
    try:
        runpy.run_module("tritonbnn.train", run_name="__main__")
    except SystemExit as end:
        print("code", end.code)
    assert {{n: signal.getsignal(n) for n in (1, 2, 10, 15)}} == before
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        env=ENVIRON,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    codes = [line for line in done.stdout.splitlines() if line.startswith("code")]
    assert codes == ["code 0", "code 2", "code 2"]


def test_torchrun_passes_on_what_slurm_sends(place: Path, tmp_path: Path):
    """torchrun itself then ends with an error of its own, but both processes have saved."""
    launcher = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
            *("--master-addr", "127.0.0.1", "--local-addr", "127.0.0.1"),
            *("--master-port", str(free_port()), "-m", "tritonbnn.train", "tiny.toml"),
            *("--epochs", "10000", "--out", str(tmp_path / "run")),
        ],
        cwd=place,
        env={**ENVIRON, "GLOO_SOCKET_IFNAME": "lo"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with launcher:
        said = ""
        for line in launcher.stderr:
            said += line
            if "epoch 1/" in line:
                launcher.send_signal(signal.SIGUSR1)
        assert launcher.wait(PATIENCE) != 0
    assert "stopped by SIGUSR1; all is saved" in said
    facts = read(tmp_path / "run" / "step1" / "last.safetensors").facts
    assert facts["world_size"] == 2
