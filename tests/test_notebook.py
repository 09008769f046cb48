"""A run that is called, from a notebook or a script: what it returns, and what it leaves behind."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.commands import TRAIN, run, write_tiny
from tests.test_resume import assert_same_run
from tests.test_stop import ENVIRON, PATIENCE
from tritonbnn.cli import UserError
from tritonbnn.stop import EXIT_CODES, Stopped
from tritonbnn.train import configure, job
from tritonbnn.train import run as train
from tritonbnn.train.checkpoint import read


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebook")
    write_tiny(folder)
    return folder


@pytest.fixture(autouse=True)
def handlers():
    """All are as they were, whatever the test does."""
    before = {number: signal.getsignal(number) for number in EXIT_CODES}
    yield
    assert {number: signal.getsignal(number) for number in EXIT_CODES} == before


def test_a_call_trains_as_the_command_does(place: Path, tmp_path: Path):
    trained = train(configure(str(place / "tiny.toml")), tmp_path / "run")
    assert run(TRAIN, "tiny.toml", "--out", tmp_path / "whole", cwd=place).code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert trained.folder == tmp_path / "run"
    assert trained.history == [json.loads(line) for line in (tmp_path / "run/log.jsonl").open()]
    assert trained.best == tmp_path / "run" / "step2" / "best.safetensors"
    assert trained.classes == ("a", "b")


def test_settings_are_those_of_a_recipe(tmp_path: Path):
    config = configure("digits", epochs=3, optimizer="sgd", data_dir="", step2={"lr": 1e-4})
    assert [stage.epochs for stage in config.stages] == [3, 3]
    assert [stage.optimizer.name for stage in config.stages] == ["sgd", "sgd"]
    assert config.stage("step2").lr == 1e-4 != config.stage("step1").lr
    with pytest.raises(UserError, match="did you mean epochs"):
        configure("digits", epoch=3)
    assert job.default_folder(config) == Path("runs/digits")
    assert configure("images", data_dir=tmp_path).data_dir == str(tmp_path)


def interrupted(number: int, folder: Path, config) -> BaseException:
    """What a run that gets a signal in its first epochs raises."""

    def send():
        while not (folder / "log.jsonl").exists() or not (folder / "log.jsonl").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    with pytest.raises(BaseException) as caught:
        train(config, folder)
    thread.join()
    return caught.value


def test_an_interrupt_is_a_notebooks(place: Path, tmp_path: Path):
    config = configure(str(place / "tiny.toml"), epochs=10_000)
    error = interrupted(signal.SIGINT, tmp_path / "run", config)
    assert isinstance(error, KeyboardInterrupt)
    saved = read(tmp_path / "run" / "step1" / "last.safetensors").facts
    assert saved["epoch"] > 0
    with pytest.raises(KeyboardInterrupt):  # the notebook's own interrupt works
        _interrupt_oneself()


def _interrupt_oneself() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def test_other_signals_are_told_by_name(place: Path, tmp_path: Path):
    config = configure(str(place / "tiny.toml"), epochs=10_000)
    error = interrupted(signal.SIGTERM, tmp_path / "run", config)
    assert isinstance(error, Stopped)
    assert error.signal == signal.SIGTERM


def test_another_process_may_go_on_with_a_run_that_was_called(place: Path, tmp_path: Path):
    config = configure(str(place / "tiny.toml"))
    train(config, tmp_path / "run")
    argv = ("tiny.toml", "--out", tmp_path / "run", "--step2.epochs", 3)
    result = run(TRAIN, *argv, cwd=place)
    assert result.code == 0, result.output


def test_a_mistake_leaves_the_folder_free(place: Path, tmp_path: Path):
    config = configure(str(place / "tiny.toml"), init_from=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere does not exist"):
        train(config, tmp_path / "run")
    result = run(TRAIN, "tiny.toml", "--out", tmp_path / "run", "--epochs", 1, cwd=place)
    assert result.code == 0, result.output


def test_in_a_thread(place: Path, tmp_path: Path):
    """Python hears signals in the main thread alone."""
    found = []
    config = configure(str(place / "tiny.toml"), epochs=1)
    thread = threading.Thread(target=lambda: found.append(train(config, tmp_path / "run")))
    thread.start()
    thread.join()
    assert [line["stage"] for line in found[0].history] == ["step1", "step2"]


def test_lines_are_logged_for_who_asks(place: Path, tmp_path: Path, caplog):
    config = configure(str(place / "tiny.toml"), epochs=1)
    with caplog.at_level(logging.INFO, "tritonbnn"):
        train(config, tmp_path / "run")
    assert any("step1 epoch 1/1" in line for line in caplog.messages)


@pytest.mark.parametrize("out", ["run", "other"])
def test_a_second_run_in_another_thread_is_refused(place: Path, tmp_path: Path, monkeypatch, out):
    """Each would draw from the other's random numbers, and write in its folder."""
    config = configure(str(place / "tiny.toml"), epochs=1)
    second: list[BaseException] = []

    def start_another() -> None:
        with pytest.raises(UserError, match="another run is training in this process") as caught:
            train(config, tmp_path / out)
        second.append(caught.value)

    def opened(config):
        monkeypatch.setattr(job, "open_images", real)  # the other one, if it starts, starts no more
        thread = threading.Thread(target=start_another)
        thread.start()
        thread.join()
        return real(config)

    real = job.open_images
    monkeypatch.setattr(job, "open_images", opened)
    assert len(train(config, tmp_path / "run").history) == 2
    assert len(second) == 1


@pytest.mark.slow
def test_an_interrupt_while_the_module_runs_in_a_notebook(place: Path, tmp_path: Path):
    """As ``%run -m``: the run saves, and the next interrupts are the notebook's again."""
    code = f"""
import os, runpy, signal, sys, threading, time
before = {{n: signal.getsignal(n) for n in (1, 2, 10, 15)}}
log = {str(tmp_path / "run" / "log.jsonl")!r}
def send():
    while not os.path.exists(log) or not open(log).read():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=send, daemon=True).start()
sys.argv = ["train", "tiny.toml", "--epochs", "10000", "--out", {str(tmp_path / "run")!r}]
try:
    runpy.run_module("tritonbnn.train", run_name="__main__")
except SystemExit as end:
    print("code", end.code)
assert {{n: signal.getsignal(n) for n in (1, 2, 10, 15)}} == before
for _ in range(2):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        print("interrupted")
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
    assert done.stdout.splitlines() == ["code 130", "interrupted", "interrupted"]
    assert "stopped by SIGINT; all is saved" in done.stderr
