"""Trees of images as users have them: names of splits and classes, white levels, what is small."""

import logging
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pictures import one_line, random_image, source, spoil_image
from tritonbnn.cli import UserError
from tritonbnn.data import memory
from tritonbnn.data.batches import check_shared_memory
from tritonbnn.data.classes import warn_of_numbers
from tritonbnn.data.folder import VAL_NAMES
from tritonbnn.data.images import BadImageError
from tritonbnn.data.sources import SampleKey, eval_reader, open_again


@pytest.fixture
def warnings(caplog):
    """A function that gives the package's warnings so far."""
    caplog.set_level(logging.WARNING, logger="tritonbnn")
    return lambda: [record.getMessage() for record in caplog.records]


def write(root: Path, classes=("ant", "bee"), val: str = "val", side: int = 8) -> Path:
    """Two images of each class to train on and one to validate on, each of its own seed."""
    for split, count in (("train", 2), (val, 1)):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                image = random_image(100 * number + index, side)
                image.save(root / split / name / f"{index}.png")
    return root


def labels(root: Path, **settings) -> dict[str, int]:
    """The label that each training image gets, by its class folder."""
    images = source("images", root, **settings).train.images
    return {images.path(i).parent.name: int(label) for i, label in enumerate(images.labels)}


# Splits


@pytest.mark.parametrize("name", VAL_NAMES)
def test_the_second_split_has_several_names(tmp_path, name):
    found = source("images", write(tmp_path, val=name))
    assert (len(found.train), len(found.val)) == (4, 2)
    assert found.val.images.root == tmp_path / name
    (tmp_path / name / "cat").mkdir()
    with pytest.raises(UserError, match=f"classes of train/ and {name}/.*cat, only in {name}/"):
        source("images", tmp_path)


def test_val_goes_before_test(tmp_path):
    write(tmp_path, val="val")
    (tmp_path / "test" / "images").mkdir(parents=True)
    assert source("images", tmp_path).val.images.root == tmp_path / "val"


# Classes


def test_a_split_that_is_a_link_to_the_other_is_said(tmp_path, warnings):
    write(tmp_path)
    source("images", tmp_path)
    assert warnings() == []
    shutil.rmtree(tmp_path / "val" / "ant")
    (tmp_path / "val" / "ant").symlink_to("../train/ant")
    source("images", tmp_path)
    [warning] = warnings()
    assert warning == (
        f"{tmp_path}/train/ant and {tmp_path}/val/ant are one folder (1 of 2 classes): what is"
        " validated there was trained on"
    )


def test_classes_are_in_the_order_of_text_or_of_numbers(tmp_path):
    names = [str(number) for number in range(12)]
    write(tmp_path, names)
    assert labels(tmp_path) == {name: place for place, name in enumerate(sorted(names))}
    assert labels(tmp_path, class_order="numeric") == {name: int(name) for name in names}


def test_classes_that_are_no_numbers_have_no_order_of_numbers(tmp_path):
    write(tmp_path, ["1", "bee"])
    with pytest.raises(UserError, match="class bee is no whole number") as error:
        source("images", tmp_path, class_order="numeric")
    one_line(error)


@pytest.mark.parametrize(
    ("classes", "warned"),
    [
        (["0", "1", "10", "2"], True),
        (["0", "1", "2", "10"], False),
        (["00", "01", "02", "10"], False),
        (["a", "b10", "b2"], False),
        (["0", "1", "10", "2", "x"], False),
    ],
)
def test_numbers_in_the_order_of_text_are_warned_of(warnings, classes, warned):
    warn_of_numbers(classes)
    assert len(warnings()) == warned
    assert all("pass --class-order numeric" in line for line in warnings())


@pytest.mark.parametrize("settings", [{}, {"class_order": "numeric"}])
def test_a_checkpoint_that_names_its_classes_gives_their_order(tmp_path, settings):
    names = [str(number) for number in range(12)]
    write(tmp_path, names)
    opened = source("images", tmp_path, **settings)
    again = open_again(opened.facts)
    assert again.classes == opened.classes
    for split in ("train", "val"):
        before, after = (getattr(s, split).images for s in (opened, again))
        for images in (before, after):
            for index, label in enumerate(images.labels):
                assert opened.classes[label] == images.path(index).parent.name
        assert len(before) == len(after)


def test_accents_in_two_forms_are_told_apart(tmp_path):
    write(tmp_path, [unicodedata.normalize("NFC", "café"), "bee"])
    (tmp_path / "val" / "café").rename(tmp_path / "val" / unicodedata.normalize("NFD", "café"))
    with pytest.raises(UserError) as error:
        source("images", tmp_path)
    told = one_line(error)
    assert "decomposed (NFD) in val/ and composed (NFC) in train/" in told


# What is left out


@pytest.mark.parametrize(
    "name", ["@eaDir", "__MACOSX", "$RECYCLE.BIN", "$Recycle.Bin", "lost+found", "#recycle"]
)
def test_folders_of_the_system_are_no_images(tmp_path, warnings, name):
    write(tmp_path)
    for place in ("train", "train/ant", "train/ant/deep"):
        (tmp_path / place / name).mkdir(parents=True)
        random_image(0).save(tmp_path / place / name / "thumbnail.png")
    found = source("images", tmp_path)
    assert (found.classes, len(found.train)) == (("ant", "bee"), 4)
    assert warnings() == [
        f"{tmp_path / 'train'}: 4 images; folders of the system left out: 3 ({name} 3)"
    ]


# White levels


def write_grey(root: Path, bits: int, *, brightest: int | None = None) -> Path:
    """16-bit images of which the first bits are used; one training image is as bright as can be."""
    rng = np.random.default_rng(bits)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for index in range(3):
                levels = rng.integers(0, 2**bits // 2, (8, 8)).astype(np.uint16)
                levels[0, 0] = 2**bits - 1 if brightest is None else brightest
                Image.fromarray(levels).save(root / split / name / f"{index}.png")
    return root


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_white_level_is_guessed_and_said(tmp_path, warnings, bits):
    write_grey(tmp_path, bits)
    found = source("images", tmp_path, image_size=8)
    assert found.facts["white_level"] == 2**bits - 1
    assert len(warnings()) == (bits < 16)
    for line in warnings():
        assert f"6 images of 16-bit grey is {2**bits - 1}" in line
        assert "--white-level" in line
    levels = np.asarray(Image.open(found.val.images.path(4))) / (2**bits - 1)
    red = found.val[SampleKey(0, 4)][0][0].numpy() * 0.229 + 0.485
    assert np.abs(red - levels).max() <= 0.5 / 255 + 1e-6


def test_a_white_level_that_is_set_is_not_guessed(tmp_path, warnings):
    write_grey(tmp_path, 12)
    assert source("images", tmp_path, white_level=8000).facts["white_level"] == 8000
    assert warnings() == []


def test_a_guess_that_does_not_hold_is_an_error_and_no_other_image(tmp_path):
    write_grey(tmp_path, 12)
    Image.fromarray(np.full((8, 8), 20_000, np.uint16)).save(tmp_path / "val" / "ant" / "0.png")
    found = source("images", tmp_path)
    with pytest.raises(BadImageError, match=r"20000 where 4095 is white.*--white-level"):
        found.val[SampleKey(0, 0)]


def test_evaluation_and_prediction_have_the_white_level_of_the_training(tmp_path):
    trained = source("images", write_grey(tmp_path / "a", 12), background="red")
    write_grey(tmp_path / "b", 12, brightest=1000)  # by themselves, of 10 bits
    again = open_again(trained.facts, tmp_path / "b")
    assert again.facts == {**trained.facts, "dir": str(tmp_path / "b")}
    path = again.val.images.path(0)
    assert torch.equal(eval_reader(trained.facts)(path), again.val[SampleKey(0, 0)][0])


# Small sets are kept


def test_what_is_loaded_is_what_is_read(tmp_path):
    write(tmp_path, side=32)
    Image.fromarray(np.full((5, 70), 9, np.uint8)).save(tmp_path / "train" / "bee" / "0.png")
    for augment in ("imagenet", "crop-flip", "none"):
        options = {"augment": augment, "lighting": "published"}
        read, loaded = (source("images", tmp_path, **options) for _ in range(2))
        loaded.load()
        for path in tmp_path.rglob("*/ant/*.png"):
            path.rename(path.with_suffix(".away"))  # so it cannot be read again
        for split in ("train", "val"):
            with pytest.raises(UserError):
                getattr(read, split)[SampleKey(0, 0)]
        for path in tmp_path.rglob("*.away"):
            path.rename(path.with_suffix(".png"))
        for split in ("train", "val"):
            for index in range(len(getattr(read, split))):
                key = SampleKey(3, index)
                expected, seen = (getattr(s, split)[key] for s in (read, loaded))
                assert torch.equal(expected[0], seen[0])
                assert expected[1] == seen[1]


def test_what_is_large_is_read_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MOST_BYTES", 4 * 3 * 8 * 8)  # of the training split
    found = source("images", write(tmp_path))
    random_image(0, side=9).save(tmp_path / "train" / "ant" / "0.png")
    found.load()
    (tmp_path / "train" / "ant" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png"):
        found.train[SampleKey(0, 1)]
    (tmp_path / "val" / "ant" / "0.png").unlink()
    found.val[SampleKey(0, 0)]  # this split is small


def test_a_few_large_ones_among_small_ones_are_not_kept(tmp_path, monkeypatch):
    found = source("images", write(tmp_path))
    monkeypatch.setattr(memory, "MOST_BYTES", 4 * 3 * 8 * 8)
    monkeypatch.setattr(memory, "_LOOKED_AT", 1)
    random_image(0, side=20).save(tmp_path / "train" / "bee" / "1.png")
    found.load()
    (tmp_path / "train" / "ant" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png"):
        found.train[SampleKey(0, 1)]


def test_loading_names_a_bad_image(tmp_path):
    write(tmp_path)
    spoil_image(tmp_path / "train" / "bee" / "1.png", "truncated")
    with pytest.raises(BadImageError, match=r"train/bee/1\.png"):
        source("images", tmp_path).load()


# Shared memory


def test_workers_that_find_no_room_are_refused(tmp_path):
    write(tmp_path)
    free = shutil.disk_usage("/dev/shm").free
    for workers, batches in ((1, 3), (3, 7)):
        options = {"batch_size": 64, "workers": workers}
        # the side at which so many batches of four images of three float32 fill the memory
        side = (free / batches / (4 * 3 * 4)) ** 0.5
        check_shared_memory(source("images", tmp_path, image_size=int(side / 1.5)), **options)
        large = source("images", tmp_path, image_size=int(side * 1.5))
        with pytest.raises(UserError, match=r"/dev/shm has .* MB: use fewer --workers") as error:
            check_shared_memory(large, **options)
        one_line(error)
        check_shared_memory(large, **{**options, "workers": 0})
        check_shared_memory(large, **options, levels=True)  # of 8 bits, a quarter of the bytes
        larger = source("images", tmp_path, image_size=int(side * 3))
        with pytest.raises(UserError, match="/dev/shm"):
            check_shared_memory(larger, **options, levels=True)
        noisy = source("images", tmp_path, image_size=int(side * 1.5), lighting="pca")
        with pytest.raises(UserError, match="/dev/shm"):  # noise of real numbers takes four bytes
            check_shared_memory(noisy, **options, levels=True)
