"""Data sources: what they hand out, against PIL and numpy, and what they refuse."""

import gzip
import logging
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tritonbnn.cli import UserError
from tritonbnn.train import fashion
from tritonbnn.train.images import BadImageError, load_image
from tritonbnn.train.sources import SampleKey, eval_reader, open_source


def source(name, data_dir=None, **options):
    defaults = {"image_size": 32, "augment": "none", "lighting": "none", "seed": 0, "step": 1}
    return open_source(name, data_dir=data_dir, **{**defaults, **options})


def grey(x: torch.Tensor) -> np.ndarray:
    """The 8-bit grey levels behind a normalised one-channel image."""
    return ((x[0] * 0.5 + 0.5) * 255).round().numpy().astype(np.uint8)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def random_image(seed: int, side: int = 8) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


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
    path = Path(fashion.__file__).parents[1] / "data" / "digits.npz"
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


# Fashion


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def fashion_arrays(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)


def write_fashion(folder: Path, suffix: str = ".gz") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate((("train", 5), ("t10k", 3))):
        images, labels = fashion_arrays(count, seed)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)


@pytest.mark.parametrize("suffix", [".gz", ""], ids=["packed", "unpacked"])
@pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
def test_fashion_is_found_and_padded(tmp_path, place, suffix):
    write_fashion(tmp_path / place, suffix)
    found = source("fashion", tmp_path)
    assert (found.name, len(found.classes), found.channels) == ("fashion", 10, 1)
    for seed, part, count in ((0, found.train, 5), (1, found.val, 3)):
        images, labels = fashion_arrays(count, seed)
        assert len(part) == count
        for i in range(count):
            image, label = part[SampleKey(0, i)]
            np.testing.assert_array_equal(grey(image), np.pad(images[i], 2))
            assert label == labels[i]


def test_debians_fashion_package():
    if not fashion.DEBIAN_DIR.is_dir():
        pytest.skip("needs the package dataset-fashion-mnist")
    train, val = fashion.load(None)
    assert np.bincount(train[1]).tolist() == [6000] * 10
    assert np.bincount(val[1]).tolist() == [1000] * 10


def test_fashion_that_is_nowhere_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "DEBIAN_DIR", tmp_path / "absent")
    for data_dir in (None, tmp_path):
        with pytest.raises(UserError, match="apt install dataset-fashion-mnist") as error:
            source("fashion", data_dir)
        one_line(error)


def test_one_missing_fashion_file_is_named(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz is missing"):
        source("fashion", tmp_path)


def valid_idx() -> bytes:
    return struct.pack(">HBB3I", 0, 8, 3, 5, 28, 28) + bytes(5 * 28 * 28)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not gzip",
        gzip.compress(valid_idx())[:-20],
        gzip.compress(valid_idx())[:30] + b"\xff" * 30,
        gzip.compress(b"\0\0"),
        gzip.compress(b"\0\0\x0d\x03" + valid_idx()[4:]),
        gzip.compress(valid_idx()[:9]),
        gzip.compress(valid_idx()[:-1]),
        gzip.compress(valid_idx() + b"\0"),
        gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 5, 14, 56) + bytes(5 * 28 * 28)),
        gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 0, 28, 28)),
        gzip.compress(struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3)),
    ],
    ids=[
        *("empty", "no gzip", "gzip cut", "gzip damaged", "no magic", "floats", "header cut"),
        *("data cut", "too long", "other shape", "no images", "huge"),
    ],
)
def test_a_corrupt_image_file_is_named(tmp_path, content):
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is corrupt") as error:
        source("fashion", tmp_path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("labels", [np.zeros(4), np.full(5, 10), np.zeros((5, 1))])
def test_a_corrupt_label_file_is_named(tmp_path, labels):
    write_fashion(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    write_idx(path, labels)
    with pytest.raises(UserError, match="is corrupt") as error:
        source("fashion", tmp_path)
    assert str(path) in one_line(error)


# Image trees


@pytest.mark.parametrize("name", ["folder", "digits", "fashion"])
def test_an_image_tree_serves_every_name(tree, name):
    found = source(name, tree, image_size=8)
    assert (found.name, found.classes, found.channels) == ("folder", ("ant", "bee"), 3)
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
    assert len(source("folder", tree).train) == 7


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
        source("folder", tree)
    assert str(tree) in one_line(error)


def test_a_path_that_the_system_refuses_is_named(tmp_path):
    for name in ("digits", "fashion", "folder"):
        with pytest.raises(UserError, match=r"cannot read .*xxx.*: File name too long") as error:
            source(name, tmp_path / ("x" * 300))
        one_line(error)


def test_the_folder_source_needs_a_folder():
    with pytest.raises(UserError, match="--data-dir"):
        source("folder")


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


# Image files


def spoil_image(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"just words\n" * 9, "truncated": content[: len(content) // 2]}[how]
    )


BAD = ["empty", "text", "truncated"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp"])
@pytest.mark.parametrize("how", BAD)
def test_a_bad_image_is_named_in_one_line(tmp_path, how, suffix):
    path = tmp_path / f"x.{suffix}"
    random_image(0, side=64).save(path)
    spoil_image(path, how)
    with pytest.raises(BadImageError) as error:
        load_image(path, 3)
    assert str(path) in one_line(error)
    copy = pickle.loads(pickle.dumps(error.value))
    assert (type(copy), str(copy)) == (BadImageError, str(error.value))


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(UserError, match=r"x\.jpg cannot be read .*No such file"):
        load_image(tmp_path / "x.jpg", 3)


def test_bad_images_stop_training_unless_skipped(tree, caplog, monkeypatch):
    # the command lines stop propagation, should one have run in this process before
    monkeypatch.setattr(logging.getLogger("tritonbnn"), "propagate", True)
    bad = [tree / "train" / "ant" / "1.png", tree / "train" / "bee" / "0.png"]
    for path, how in zip(bad, ("empty", "truncated"), strict=True):
        spoil_image(path, how)
    found = source("folder", tree)
    with pytest.raises(UserError, match=r"ant/1\.png"):
        found.train[SampleKey(0, 1)]
    with caplog.at_level(logging.WARNING, logger="tritonbnn"):
        found = source("folder", tree, skip_bad_images=True)
    assert [found.train[SampleKey(0, i)][1] for i in range(len(found.train))] == [0, 0, 1, 1]
    assert "skipping 2 bad images of 6" in caplog.text
    assert all(str(path) in caplog.text for path in bad)
    assert len(found.val) == 2


def test_a_class_of_bad_images_only_cannot_be_skipped(tree):
    for path in (tree / "train" / "ant").iterdir():
        spoil_image(path, "text")
    with pytest.raises(UserError, match="train/ant holds no readable image"):
        source("folder", tree, skip_bad_images=True)


def test_grey_and_one_pixel_images_load(tmp_path):
    path = tmp_path / "x.png"
    Image.new("L", (1, 1), 77).save(path)
    assert np.asarray(load_image(path, 3)).tolist() == [[[77, 77, 77]]]
    assert np.asarray(load_image(path, 1)).tolist() == [[77]]


def test_cmyk_images_load(tmp_path):
    path = tmp_path / "x.tif"
    Image.new("CMYK", (2, 2), (255, 0, 0, 0)).save(path)
    assert np.asarray(load_image(path, 3))[0, 0].tolist() == [0, 255, 255]
    path = tmp_path / "x.jpg"
    Image.new("CMYK", (8, 8), (0, 255, 0, 0)).save(path, quality=100)
    np.testing.assert_allclose(np.asarray(load_image(path, 3))[4, 4], [255, 0, 255], atol=3)


@pytest.mark.filterwarnings("error")
def test_palette_images_with_transparency_load(tmp_path):
    path = tmp_path / "x.png"
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(path, transparency=bytes([0, 128]))
    assert np.asarray(load_image(path, 3)).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_alpha_is_dropped(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGBA", (1, 1), (9, 8, 7, 0)).save(path)
    assert np.asarray(load_image(path, 3)).tolist() == [[[9, 8, 7]]]
    Image.new("LA", (1, 1), (9, 0)).save(path)
    assert np.asarray(load_image(path, 1)).tolist() == [[9]]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_images_are_scaled(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    levels = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    Image.fromarray(levels).save(path)
    expected = np.rint(levels / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(load_image(path, 1)), expected)
    np.testing.assert_array_equal(np.asarray(load_image(path, 3))[..., 2], expected)


def test_32_bit_images_hold_16_bit_levels(tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(np.array([[0, 257, 65535]], np.int32)).save(path)
    assert np.asarray(load_image(path, 1)).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize(
    "pixels",
    [np.array([[65536]], np.int32), np.array([[-1]], np.int32), np.array([[0.5]], np.float32)],
)
def test_pixels_without_an_8_bit_meaning_are_refused(tmp_path, pixels):
    path = tmp_path / "x.tif"
    Image.fromarray(pixels).save(path)
    with pytest.raises(BadImageError, match=r"x\.tif"):
        load_image(path, 3)


def test_exif_orientation_is_ignored(tmp_path):
    path = tmp_path / "x.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image(0).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(path, 3)), np.asarray(random_image(0)))


# Prediction reads what validation reads


def test_a_digit_saved_as_a_file_is_the_same_input(tmp_path):
    pixels = grey(source("digits", image_size=8).val[SampleKey(0, 5)][0])
    Image.fromarray(pixels).save(tmp_path / "x.png")
    read = eval_reader("digits", image_size=32, augment="none", channels=1)
    assert torch.equal(read(tmp_path / "x.png"), source("digits").val[SampleKey(0, 5)][0])


def test_a_fashion_image_saved_as_a_file_is_the_same_input(tmp_path):
    write_fashion(tmp_path)
    pixels = fashion_arrays(3, seed=1)[0][2].astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    read = eval_reader("fashion", image_size=32, augment="crop-flip", channels=1)
    assert torch.equal(
        read(tmp_path / "x.png"), source("fashion", tmp_path).val[SampleKey(0, 2)][0]
    )
