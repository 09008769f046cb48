"""Data sources: what they hand out, against PIL and numpy, and what they refuse."""

import logging
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pictures import grey, one_line, random_image, source, spoil_image
from tritonbnn import data
from tritonbnn.cli import UserError
from tritonbnn.data.folder import FolderImages
from tritonbnn.data.sources import SampleKey, eval_reader
from tritonbnn.stop import Stopped, StopSignals


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two classes, three images each to train on and one each to validate on."""
    root = tmp_path / "tree"
    for split, count in (("train", 3), ("val", 1)):
        for label, name in enumerate(("ant", "bee")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                random_image(100 * label + i).save(folder / f"{i}.png")
    return root


# Digits


def test_digits_are_split_stratified_and_complete():
    digits = source("digits")
    assert (digits.name, digits.channels) == ("digits", 1)
    assert digits.classes == tuple("0123456789")
    train = [digits.train[SampleKey(0, i)][1] for i in range(len(digits.train))]
    val = [digits.val[SampleKey(0, i)][1] for i in range(len(digits.val))]
    assert np.bincount(val).tolist() == [36] * 10
    assert np.bincount(train + val).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_look_like_the_stored_bytes():
    path = Path(data.__file__).parent / "digits.npz"
    arrays = np.load(path, allow_pickle=False)
    first = np.flatnonzero(arrays["test"])[0]
    image, label = source("digits", image_size=8).val[SampleKey(0, 0)]
    expected = np.rint(arrays["images"][first] * (255 / 16))
    np.testing.assert_array_equal(grey(image), expected)
    assert label == arrays["labels"][first]
    # the first digit of the file is the 0 that scikit-learn's documentation prints
    assert arrays["images"][0][0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_digits_are_upsampled_bilinearly():
    small = grey(source("digits", image_size=8).val[SampleKey(0, 0)][0])
    expected = Image.fromarray(small).resize((32, 32), Image.Resampling.BILINEAR)
    image, _ = source("digits").val[SampleKey(0, 0)]
    assert (image.dtype, image.shape) == (torch.float32, (1, 32, 32))
    np.testing.assert_array_equal(grey(image), np.asarray(expected))


# Image trees


@pytest.mark.parametrize("name", ["images", "folder"])
def test_an_image_tree_is_opened_by_its_name_of_today_and_before(tree, name):
    found = source(name, tree, image_size=8)
    assert (found.name, found.classes, found.channels) == ("images", ("ant", "bee"), 3)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    labels = []
    for i in range(len(found.train)):
        image, label = found.train[SampleKey(0, i)]
        labels.append(label)
        pixels = np.asarray(random_image(100 * label + i % 3)).transpose(2, 0, 1)
        expected = (torch.from_numpy(pixels.copy()).float() / 255 - mean) / std
        torch.testing.assert_close(image, expected)
    assert labels == [0, 0, 0, 1, 1, 1]
    assert len(found.val) == 2


def test_nested_folders_count_and_hidden_and_other_files_do_not(tree):
    nested = tree / "train" / "ant" / "more" / "deep"
    nested.mkdir(parents=True)
    random_image(1).save(nested / "x.PNG")
    (tree / "train" / "ant" / "notes.txt").write_text("no image")
    (tree / "train" / "ant" / "._0.png").write_bytes(b"resource fork")
    (tree / "train" / ".cache").mkdir()
    assert len(source("images", tree).train) == 7


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (replace_by_file, "is not a folder"),
        (empty, "is empty"),
        (lambda root: shutil.rmtree(root / "train"), r"has no folder train/"),
        (lambda root: shutil.rmtree(root / "val"), r"has no folder val/"),
        (lambda root: empty(root / "train"), "no class folder"),
        (lambda root: shutil.rmtree(root / "train" / "bee"), "only the class ant"),
        (lambda root: shutil.rmtree(root / "val" / "bee"), "bee, only in train/"),
        (lambda root: (root / "val" / "cat").mkdir(), "cat, only in val/"),
        (lambda root: empty(root / "train" / "bee"), r"train/bee holds no readable image"),
        (lambda root: empty(root / "val" / "ant"), r"val/ant holds no readable image"),
    ],
)
def test_an_incomplete_tree_is_refused(tree, spoil, message):
    spoil(tree)
    with pytest.raises(UserError, match=message) as error:
        source("images", tree)
    assert str(tree) in one_line(error)


def test_a_path_that_the_system_refuses_is_named(tmp_path):
    for name in ("fashion", "cifar10", "images"):
        with pytest.raises(UserError, match=r"cannot read .*xxx.*: File name too long") as error:
            source(name, tmp_path / ("x" * 300))
        one_line(error)


def test_the_folder_source_needs_a_folder():
    with pytest.raises(UserError, match="--data-dir"):
        source("images")


@pytest.mark.parametrize(
    "options", [{"augment": "mixup"}, {"lighting": "dim"}, {"lighting": "published"}]
)
def test_options_that_do_not_fit_are_refused(options):
    (value,) = options.values()
    with pytest.raises(UserError, match=value) as error:
        source("digits", **options)
    one_line(error)


def test_an_unknown_source_is_refused():
    with pytest.raises(UserError, match="unknown data set 'cifar'"):
        source("cifar")


def test_bad_images_stop_training_unless_skipped(tree, caplog):
    bad = [tree / "train" / "ant" / "1.png", tree / "train" / "bee" / "0.png"]
    for path, how in zip(bad, ("empty", "truncated"), strict=True):
        spoil_image(path, how)
    found = source("images", tree)
    with pytest.raises(UserError, match=r"ant/1\.png"):
        found.train[SampleKey(0, 1)]
    with caplog.at_level(logging.WARNING, logger="tritonbnn"):
        found = source("images", tree, skip_bad_images=True)
    assert [found.train[SampleKey(0, i)][1] for i in range(len(found.train))] == [0, 0, 1, 1]
    assert "skipping 2 bad images of 6" in caplog.text
    assert all(str(path) in caplog.text for path in bad)
    assert len(found.val) == 2


def test_the_search_for_bad_images_obeys_a_signal(tree, monkeypatch):
    for i in range(1000):
        (tree / "train" / "ant" / f"more{i}.png").hardlink_to(tree / "train" / "ant" / "0.png")
    read = []

    def image(images, index):
        read.append(index)
        if len(read) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02)

    monkeypatch.setattr(FolderImages, "image", image)
    with (
        StopSignals() as signals,
        pytest.raises(Stopped) as stopped,
        signals.obeyed_at_once(),
    ):
        source("images", tree, skip_bad_images=True)
    assert stopped.value.code == 75
    assert len(read) < 100


def test_a_class_of_bad_images_only_cannot_be_skipped(tree):
    for path in (tree / "train" / "ant").iterdir():
        spoil_image(path, "text")
    with pytest.raises(UserError, match="train/ant holds no readable image"):
        source("images", tree, skip_bad_images=True)


# Prediction reads what validation reads


def test_a_digit_saved_as_a_file_is_the_same_input(tmp_path):
    pixels = grey(source("digits", image_size=8).val[SampleKey(0, 5)][0])
    Image.fromarray(pixels).save(tmp_path / "x.png")
    read = eval_reader(source("digits").facts)
    assert torch.equal(read(tmp_path / "x.png"), source("digits").val[SampleKey(0, 5)][0])
