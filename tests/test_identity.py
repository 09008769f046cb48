"""A run goes on with the data that it began with, or says what is other about them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.commands import TINY, TRAIN, Result, run, write_tree
from tests.test_bad_input import assert_one_line
from tests.test_resume import assert_same_run
from tritonbnn.data.splits import ArrayImages
from tritonbnn.train.checkpoint import FACTS, read


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a recipe that names no data, and data of two classes."""
    write_tree(tmp_path / "images", classes=["ant", "bee"])
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path


def train(place: Path, *argv: object, data: str = "images", **options) -> Result:
    argv = ("tiny.toml", "--data-dir", place / data, "--out", "run", *argv)
    return run(TRAIN, *argv, cwd=place, **options)


def stopped_in_an_epoch(place: Path, at_step: int = 1) -> None:
    assert train(place, mishap="SIGTERM", at_step=at_step).code == 75


def add_image(folder: Path, name: str, level: int = 90) -> None:
    Image.fromarray(np.full((32, 32, 3), level, np.uint8)).save(folder / name)


def facts(place: Path, step: int = 1) -> dict:
    return read(place / "run" / f"step{step}" / "last.safetensors").facts


def test_a_renamed_class_is_refused(place: Path):
    stopped_in_an_epoch(place)
    for split in ("train", "val"):
        (place / "images" / split / "bee").rename(place / "images" / split / "wasp")
    before = (place / "run" / "step1" / "last.safetensors").read_bytes()
    assert_one_line(train(place), "other classes", "the first: bee, only in the checkpoint")
    assert (place / "run" / "step1" / "last.safetensors").read_bytes() == before


@pytest.mark.parametrize("stop", [1, 5])  # within step 1, and within step 2
def test_other_classes_are_refused_whatever_their_number(place: Path, stop: int):
    stopped_in_an_epoch(place, stop)
    write_tree(place / "other", classes=["ant", "bee", "cat"])
    assert_one_line(train(place, data="other"), "other classes", "cat, only in the data")


def test_step_2_takes_over_nothing_of_other_classes(place: Path):
    assert train(place, "--stage", "step1").code == 0
    for split in ("train", "val"):
        (place / "images" / split / "ant").rename(place / "images" / split / "wasp")
    result = train(place, "--stage", "step2")
    assert_one_line(result, "other classes", "the first: ant, only in the checkpoint")


def test_step_2_says_that_it_takes_over_weights_of_other_images(place: Path):
    assert train(place, "--stage", "step1").code == 0
    add_image(place / "images" / "train" / "ant", "new.png")
    result = train(place, "--stage", "step2")
    assert result.code == 0, result.output
    words = "step2 takes over weights of other data: train has 17 images after 16"
    assert words in result.output.splitlines()


def test_step_2_without_the_best_of_step_1_names_what_is_missing(place: Path):
    assert train(place, "--stage", "step1").code == 0
    (place / "run" / "step1" / "best.safetensors").unlink()
    words = "there is no checkpoint run/step1/best.safetensors: name another one, or start over"
    assert_one_line(train(place), words)


def test_another_order_of_the_same_classes_is_refused(place: Path):
    write_tree(place / "numbers", classes=["1", "2", "10"])
    assert train(place, data="numbers", mishap="SIGTERM", at_step=1).code == 75
    config = place / "run" / "config.toml"
    config.write_text(config.read_text().replace('class_order = "name"', 'class_order = "numeric"'))
    result = train(place, "--class-order", "numeric", data="numbers")
    assert_one_line(result, "class number 1 is 10 there, and 2 in the data")


@pytest.mark.parametrize(
    ("split", "change", "words"),
    [
        ("train", "add", "train has 17 images after 16"),
        ("train", "replace", "train has other images, 16 as before"),
        ("train", "rename", "train has other images, 16 as before"),
        ("val", "remove", "val has 5 images after 6"),
        ("val", "replace", "val has other images, 6 as before"),
    ],
)
def test_an_epoch_of_other_images_begins_anew(place: Path, split: str, change: str, words: str):
    stopped_in_an_epoch(place, at_step=3)
    assert (facts(place)["epoch"], facts(place)["batch"]) == (1, 1)
    folder = place / "images" / split / "ant"
    if change == "add":
        add_image(folder, "new.png")
    elif change == "replace":
        add_image(folder, "1.png")
    elif change == "rename":
        (folder / "1.png").rename(folder / "one.png")
    else:
        (folder / "1.png").unlink()
    result = train(place)
    assert result.code == 0, result.output
    line = f"step1: the data have changed: {words}; epoch 2 begins anew"
    assert result.output.count("the data have changed") == 1
    assert line in result.output.splitlines()
    # every image of the epoch once, and none of those of before
    lines = [json.loads(text) for text in (place / "run" / "log.jsonl").open()]
    assert [(x["stage"], x["epoch"]) for x in lines] == [
        *(("step1", 1), ("step1", 2), ("step2", 1), ("step2", 2))
    ]
    seen = facts(place, 2)["images"]
    assert seen["train"]["images"] == (17 if change == "add" else 16)
    updates = [x["analysis"]["updates"] for x in lines]
    assert updates == [2, 3, 3, 3] if change == "add" else [2, 2, 2, 2]


def test_the_best_of_other_validation_images_counts_no_more(place: Path):
    stopped_in_an_epoch(place, at_step=3)
    best = facts(place)["best"]
    assert best["epoch"] == 1
    (place / "images" / "val" / "ant" / "1.png").unlink()
    assert train(place, "--stage", "step1").code == 0
    assert facts(place)["best"]["epoch"] == 2


def test_the_same_data_in_another_folder_are_the_same(place: Path):
    assert train(place).code == 0
    (place / "run").rename(place / "whole")
    stopped_in_an_epoch(place)
    shutil.copytree(place / "images", place / "moved" / "again")
    result = train(place, data="moved/again")
    assert result.code == 0, result.output
    assert "changed" not in result.output
    for folder in (place / "run", place / "whole"):
        for file in folder.rglob("*.safetensors"):
            _edit(file, lambda facts: facts["data"].pop("dir"))
    assert_same_run(place / "run", place / "whole")


def test_a_checkpoint_that_does_not_say_goes_on_with_a_line(place: Path):
    assert train(place).code == 0
    (place / "run").rename(place / "whole")
    stopped_in_an_epoch(place)
    last = place / "run" / "step1" / "last.safetensors"
    _edit(last, lambda facts: facts.pop("images"))
    result = train(place)
    assert result.code == 0, result.output
    assert result.output.count("does not say which images it has seen") == 1
    assert_same_run(place / "run", place / "whole")


def _edit(file: Path, change) -> None:
    """Change the facts of a checkpoint, and nothing else."""
    with safe_open(file, framework="pt") as opened:
        facts = json.loads(opened.metadata()[FACTS])
    change(facts)
    save_file(load_file(file), file, metadata={FACTS: json.dumps(facts)})


def test_arrays_are_known_by_their_pixels_and_labels():
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (7, 1, 5, 3), np.uint8), random.integers(0, 3, 7)
    digest = ArrayImages(pixels, labels).digest()
    assert digest == ArrayImages(pixels.copy(), labels.copy()).digest()
    other = pixels.copy()
    other[6, 0, 4, 2] ^= 1
    assert digest != ArrayImages(other, labels).digest()
    assert digest != ArrayImages(pixels, np.roll(labels, 1)).digest()
    assert digest != ArrayImages(pixels[::-1], labels).digest()
