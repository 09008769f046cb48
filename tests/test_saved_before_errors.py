"""An error that leaves the state whole loses nothing: it is saved first, and the run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import TINY, TRAIN, Result, run, run_two
from tests.test_bad_input import assert_one_line
from tests.test_stop import ENVIRON, PATIENCE
from tritonbnn.data.batches import epoch_order
from tritonbnn.train.checkpoint import read

pytestmark = pytest.mark.slow

# so large that 16 of them are not kept in memory, and are read when they are needed
SIDE = 3400
BATCH = 4


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a recipe and 8 large images of each of two classes, in files of their own."""
    for name in ("ant", "bee"):
        for split in ("train", "val"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(8):
                file = tmp_path / "images" / split / name / f"{number}.png"
                pixels = np.full((SIDE, SIDE), 20 * number, np.uint8)
                Image.fromarray(pixels).save(file, compress_level=1)
    tiny = TINY.replace("save_minutes = 0", "save_minutes = 60")
    (tmp_path / "tiny.toml").write_text(f'data_dir = "{tmp_path / "images"}"\n{tiny}')
    return tmp_path


# analysis looks at some validation images before the first step
ARGV = ("tiny.toml", "--analysis", "off", "--epochs", 1, "--stage", "step1", "--batch-size", BATCH)


def train(place: Path, *argv: object, out: str = "run") -> Result:
    return run(TRAIN, *ARGV, "--out", out, *argv, cwd=place)


def file_of(place: Path, split: str, index: int) -> Path:
    return sorted((place / "images" / split).rglob("*.png"))[index]


def damage(file: Path) -> bytes:
    """Spoil pixels, and leave size and header as they are; what it held before."""
    before = file.read_bytes()
    middle = len(before) // 2
    file.write_bytes(before[:middle] + b"\xff" * 99 + before[middle + 99 :])
    return before


def saved(place: Path) -> tuple[int, int]:
    facts = read(place / "run" / "step1" / "last.safetensors").facts
    return facts["epoch"], facts["batch"]


@pytest.mark.parametrize(
    "options", ["", "--workers 1", "--accumulation 2", "--accumulation 3 --workers 2"]
)
def test_an_image_that_goes_bad_between_saves(place: Path, options: str):
    """The third step's. In parts, it comes in the last one of that step."""
    assert train(place, *options.split(), out="whole").code == 0
    order = epoch_order(0, 1, 0, 16)
    bad = file_of(place, "train", order[3 * BATCH - 1])
    content = damage(bad)
    result = train(place, *options.split())
    assert_one_line(result, str(bad), "--skip-bad-images")
    assert "step1: saved after 2 optimiser steps of epoch 1" in result.output.splitlines()
    assert saved(place) == (0, 2)
    bad.write_bytes(content)
    result = train(place, *options.split())
    assert result.code == 0, result.output
    assert "goes on in epoch 1 after 2 of 4 optimiser steps" in result.output
    ours, theirs = (read(place / out / "step1/last.safetensors") for out in ("run", "whole"))
    assert all((ours.tensors[name] == tensor).all() for name, tensor in theirs.tensors.items())


def test_the_remedy_is_taken(place: Path):
    damage(file_of(place, "train", epoch_order(0, 1, 0, 16)[3 * BATCH - 1]))
    assert train(place).code == 2
    result = train(place, "--skip-bad-images")
    assert result.code == 0, result.output
    changed = "train has 15 images after 16; epoch 1 begins anew"
    assert changed in result.output


def test_an_image_that_is_bad_when_it_is_evaluated(place: Path):
    content = damage(file_of(place, "val", 1))
    assert_one_line(train(place), "val/ant/1.png")
    assert saved(place) == (0, 4)
    file_of(place, "val", 1).write_bytes(content)
    assert train(place).code == 0


@pytest.mark.parametrize("split", ["train", "val"])
def test_all_processes_save_and_leave(place: Path, split: str):
    """Only one of two has the bad image in its share."""
    last = {"train": epoch_order(0, 1, 0, 16)[3 * BATCH - 1], "val": 3}[split]
    damage(file_of(place, split, last))
    first, second = run_two(TRAIN, *ARGV, "--out", "run", cwd=place)
    assert_one_line(first, "another process has no images to go on with")
    assert_one_line(second, ".png", "--skip-bad-images")
    assert saved(place) == (0, 2 if split == "train" else 4)


def test_a_worker_that_is_killed(place: Path):
    """In whatever the trainer does then. To decode 16 large images takes it seconds."""
    assert train(place, "--workers", 1, "--out", "whole").code == 0
    argv = (*map(str, ARGV), "--workers", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "tritonbnn.train", *argv, "--out", "run"],
        cwd=place,
        env=ENVIRON,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        os.kill(_worker_of(process), signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: a process that reads images has died")
    assert "step1: saved after" in said
    assert train(place, "--workers", 1).code == 0
    ours, theirs = (read(place / out / "step1/last.safetensors") for out in ("run", "whole"))
    assert all((ours.tensors[name] == tensor).all() for name, tensor in theirs.tensors.items())


def _worker_of(process: subprocess.Popen) -> int:
    """A child that has read images for a tenth of a second, unlike commands that end sooner."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        before = set(children.read_text().split())
        time.sleep(0.1)
        for child in before & set(children.read_text().split()):
            if b"tritonbnn.train" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError("the trainer ended before it had a process that reads images")
