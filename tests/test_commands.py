"""``python -m tritonbnn.evaluate`` and ``.predict``, and the package as it is installed."""

import json
import logging
import os
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.commands import COMPARE, EVALUATE, PREDICT, TRAIN, run, write_tiny, write_tree
from tritonbnn.data.sources import SampleKey, open_source
from tritonbnn.train.log import Bar
from tritonbnn.train.weights import load_network

SEVEN = "abcdefg"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run on seven classes."""
    folder = tmp_path_factory.mktemp("commands")
    write_tiny(folder)
    write_tree(folder / "seven", train=4, val=2, classes=SEVEN)
    result = run(TRAIN, "tiny.toml", "--data-dir", "seven", "--out", "run", cwd=folder)
    assert result.code == 0, result.output
    return folder


@pytest.mark.parametrize("step", [1, 2])
def test_evaluate_gives_the_logged_score(place: Path, step: int):
    path = place / "run" / f"step{step}" / "best.safetensors"
    result = run(EVALUATE, path, "--batch-size", 3, cwd=place)
    assert result.code == 0, result.output
    lines = [json.loads(line) for line in (place / "run" / "log.jsonl").open()]
    best = max((x for x in lines if x["stage"] == f"step{step}"), key=lambda x: x["val_top1"])
    weights = "real" if step == 1 else "1-bit"
    assert result.output == (
        f"{path}: {weights} weights, 14 images of the data set images:"
        f" top-1 {best['val_top1']:.2f} %, top-5 {best['val_top5']:.2f} %,"
        f" loss {best['val_loss']:.4f}\n"
    )


def test_top5_is_not_told_of_five_classes(tmp_path: Path):
    write_tiny(tmp_path)
    write_tree(tmp_path / "five", train=2, val=1, classes="abcde")
    argv = ("tiny.toml", "--data-dir", "five", "--out", "run", "--epochs", 1)
    trained = run(TRAIN, *argv, cwd=tmp_path)
    assert trained.code == 0, trained.output
    scored = run(EVALUATE, "run", cwd=tmp_path)
    assert scored.code == 0, scored.output
    assert "validation top-1" in trained.output
    assert "top-1" in scored.output
    heads, *rows = [text for text in trained.output.splitlines() if "  " in text][-3:]
    assert "last top-5" in heads
    assert [row.split()[-2] for row in rows] == ["-", "-"]
    assert "top-5" not in (trained.output + scored.output).replace(heads, "")


def test_evaluate_a_run_takes_its_second_step(place: Path):
    result = run(EVALUATE, "run", cwd=place)
    assert "step2/best.safetensors: 1-bit weights" in result.output


def test_evaluate_on_data_elsewhere(place: Path, tmp_path: Path):
    write_tree(tmp_path / "other", train=1, val=5, classes=SEVEN)
    result = run(EVALUATE, place / "run", "--data-dir", "other", cwd=tmp_path)
    assert result.code == 0, result.output
    assert "35 images of the data set images" in result.output


def test_predict_names_the_network_s_own_guesses(place: Path):
    result = run(PREDICT, "run", "seven/val/c", "seven/val/a/0.png", cwd=place)
    assert result.code == 0, result.output
    lines = result.output.splitlines()
    names = [line.split(": ")[0] for line in lines]
    assert names == ["seven/val/c/0.png", "seven/val/c/1.png", "seven/val/a/0.png"]
    source = open_source(
        "images",
        data_dir=place / "seven",
        image_size=16,
        augment="none",
        lighting="none",
        seed=0,
        step=2,
    )
    model, _ = load_network(place / "run")
    image, label = source.val[SampleKey(0, 2 * 2)]
    assert label == 2
    chances = model.eval()(image[None]).softmax(dim=1)[0].tolist()
    ranked = sorted(zip(chances, SEVEN, strict=True), reverse=True)[:5]
    expected = ", ".join(f"{name} {chance:.1%}" for chance, name in ranked)
    assert lines[0] == f"seven/val/c/0.png: {expected}"


def test_predict_with_few_classes_names_them_all(tmp_path: Path):
    write_tiny(tmp_path)
    assert run(TRAIN, "tiny.toml", "--epochs", 1, "--out", "run", cwd=tmp_path).code == 0
    result = run(PREDICT, "run", "images/val/a/0.png", cwd=tmp_path)
    assert len(re.findall(r"[ab] \d+\.\d %", result.output.replace("%", " %"))) == 2


@pytest.mark.parametrize("module", [TRAIN, EVALUATE, PREDICT, COMPARE])
def test_help(module: str, tmp_path: Path):
    result = run(module, "--help", cwd=tmp_path)
    assert result.code == 0
    assert "usage: python -m tritonbnn." in result.output


def test_the_command_line_itself(tmp_path: Path):
    """As a user or a CI job starts it: another process, no terminal, nothing on stdin."""
    small = "--model birealnet_18 --width 0.125 --image-size 16 --batch-size 256"
    result = subprocess.run(
        [sys.executable, "-m", "tritonbnn.train", *small.split(), "--epochs", "1"],
        cwd=tmp_path,
        env={**os.environ, "CI": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    heads, first, second, where = result.stdout.splitlines()
    assert heads.split()[:3] == ["stage", "weights", "epochs"]
    assert (first.split()[1], second.split()[1]) == ("real", "1-bit")
    assert where == "best weights: runs/digits/step2/best.safetensors"
    # no progress bar where nobody looks
    assert "\r" not in result.stderr
    assert len(re.findall(r"^step[12] epoch 1/1: ", result.stderr, re.MULTILINE)) == 2


def bar_on(terminal: bool) -> str:
    """What a bar of four steps leaves on a terminal, or in a file."""
    code = (
        "from tritonbnn.train.log import Bar\n"
        "bar = Bar('step 1 epoch 2/3', 4, 1, show=True)\n"
        "bar.advance(); bar.tell(2, 0.5, (154.25, 539.875, 617)); bar.close()"
    )
    reader, writer = os.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(writer, (40, 120))
    subprocess.run([sys.executable, "-c", code], stderr=writer, check=True, timeout=300)
    os.write(writer, b"\n")
    os.close(writer)
    content = os.read(reader, 100_000).decode()
    os.close(reader)
    return content


@pytest.mark.slow
def test_the_bar_is_for_the_eye():
    shown = bar_on(terminal=True)
    assert "step 1 epoch 2/3" in shown
    assert "2/4" in shown
    assert "loss 0.250, top-1 87.5 %, 1234 img/s" in shown
    assert bar_on(terminal=False) == "\n"


def test_lines_tell_of_the_progress_where_there_is_no_terminal(place: Path, tmp_path: Path):
    """At every --log-interval, but no more often than asked: once a minute."""
    argv = ("tiny.toml", "--epochs", 1, "--batch-size", 3, "--log-interval", 2)  # of 16 images
    result = run(TRAIN, *argv, "--log-minutes", 0, "--out", tmp_path / "run", cwd=place)
    assert result.code == 0, result.output
    told = re.findall(
        r"^(step[12]) epoch 1/1: step (\d)/6: loss \d+\.\d{3}, top-1 \d+\.\d %, (\d+) img/s,"
        r" (\d\d:\d\d) left$",
        result.output,
        re.MULTILINE,
    )
    assert [line[:2] for line in told] == [(s, n) for s in ("step1", "step2") for n in "246"]
    assert all(int(speed) > 0 for _, _, speed, _ in told)
    assert [left for _, number, _, left in told if number == "6"] == ["00:00"] * 2
    quiet = run(TRAIN, *argv, "--out", tmp_path / "quiet", cwd=place)
    assert "left" not in quiet.output


def test_the_time_that_is_left_is_that_of_the_steps_that_are(caplog):
    with caplog.at_level(logging.INFO, "tritonbnn"):
        bar = Bar("all epoch 2/9", 5000, 1000, show=True, minutes=0)
        assert bar.due
        bar.tell(1500, 1800.0, (2400.0, 300.0, 1200.0))
        bar.tell(4000, 4800.0, (2400.0, float("nan"), 1200.0))
        assert not Bar("", 5, 0, show=False, minutes=0).due
        assert not Bar("", 5, 0, show=True, minutes=1).due
    assert caplog.messages == [
        "all epoch 2/9: step 1500/5000: loss 2.000, top-1 25.0 %, 1 img/s, 1:10:00 left",
        "all epoch 2/9: step 4000/5000: loss 2.000, 0 img/s, 20:00 left",
    ]
