"""Processes that were not started alike end before the first step, all of them, in one line."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tritonbnn
from tests.commands import TINY, TRAIN, run_two, write_tree
from tests.test_bad_input import assert_one_line
from tests.test_identity import add_image
from tests.test_meeting import PATIENCE, variables
from tests.test_stop import ENVIRON

OLDER = "tests.older"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a recipe that names no data, and data of two classes."""
    write_tree(tmp_path / "images", classes=["ant", "bee"])
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path


def assert_refused(place: Path, second: list[object], *words: str) -> None:
    argv = ("tiny.toml", "--data-dir", "images", "--out", "run")
    results = run_two(TRAIN, *argv, cwd=place, second=second)
    for result in results:
        assert_one_line(result, "process 1", *words)
        assert result.seconds < 60
    assert not list(place.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (["--lr", 0.5], ("step1.lr is 0.5, and 0.002 in process 0",)),
        (["--seed", 7], ("seed is 7, and 0 in process 0",)),
        (["--log-interval", 3], ("log_interval is 3, and 1 in",)),
        (["--step2.optimizer", "sgd"], ("step2.optimizer is 'sgd', and 'adam' in process 0",)),
        (["--step2.optimizer.eps", 1e-3], ("step2.optimizer.eps is 0.001",)),
        (["--stage", "step2"], ("only is 'step2'",)),
    ],
)
def test_another_command(place: Path, second: list[object], words: tuple[str, ...]):
    assert_refused(place, second, *words, "start all processes with the same command")


@pytest.mark.parametrize("what", ["torch", "tritonbnn"])
def test_another_version(place: Path, what: str):
    argv = (what, "tiny.toml", "--data-dir", "images", "--out", "run")
    here = {"torch": torch, "tritonbnn": tritonbnn}[what].__version__
    for result in run_two(OLDER, *argv, cwd=place):
        words = f"process 1: {what} is '0.0.9', and '{here}' in process 0"
        assert_one_line(result, words, "the same versions")


def test_other_class_names(place: Path):
    write_tree(place / "other", classes=["ant", "wasp"])
    words = ("class number 1 is 'wasp', and 'bee' in process 0",)
    assert_refused(place, ["--data-dir", "other"], *words)


def test_another_number_of_classes(place: Path):
    write_tree(place / "other", classes=["ant", "bee", "cat"])
    assert_refused(place, ["--data-dir", "other"], "class is '3 entries', and '2 entries'")


@pytest.mark.parametrize(
    ("split", "name", "words"),
    [
        ("train", "new.png", "number of training images is 17, and 16 in process 0"),
        ("val", "new.png", "number of validation images is 7, and 6 in process 0"),
        ("train", "1.png", "digest of the training images is"),
    ],
)
def test_other_files(place: Path, split: str, name: str, words: str):
    shutil.copytree(place / "images", place / "other")
    add_image(place / "other" / split / "ant", name)
    assert_refused(place, ["--data-dir", "other"], words)


def test_a_mistake_that_only_one_process_meets_ends_both(place: Path):
    shutil.copytree(place / "images", place / "bad")
    (place / "bad" / "val" / "bee" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert_refused(place, ["--data-dir", "bad"], "1.png")
    assert_refused(place, ["--data-dir", "nowhere"], "nowhere does not exist")


def test_a_mistake_that_all_make_is_nobodys(place: Path):
    for result in run_two(TRAIN, "tiny.toml", "--data-dir", "nowhere", cwd=place):
        assert_one_line(result, "nowhere does not exist")
        assert "process" not in result.output


def test_what_may_differ(place: Path):
    """Each node has disks and processors of its own."""
    shutil.copytree(place / "images", place / "other")
    shutil.copy(place / "tiny.toml", place / "other" / "again.toml")
    argv = ("tiny.toml", "--data-dir", "images", "--out", "run", "--epochs", 1)
    for result in run_two(TRAIN, *argv, cwd=place, second=["--data-dir", "other", "--workers", 1]):
        assert result.code == 0, result.output
    lines = [json.loads(line) for line in (place / "run" / "log.jsonl").open()]
    assert len(lines) == 2


@pytest.mark.slow
def test_a_process_that_waits_for_the_data_of_another_obeys(place: Path):
    own = {**ENVIRON, **variables(0)}
    argv = [sys.executable, "-m", "tritonbnn.train", "tiny.toml", "--data-dir", "images"]
    options = {"cwd": place, "stderr": subprocess.PIPE, "text": True}
    slow = (
        "import time\n"
        "from tritonbnn.train import job\n"
        "from tritonbnn.train.__main__ import main\n"
        "from tritonbnn import cli\n"
        "open_images = job.open_images\n"
        "job.open_images = lambda config: (time.sleep(300), open_images(config))[1]\n"
        "cli.run(main)\n"
    )
    first = subprocess.Popen(argv, env=own, **options)
    second = subprocess.Popen(
        [sys.executable, "-c", slow, *argv[3:]],
        env={**own, "RANK": "1", "LOCAL_RANK": "1"},
        **options,
    )
    try:
        assert any("waiting for process 1" in line for line in first.stderr)
        first.send_signal(signal.SIGTERM)
        assert first.wait(PATIENCE) == 75
        second.send_signal(signal.SIGTERM)
        assert second.wait(PATIENCE) == 75
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
