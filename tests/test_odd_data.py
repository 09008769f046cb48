"""The commands on what users' folders hold: odd names, damaged files, links, too much of it."""

import json
import os
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.commands import (
    ANALYZE,
    EVALUATE,
    PREDICT,
    TRAIN,
    Result,
    run,
    run_two,
    write_tiny,
    write_tree,
)
from tests.pictures import random_image
from tritonbnn.train.checkpoint import encode, read
from tritonbnn.train.recipe import read_recipe, resolve

LATIN = os.fsdecode(b"caf\xe9")  # a name as an old archive has it
SHORT = ("--epochs", 1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a tiny recipe and its images."""
    write_tiny(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished tiny run in ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny(folder)
    assert run(TRAIN, "tiny.toml", *SHORT, "--out", "run", cwd=folder).code == 0
    return folder


def train(place: Path, *argv: object, **options) -> Result:
    return run(TRAIN, "tiny.toml", *SHORT, "--out", "run", *argv, cwd=place, **options)


def assert_refused(result: Result, *words: str) -> None:
    """Code 2 and one line, with nothing after it."""
    assert result.code == 2, result.output
    assert "Traceback" not in result.output
    [error] = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.output.endswith(error + "\n")
    for word in words:
        assert word in error


# Names


@pytest.mark.slow
def test_names_that_are_not_utf_8_go_through_every_command(tmp_path: Path):
    classes = [LATIN, "b"]
    images = write_tree(tmp_path / LATIN, classes=classes)
    (images / "val" / "b" / "0.png").rename(images / "val" / "b" / f"{LATIN}.png")
    write_tiny(tmp_path)
    argv = ["tiny.toml", *SHORT, "--data-dir", LATIN, "--out", f"{LATIN}-run"]
    argv += ["--analysis", "full"]
    result = run(TRAIN, *argv, cwd=tmp_path)
    assert result.code == 0, result.output
    assert "best weights: caf\\xe9-run/step2/best.safetensors" in result.output
    saved = resolve(read_recipe(str(tmp_path / f"{LATIN}-run" / "config.toml")))
    assert saved.data_dir == str(images)
    again = run(TRAIN, *argv, cwd=tmp_path)
    assert again.code == 0, again.output
    result = run(EVALUATE, f"{LATIN}-run", cwd=tmp_path)
    assert result.code == 0, result.output
    assert result.output.startswith("caf\\xe9-run/step2/best.safetensors: 1-bit weights, 6 images")
    result = run(PREDICT, f"{LATIN}-run", f"{LATIN}/val/b", cwd=tmp_path)
    assert result.code == 0, result.output
    assert "caf\\xe9/val/b/caf\\xe9.png: " in result.output
    assert result.output.count("caf\\xe9 ") == 3  # the class, in every guess
    result = run(ANALYZE, f"{LATIN}-run", "--landscape", 0, cwd=tmp_path)
    assert result.code == 0, result.output
    assert "caf\\xe9-run/analysis.html" in result.output
    assert "damaged" not in result.output


def test_a_recipe_with_a_name_that_is_not_utf_8_is_read(place: Path):
    (place / "tiny.toml").rename(place / f"{LATIN}.toml")
    result = run(TRAIN, f"{LATIN}.toml", *SHORT, "--out", "run", cwd=place)
    assert result.code == 0, result.output
    config = (place / "run" / "config.toml").read_bytes()
    assert config.startswith(b'recipe = "caf\xe9"\n')


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_classes_that_the_terminal_cannot_show(tmp_path: Path, encoding: str):
    write_tree(tmp_path / "images", classes=["café", "寿司"])
    (tmp_path / "plain").mkdir()
    write_tiny(tmp_path / "plain")
    environ = {"PYTHONIOENCODING": encoding}
    argv = ["plain/tiny.toml", *SHORT, "--data-dir", "images", "--out", "寿司"]
    result = run(TRAIN, *argv, cwd=tmp_path, environ=environ)
    assert result.code == 0, result.output
    assert r"best weights: \u5bff\u53f8/step2" in result.output
    image = "images/val/café/0.png"
    result = run(PREDICT, "寿司", image, cwd=tmp_path, environ=environ, encoding=encoding)
    assert result.code == 0, result.output
    shown = "caf\\xe9" if encoding == "ascii" else "café"
    assert result.output.startswith(f"images/val/{shown}/0.png: ")
    assert r"\u5bff\u53f8 " in result.output


def test_a_name_cannot_make_two_lines_of_one(trained: Path, tmp_path: Path):
    random_image(0).save(tmp_path / "a\nb\x1b[31m.png")
    result = run(PREDICT, trained / "run", ".", cwd=tmp_path)
    assert result.code == 0, result.output
    [line] = [line for line in result.output.splitlines() if ".png" in line]
    assert line.startswith("a\\nb\\x1b[31m.png: ")


# Damage


def spoil_exif(path: Path) -> None:
    """An EXIF block whose directory promises entries that are not there."""
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI", 3, 0x0112, 3, 9)
    with Image.open(path) as image:
        image.convert("RGB").save(path.with_suffix(".jpg"), exif=exif)
    path.unlink()


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_exif_is_no_news(place: Path, workers: int):
    for path in list((place / "images").rglob("*.png")):
        spoil_exif(path)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with Image.open(place / "images" / "train" / "a" / "0.jpg") as image:
            image.getexif()
    assert heard  # else this test shows nothing
    result = train(place, "--workers", workers)
    assert result.code == 0, result.output
    assert "EXIF" not in result.output
    assert "Warning" not in result.output


def test_predict_goes_on_after_a_bad_file(trained: Path, tmp_path: Path):
    good = trained / "images" / "val" / "a" / "0.png"
    (tmp_path / "x").mkdir()
    shutil.copy(good, tmp_path / "x" / "0.png")
    (tmp_path / "x" / "1.png").write_bytes(b"")
    shutil.copy(good, tmp_path / "x" / "2.png")
    result = run(PREDICT, trained / "run", "nowhere.png", "x", "x/2.png", cwd=tmp_path)
    lines = result.output.splitlines()
    assert result.code == 2
    assert [line.split(": ")[:2] for line in lines if line.startswith("error")] == [
        ["error", "nowhere.png does not exist"],
        ["error", "x/1.png cannot be read as an image (it is empty)"],
    ]
    answers = [line.split(": ") for line in lines if not line.startswith("error")]
    assert [name for name, _ in answers] == ["x/0.png", "x/2.png", "x/2.png"]
    assert len({guesses for _, guesses in answers}) == 1


def test_predict_takes_a_folder_as_training_does(trained: Path, tmp_path: Path):
    for name in ("a.jfif", "b.gif", "deep/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        random_image(0).save(tmp_path / name)
    (tmp_path / "deep" / "up").symlink_to("..")
    (tmp_path / "x.heic").write_bytes(b"x")
    result = run(PREDICT, trained / "run", tmp_path, cwd=tmp_path.parent)
    assert result.code == 0, result.output
    news = [line for line in result.output.splitlines() if "%" not in line]
    answers = [line.split(": ")[0] for line in result.output.splitlines() if "%" in line]
    assert answers == [str(tmp_path / name) for name in ("a.jfif", "b.gif", "deep/c.webp")]
    assert len(news) == 2
    assert "other files passed over: 1 (.heic 1)" in news[0]
    assert "links not followed: 1" in news[1]


def test_two_processes_tell_what_is_passed_over_once(place: Path):
    (place / "images" / "train" / "a" / "x.heic").write_bytes(b"x")
    results = run_two(TRAIN, "tiny.toml", *SHORT, "--out", "run", cwd=place)
    assert [result.code for result in results] == [0, 0]
    assert [result.output.count("passed over") for result in results] == [1, 0]


# Too much


@pytest.mark.parametrize("size", [(12_000, 1), (1, 60_000)])
def test_a_very_thin_image_is_an_image(place: Path, size: tuple[int, int]):
    for split in ("train", "val"):
        Image.new("RGB", size).save(place / "images" / split / "a" / "thin.png")
    assert train(place).code == 0
    result = run(PREDICT, "run", "images/val/a/thin.png", cwd=place)
    assert result.code == 0, result.output


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batch-size", 10**12], "--batch-size must be at most"),
        (["--workers", 10**9], "--workers must be at most"),
    ],
)
def test_a_slip_of_the_finger_is_refused(place: Path, trained: Path, argv: list, words: str):
    assert_refused(train(place, *argv), words)
    assert not (place / "run").exists()
    assert_refused(run(EVALUATE, trained / "run", *argv, cwd=trained), "must be at most")


def test_images_larger_than_the_memory_are_refused(place: Path):
    result = train(place, "--image-size", 16 * 10**5)
    assert_refused(result, "8 images of 1600000 x 1600000 take", "smaller --batch-size")


# What is not finite


def with_bad_number(trained: Path, place: Path, number: float) -> Path:
    """The trained network, one of whose numbers is replaced."""
    good = read(trained / "run" / "step2" / "best.safetensors")
    tensors = {name: tensor.clone() for name, tensor in good.tensors.items()}
    tensors["model.fc.weight"].view(-1)[1] = number
    return write_checkpoint(place / "bad.safetensors", tensors, good.facts)


def write_checkpoint(path: Path, tensors: dict, facts: dict) -> Path:
    path.write_bytes(encode(tensors, {k: v for k, v in facts.items() if k != "checksum"}))
    return path


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_scored(trained: Path, place: Path, number: float):
    path = with_bad_number(trained, place, number)
    words = ("bad.safetensors", "fc.weight that are not finite", "use another checkpoint")
    assert_refused(run(EVALUATE, path, cwd=trained), *words)
    assert_refused(run(PREDICT, path, "images/val/a", cwd=trained), *words)
    assert_refused(train(place, "--init-from", path), *words)


def test_answers_that_are_not_finite_are_not_scored(trained: Path, place: Path):
    good = read(trained / "run" / "step2" / "best.safetensors")
    tensors = {**good.tensors, "model.fc.weight": torch.full((2, 64), 3e38)}
    path = write_checkpoint(place / "bad.safetensors", tensors, good.facts)
    assert_refused(run(EVALUATE, path, cwd=trained), "the loss is")
    result = run(PREDICT, path, "images/val/a/0.png", cwd=trained)
    assert_refused(result, "images/val/a/0.png: the network's answer is not finite")


# Ends


@pytest.mark.parametrize(("mishap", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
@pytest.mark.parametrize("at_file", [1, 20])
def test_listing_obeys_a_signal_at_once(place: Path, mishap: str, code: int, at_file: int):
    result = train(place, mishap=mishap, at_file=at_file)
    assert result.code == code, result.output
    assert "Traceback" not in result.output
    assert "step 1:" not in result.output  # so it begins when listing is done
    assert f"stopped by {mishap}" in result.output
    assert train(place).code == 0


def test_predictions_that_nobody_reads(trained: Path):
    argv = [PREDICT, "run", "images/val"]
    result = run(*argv, cwd=trained, stdout="closed pipe")
    assert (result.code, result.output) == (141, "")
    result = run(*argv, cwd=trained, stdout="/dev/full")
    assert_refused(result, "cannot write to stdout: No space left on device")


def test_a_full_stdout_loses_no_training(place: Path):
    assert_refused(train(place, stdout="/dev/full"), "cannot write to stdout")
    lines = (place / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["step1", "step2"]
    with safe_open(place / "run" / "step2" / "best.safetensors", framework="pt") as file:
        assert file.keys()
